"""Commands that are methods of Run or functions of badit, with their parameters and docstrings."""

import inspect
from collections.abc import Callable
from typing import Any, Literal  # noqa: F401 (in the annotations of derived commands)

from badit.api import Run
from badit.cli.app import Enabled, Output, RunPath, Trust, app, load  # noqa: F401 (likewise)

#: Returns the text to print, from the run or path, the result and the options.
Show = Callable[[Any, Any, dict[str, Any]], str | None]


def derive(
    function: Callable[..., Any],
    show: Show,
    module: str | None = None,
    refuse: Callable[[Any, dict[str, Any]], None] = lambda target, options: None,
) -> None:
    """Adds a command that calls a method of Run, or a function of a path.

    ``module`` is imported first, with a status line, unless the function does this itself; before
    that, ``refuse`` checks the path and the options. The command of a method has the run's folder
    as its first parameter and, if it shows progress (loads the model), ``trust_remote_code``.
    """
    is_method = next(iter(inspect.signature(function).parameters)) == "self"
    parameters = _parameters(function, is_method)

    def command(path: str, *arguments: Any, **options: Any) -> str | None:
        target: Any = path
        if is_method:
            target = Run(path, trust_remote_code=options.pop("trust_remote_code", False))
        refuse(target, options)
        if module is not None:
            load(module)
        return show(target, function(target, *arguments, **options), options)

    # cyclopts reads the parameters and the help from these attributes of a function.
    signature = inspect.Signature(parameters)
    command.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    app.command(command)


def _parameters(function: Callable[..., Any], is_method: bool) -> list[inspect.Parameter]:
    """Returns a command's parameters, with the types of this module in their annotations."""
    first, *others = inspect.signature(function).parameters.values()
    if is_method:
        parameters = [first.replace(name="run", annotation="RunPath")]
    else:
        parameters = [first.replace(annotation="str")]
    for parameter in others:
        # Annotations in api.py are strings, because their evaluation is postponed.
        path_type = "Output" if parameter.name == "output" else "str"
        annotation = parameter.annotation.replace("AnyPath", path_type)
        # A flag that is set by default needs --no-NAME.
        if parameter.default is True:
            annotation = "Enabled"
        parameters.append(parameter.replace(annotation=annotation))
    # Else an error would name a positional parameter as an option. The output is one, too.
    for number, parameter in enumerate(parameters):
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name != "output":
            parameters[number] = parameter.replace(kind=parameter.POSITIONAL_ONLY)
    if is_method and "progress" in function.__annotations__:
        last = parameters[-1]
        parameters.append(last.replace(name="trust_remote_code", default=False, annotation="Trust"))
    return parameters
