"""Text and JSON from disk, strictly: what is broken ends in one line that names the place and the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from badit.data.schema import shown
from badit.errors import BaditError


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
