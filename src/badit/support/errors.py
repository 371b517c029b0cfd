"""The error that users see, and the conversion of other libraries' exceptions into it."""

import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from badit.support.console import one_line

# torch's writer reports why opening a file failed, but not why writing failed; safetensors ends with "(os error 28)".
_OPEN_FAILED = re.compile(r"open file failed|cannot be opened|\(os error")
_WRITE_FAILED = re.compile(r"PytorchStreamWriter failed|inline_container|iostream error")
_HUB_FIXES = {
    401: "; the token is invalid or expired: run hf auth login",
    403: "; the token has no access to this repository: use another token or another repository",
}


class BaditError(ValueError):
    """Invalid input. The message names the file, the field and the fix; the command line prints it and exits with 2.

    The message has one line per problem. Control characters are escaped. Lines longer than 1,200 characters are cut.
    """

    def __init__(self, *messages: str) -> None:
        lines = map(one_line, messages)
        super().__init__(
            "\n".join(
                line if len(line) <= 1200 else f"{line[:800]} … {line[-300:]}" for line in lines
            )
        )


@contextmanager
def explained(
    where: object = "", *, action: str = "read or written", fix: str = "", any_error: bool = False
) -> Iterator[None]:
    """Converts known exceptions of files, schemas and the hub into :class:`BaditError`; others (bugs) propagate.

    The message is "``where``: cannot be ``action`` (reason); ``fix``"; ``where`` is by default the exception's file.
    ``any_error`` converts every exception, for libraries that can raise any exception on a damaged file.
    """
    try:
        yield
    except (BaditError, BrokenPipeError):  # a closed stdout is not an error
        raise
    except Exception as error:
        file = getattr(error, "filename", None)
        file = os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else ""
        place = str(where) or file
        problem = _explanation(error, action, "" if file in ("", place) else f": {file}", any_error)
        if problem is None:
            raise
        message = f"{place}: {problem}" if place else problem
        raise BaditError(f"{message}; {fix}" if fix else message) from error


def _explanation(error: Exception, action: str, named: str, any_error: bool) -> str | None:
    """Describes an exception; ``named`` is appended to OS errors and names their file. None if it is unknown."""
    if _is(error, "pydantic_core", "ValidationError"):
        problem = error.errors(include_url=False)[0]  # pyright: ignore
        return ": ".join(filter(None, [".".join(map(str, problem["loc"])), _message(problem)]))
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at line {error.lineno} column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}; save the file as UTF-8"
    if _is(error, "torch", "OutOfMemoryError"):
        fix = "lower training.per_device_train_batch_size or evaluation.batch_size; more in docs/troubleshooting.md"
        return f"the device is out of memory ({first_line(error):.80}); {fix}"
    if _is(error, "huggingface_hub.errors", "HfHubHTTPError"):
        status = getattr(getattr(error, "response", None), "status_code", 0)
        return f"the hub refuses: {first_line(error)}{_HUB_FIXES.get(status, '')}"
    if _is(
        error,
        "huggingface_hub.errors",
        "HTTPError",
        "OfflineModeIsEnabled",
        "LocalTokenNotFoundError",
    ):
        return f"the hub cannot be reached ({first_line(error)}); try again later"
    if _is(error, "huggingface_hub.errors", "HFValidationError"):
        return first_line(error)
    text = str(error)
    cannot_open = _OPEN_FAILED.search(text)
    cannot_write = (
        isinstance(error, RuntimeError) and _WRITE_FAILED.search(text) and not cannot_open
    )
    if cannot_write or _has_number(error, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "cannot be written, the disk (or a quota) is full; free some space and run the same command again"
    if _has_number(error, errno.EROFS):
        return (
            "cannot be written, the file system is read-only; choose a folder that can be written"
        )
    if isinstance(error, OSError):
        return f"cannot be {action} ({error.strerror or first_line(error)}{named})"
    if isinstance(error, UnicodeEncodeError) or (
        isinstance(error, ValueError) and "embedded null" in text
    ):
        return f"cannot be {action} (not a valid path)"
    if isinstance(error, ValueError) and "trust_remote_code" in text:
        return f"cannot be {action} without the model's Python code; allow it with trust_remote_code if you trust it"
    if any_error or cannot_open or _is(error, "safetensors", "SafetensorError"):
        return f"cannot be {action} ({first_line(error)})"
    return None


def _has_number(error: Exception, *numbers: int) -> bool:
    """Returns whether an exception of Python, safetensors or torch's writer has one of these values of errno."""
    return getattr(error, "errno", None) in numbers or any(
        os.strerror(number) in str(error) for number in numbers
    )


def _is(error: Any, module: str, *names: str) -> bool:
    """Returns whether an exception is of one of a library's classes; a library that is not imported cannot raise it."""
    return isinstance(error, tuple(getattr(sys.modules.get(module), name, ()) for name in names))


def problems(
    error: Any,
    values: Any,
    known_keys: Callable[[Sequence[int | str]], Iterable[str]] | None = None,
) -> list[tuple[str, str]]:
    """Returns the dotted key and the description of each problem in a pydantic ValidationError of ``values``.

    ``known_keys`` returns the valid keys of the section at a location, to suggest one for a misspelt key.
    """
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        place, inner = [], values
        for part in problem["loc"]:
            with suppress(
                LookupError, TypeError
            ):  # a part that is not in the values: the tried alternative of a union
                inner = inner[part]
                place.append(part)
        if problem["type"] == "missing":
            place.append(problem["loc"][-1])
        message = _message(problem)
        if problem["type"] == "extra_forbidden":
            *section, key = problem["loc"]
            message = f"unknown key{nearest(str(key), known_keys(section)) if known_keys else ''}"
        elif problem["type"] not in ("missing", "value_error") or not isinstance(
            problem["input"], dict
        ):
            given = repr(problem["input"])
            message += f", got {given if len(given) < 60 else given[:57] + '...'}"
        found.setdefault(f"{'.'.join(map(str, place)):.120}", message)
    # Without those of the alternatives of a union that do not reach as deep.
    return [
        (place, text)
        for place, text in found.items()
        if not any(p.startswith(f"{place}.") for p in found)
    ]


def _message(problem: Any) -> str:
    """Returns the message of one problem of a ValidationError, without pydantic's prefix."""
    message = (
        re.sub(r" or instance of \w+", "", problem["msg"])
        .removeprefix("Value error, ")
        .replace("\n", " ")
    )
    if problem["type"] == "missing" and isinstance(problem["input"], dict):
        wanted = str(problem["loc"][-1])
        # A high cutoff: task_b is not a misspelt task_a.
        for found in difflib.get_close_matches(
            wanted, map(str, problem["input"]), n=1, cutoff=0.86
        ):
            message += f" (found {found!r:.60}, did you mean {wanted!r}?)"
    return message[:1].lower() + message[1:]


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(" .:")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint for a misspelt name, `` (did you mean 'x'?)``, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def refuse_unknown(field: str, value: object, known: Iterable[str]) -> None:
    """Raises BaditError if the value is unknown; the message names the field, the nearest and all known values."""
    known = list(known)
    if value not in known:
        raise BaditError(
            f"{field}: unknown {value!r:.60}{nearest(str(value), known)}; known: {', '.join(known)}"
        )
