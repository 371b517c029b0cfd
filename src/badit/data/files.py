"""Text and JSON from disk, strictly: what is broken ends in one line that names the place and the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from badit.data.schema import shown
from badit.errors import BaditError


def read_text(file: Path) -> str:
    """The file's text.

    Raises:
        BaditError: it cannot be read, is not UTF-8, or starts with a byte order mark.
    """
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise BaditError(f"{shown(file)}: cannot be read ({reason})") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BaditError(f"{shown(file)}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if text.startswith("\ufeff"):
        raise BaditError(f"{shown(file)}: starts with a byte order mark; save the file as UTF-8 without one")
    return text


def parse_json(text: str, *, file: Path, first_line: int = 1) -> object:
    """The JSON value in `text`, which starts at line `first_line` of `file`.

    Raises:
        BaditError: invalid JSON, NaN or an infinity, half a surrogate pair (which no tokenizer takes), or nesting
            beyond what the parser can follow.
    """

    def refuse_constant(constant: str) -> NoReturn:
        raise BaditError(f"{shown(file)}: {constant} is not JSON; use a number or null (line {first_line} on)")

    try:
        value = json.loads(text, parse_constant=refuse_constant)
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
