"""Reads files strictly, with errors that name the file and the fix, and writes each file whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from badit.errors import BaditError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors gives the number in its text; torch's writer only says that it wrote less than it should.
_TELLS_OF_FULL_DISK = re.compile(
    rf"os error ({'|'.join(map(str, _FULL))})\b|PytorchStreamWriter failed|inline_container"
)


def read_text(file: Path) -> str:
    """The file's text.

    Raises:
        BaditError: it cannot be read, is not UTF-8, or starts with a byte order mark. A pipe or a device is no file,
            for what it gives may never come or never end.
    """
    try:
        endless = file.exists() and not file.is_file() and not file.is_dir()
        content = b"" if endless else file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise BaditError(f"{shown(file)}: cannot be read ({reason})") from None
    if endless:
        raise BaditError(f"{shown(file)}: cannot be read (a pipe or a device); put a file there")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BaditError(f"{shown(file)}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if text.startswith("\ufeff"):
        raise BaditError(f"{shown(file)}: starts with a byte order mark; save the file as UTF-8 without one")
    return text


def parse_json(text: str, *, file: Path, first_line: int = 1, constants: bool = False) -> Any:
    """The JSON value in `text`, which starts at line `first_line` of `file`.

    Args:
        constants: whether NaN and infinities are taken, which are not JSON but which Python's writer uses.

    Raises:
        BaditError: invalid JSON, an object with the same key twice, half a surrogate pair (which no tokenizer takes),
            or nesting beyond what the parser can follow.
    """

    def refuse_constant(constant: str) -> NoReturn:
        raise BaditError(f"{shown(file)}: {constant} is not JSON; use a number or null (line {first_line} on)")

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # The last one would win, and what the others say be lost without a word.
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise BaditError(f"{shown(file)}: the key {twice!r:.60} is there twice from line {first_line} on; keep one")
        return entries

    try:
        value = json.loads(text, parse_constant=None if constants else refuse_constant, object_pairs_hook=distinct)
        if "\\ud" in text.lower():  # an escaped surrogate; encoding finds one without its other half
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise BaditError(f"{shown(file)}: invalid JSON at line {line} column {error.colno}: {error.msg}") from None
    except UnicodeEncodeError:
        raise BaditError(
            f"{shown(file)}: half a surrogate pair from line {first_line} on; escape both halves"
        ) from None
    except RecursionError:
        raise BaditError(f"{shown(file)}: JSON nested too deeply from line {first_line} on; flatten it") from None
    except BaditError:
        raise
    except ValueError:  # Python refuses to turn thousands of digits into an integer
        raise BaditError(f"{shown(file)}: a number is too long from line {first_line} on; shorten it") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: never half of it, whenever the process or the machine dies."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # a link there would lead the text into another file
    partial.write_text(text, encoding="utf-8", newline="\n")
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        BaditError: the file is missing or damaged.
    """
    return _object(read_text(path), path, 1)


def refuse_other_format(content: Mapping[str, Any], path: Path, known: int) -> None:
    """Raises for a file whose ``format``, the version of its form, is not the one that this release reads.

    Raises:
        BaditError: the format is newer, or there is none.
    """
    found = content.get("format")
    if isinstance(found, int) and not isinstance(found, bool) and found > known:
        raise BaditError(
            f"{shown(path)}: format: is {found!r:.60}, this badit reads {known}: pip install --upgrade badit"
        )
    if found is True or found != known:
        raise BaditError(f"{shown(path)}: format: must be {known}, not {found!r:.60}; make the file anew")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; a last line that a crash cut short is left out, as nothing was lost but that line.

    Raises:
        BaditError: a line is no JSON object.
    """
    if not path.is_file():
        return
    # Only \n ends a line: answers may hold other separators, such as U+2028. What follows the last one was cut short.
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        yield _object(line, path, number)


def _object(text: str, path: Path, line: int) -> dict[str, Any]:
    # Numbers that training has made may be NaN: of a run that diverged, or where a mean is over nothing.
    value = parse_json(text, file=path, first_line=line, constants=True)
    if not isinstance(value, dict):
        raise BaditError(f"{shown(path)}: must hold one JSON object, not a {type(value).__name__} (line {line})")
    return value


class StepLog:
    """A log of one JSON object a line, each with the step it was written at, which a resumed run takes up again."""

    def __init__(self, path: Path, *, step_key: str = "step") -> None:
        self._path = path
        self._step_key = step_key

    def rewind(self, step: int, pending: Collection[Mapping[str, Any]] = ()) -> None:
        """Drops what was logged after ``step``: a resumed run is about to log it again, a new one starts empty.

        So it is with lines of ``pending`` beginnings, which may have been completed and logged at ``step`` itself.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [
            line
            for line in (read_jsonl(self._path) if step else ())
            if line[self._step_key] <= step and not any(begun.items() <= line.items() for begun in pending)
        ]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def replace_folder(partial: Path, final: Path) -> None:
    """Puts a finished folder in the place of an older one."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    sync(final.parent)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns what Python, torch and safetensors raise on a full disk into one line.

    Raises:
        BaditError: in place of theirs.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) not in _FULL and not _TELLS_OF_FULL_DISK.search(str(error)):
            raise
        raise BaditError(
            f"{folder}: cannot be written, the disk (or a quota) is full; "
            "make room, and the same command goes on from the last checkpoint"
        ) from None


def shown(file: Path) -> str:
    """A path for an error message: on one line even if its name has line breaks."""
    return str(file) if str(file).isprintable() else repr(str(file))
