"""The application that the commands are added to, and the types of their parameters."""

import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.types import Port

from badit import __version__
from badit.support.console import loading_libraries, status

app = App(
    name="badit",
    help=(
        "Tunes a model on many tasks and compares methods. --debug before a command shows "
        "tracebacks."
    ),
    version=f"badit {__version__}",
    # Fills the lines of a paragraph at the width of the terminal.
    help_format="markdown",
    # Flags have no --no-NAME unless they are of the type Enabled.
    default_parameter=Parameter(negative_bool=()),
    # main() prints the result, and reports an interruption.
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(
    help="Install completion for your shell, and print the path of the script."
)

Output = Annotated[str, Parameter(name=["--output", "-o"])]
# A flag that is set unless --no-NAME is given.
Enabled = Annotated[bool, Parameter(negative_bool="no-")]
Overrides = Annotated[
    str, Parameter(help="key=value, such as training.num_train_epochs=2 output=runs/mine.")
]
LocalPort = Annotated[Port, Parameter(help="the port to listen on; 0 selects a free one.")]
RunPath = Annotated[str, Parameter(help="a run's folder.")]
Trust = Annotated[
    bool,
    Parameter(help="run the base model's own Python code, if the run's recipe allows this too."),
]


def load(module: str) -> Any:
    """Imports a module, which may take seconds, and shows a status line meanwhile."""
    with loading_libraries():
        return import_module(module)


def read_recipe(path: str, overrides: Sequence[str]) -> Any:
    """Reads a recipe and checks that its data and its model exist.

    So errors are reported before the slow imports.
    """
    with status("reading the recipe"):
        recipe = load("badit.recipe.loading").load_recipe(path, overrides)
        for source in recipe.data.sources():
            source.refuse_missing()
        models = load("badit.models")
        if recipe.model.name != models.BUILT_IN:
            models.resolve_model(recipe.model.name)
    return recipe


def refuse_missing_data(source: str) -> None:
    """Raises BaditError if a value of ``data.source`` names a path that does not exist."""
    schema = load("badit.recipe.schema")
    section = schema.DataSection(source=schema.source_of(source))
    for place in section.sources():
        place.refuse_missing()


def write_report_if_possible(runs: Sequence[str | Path], output: Path) -> str:
    """Writes the report; returns a line with its path, or with the command for its extra."""
    report = load("badit.report")
    if not report.has_extra():
        command = shlex.join(["badit", "report", *map(str, runs)])
        return f"For a report with figures: pip install 'badit[report]', then {command}"
    return f"Report: {report.write_report(runs, output)}"
