"""The error that users see, and the conversion of other libraries' exceptions into it."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from badit.support.console import one_line

_HUB_FIXES = {
    401: "; the token is invalid or expired: run hf auth login",
    403: "; the token has no access to this repository: use another token or another repository",
}


class BaditError(ValueError):
    """Invalid input. The command line prints the message and exits with code 2.

    The message names the file, the field and the fix, with one line per problem. Control
    characters are escaped. Lines longer than 1,200 characters are cut in the middle.
    """

    def __init__(self, *messages: str) -> None:
        lines = []
        for line in map(one_line, messages):
            # The beginning of a message names the file and the field, and its end the fix.
            if len(line) > 1200:
                line = f"{line[:800]} … {line[-300:]}"
            lines.append(line)
        super().__init__("\n".join(lines))


@contextmanager
def explained(
    where: object = "", *, action: str = "read or written", fix: str = "", any_error: bool = False
) -> Iterator[None]:
    """Converts known exceptions of files, schemas and the hub into :class:`BaditError`.

    Other exceptions, which are bugs, propagate. The message is "``where``: cannot be ``action``
    (reason); ``fix``".

    Args:
        where: a file, a key or an address (default: the exception's file).
        action: what was done, as a participle.
        fix: what the user can do.
        any_error: convert every exception, for libraries that can raise any on a damaged file.
    """
    try:
        yield
    except (BaditError, BrokenPipeError):  # a closed stdout is not an error
        raise
    except Exception as error:
        # The error may concern another file than the one that the caller names.
        file = str(getattr(error, "filename", None) or "")
        place = str(where) or file
        problem = _explanation(error, action, file if file != place else "")
        if problem is None:
            if not any_error:
                raise
            problem = f"cannot be {action} ({first_line(error)})"
        message = ": ".join(filter(None, [place, problem]))
        if fix:
            message += f"; {fix}"
        raise BaditError(message) from error


def _explanation(error: Any, action: str, file: str) -> str | None:
    """Describes an exception, None if it is unknown; ``file`` is added to errors of the system."""
    if file:
        file = f": {file}"
    for classes, pattern, text in _EXPLANATIONS:
        if _is(error, classes) and re.search(pattern, str(error)):
            if callable(text):
                return text(error)
            # The text of an OSError repeats the number and the file; strerror is the reason alone.
            reason = getattr(error, "strerror", None) or first_line(error)
            return text.format(error=error, action=action, reason=reason, file=file)
    return None


def _is(error: object, names: str) -> bool:
    """Returns whether an exception is of one of the classes "module:class class"."""
    module, _, classes = names.partition(":")
    # A library that is not imported cannot raise an exception.
    library = sys.modules.get(module)
    return isinstance(error, tuple(getattr(library, name, ()) for name in classes.split()))


def _invalid_value(error: Any) -> str:
    problem = error.errors(include_url=False)[0]
    return ": ".join(filter(None, [".".join(map(str, problem["loc"])), _message(problem)]))


def _refusal_of_hub(error: Any) -> str:
    fix = _HUB_FIXES.get(getattr(error.response, "status_code", 0), "")
    return f"the hub refuses: {first_line(error)}{fix}"


def _system_errors(*numbers: int) -> str:
    """Returns a pattern for errors of the system. safetensors and torch have only their text."""
    return "|".join(rf"\[Errno {number}\]|{os.strerror(number)}" for number in numbers)


_CANNOT = "cannot be {action} ({reason}{file})"
_FULL_DISK = (
    "cannot be written, the disk (or a quota) is full; "
    "free some space and run the same command again"
)

# Classes, a pattern in the message, and the description: a function of the exception, or a text
# with the fields error, action, reason and file. The first entry that matches is used.
_EXPLANATIONS: list[tuple[str, str, str | Callable[[Any], str]]] = [
    ("pydantic_core:ValidationError", "", _invalid_value),
    (
        "json:JSONDecodeError",
        "",
        "invalid JSON at line {error.lineno} column {error.colno}: {error.msg}",
    ),
    ("builtins:UnicodeDecodeError", "", "not UTF-8 at byte {error.start}; save the file as UTF-8"),
    (
        "torch:OutOfMemoryError",
        "",
        "the device is out of memory ({reason:.80}); lower training.per_device_train_batch_size "
        "or evaluation.batch_size; more in docs/troubleshooting.md",
    ),
    # Before its base class HTTPError: the hub has answered, so its status says what to do.
    ("huggingface_hub.errors:HfHubHTTPError", "", _refusal_of_hub),
    (
        "huggingface_hub.errors:HTTPError OfflineModeIsEnabled LocalTokenNotFoundError",
        "",
        "the hub cannot be reached ({reason}); try again later",
    ),
    ("huggingface_hub.errors:HFValidationError", "", "{reason}"),
    ("builtins:Exception", _system_errors(errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL_DISK),
    (
        "builtins:Exception",
        _system_errors(errno.EROFS),
        "cannot be written, the file system is read-only; choose a folder that can be written",
    ),
    # torch's writer reports why opening a file failed, but not why writing failed.
    ("builtins:Exception", r"open file failed|cannot be opened|\(os error", _CANNOT),
    (
        "builtins:RuntimeError",
        "PytorchStreamWriter failed|inline_container|iostream error",
        _FULL_DISK,
    ),
    ("safetensors:SafetensorError", "", _CANNOT),
    ("builtins:OSError", "", _CANNOT),
    ("builtins:UnicodeEncodeError", "", "cannot be {action} (not a valid path)"),
    ("builtins:ValueError", "embedded null", "cannot be {action} (not a valid path)"),
    (
        "builtins:ValueError",
        "trust_remote_code",
        "cannot be {action} without the model's Python code; "
        "allow it with trust_remote_code if you trust it",
    ),
]


def problems(
    error: Any,
    values: Any,
    hint_of: Callable[[Sequence[int | str], str], str] = lambda section, key: "",
) -> list[tuple[str, str]]:
    """Returns the dotted key and the description of each problem in a pydantic ValidationError.

    Args:
        error: the error.
        values: the validated values.
        hint_of: returns a hint for an unknown key of the section at a location, as
            :func:`nearest`.
    """
    messages: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        place = ".".join(map(str, _place(problem, values)))
        # The alternatives of a union report a problem each for the same value; one is enough.
        messages.setdefault(f"{place:.120}", _described(problem, hint_of))
    # pydantic reports every alternative of a union. Those that do not reach as deep are dropped.
    return [
        (place, message)
        for place, message in messages.items()
        if not any(other.startswith(f"{place}.") for other in messages)
    ]


def _place(problem: Any, values: Any) -> list[int | str]:
    """Returns a problem's location, without the names of a union's tried alternatives."""
    place = []
    for step in problem["loc"]:
        with suppress(LookupError, TypeError):  # the name of an alternative is not in the values
            values = values[step]
            place.append(step)
    if problem["type"] == "missing":
        place.append(problem["loc"][-1])
    return place


def _described(problem: Any, hint_of: Callable[[Sequence[int | str], str], str]) -> str:
    """Returns the message of a problem, with the value or, for an unknown key, a known one."""
    kind = problem["type"]
    if kind == "extra_forbidden":
        *section, key = problem["loc"]
        return f"unknown key{hint_of(section, str(key))}"
    message = _message(problem)
    # These problems concern a whole section, which is too long to be shown.
    if kind in ("missing", "value_error") and isinstance(problem["input"], dict):
        return message
    value = repr(problem["input"])
    if len(value) >= 60:
        value = f"{value[:57]}..."
    return f"{message}, got {value}"


def _message(problem: Any) -> str:
    """Returns the message of one problem of a ValidationError, without pydantic's prefix."""
    # pydantic also offers an instance of its class, which a file cannot have.
    message = re.sub(r" or instance of \w+", "", problem["msg"])
    message = message.removeprefix("Value error, ").replace("\n", " ")
    if problem["type"] == "missing" and isinstance(problem["input"], dict):
        key = str(problem["loc"][-1])
        # A high cutoff: task_b is not a misspelt task_a.
        similar = difflib.get_close_matches(key, map(str, problem["input"]), n=1, cutoff=0.86)
        if similar:
            message += f" (found {similar[0]!r:.60}, did you mean {key!r}?)"
    return message[:1].lower() + message[1:]


def check(name: str, value: Any, kind: Any) -> None:
    """Raises BaditError if a value is not of a type; the message begins with its name."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise BaditError(f"{name}: {problems(error, value)[0][1]}") from None


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its type if the message is empty."""
    lines = filter(None, map(str.strip, str(error).splitlines()))
    return next(lines, type(error).__name__)[:200].rstrip(" .:")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns a hint for a misspelt name, `` (did you mean 'x'?)``, or an empty string."""
    similar = difflib.get_close_matches(str(name), list(choices), n=1)
    if not similar:
        return ""
    return f" (did you mean '{similar[0]}'?)"


def refuse_unknown(field: str, value: object, choices: Iterable[str]) -> None:
    """Raises BaditError if the value is none of the choices.

    The message names the field, the nearest and all choices.
    """
    choices = list(choices)
    if value not in choices:
        hint = nearest(str(value), choices)
        raise BaditError(f"{field}: unknown {value!r:.60}{hint}; known: {', '.join(choices)}")
