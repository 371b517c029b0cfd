"""The one exception that users are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BaditError(ValueError):
    """Bad input. The message names the file, the field and the mend; the command line prints it and exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `` (did you mean 'x'?)`` or the empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_line(text: str) -> str:
    """Text for a terminal: a line break or a control character, which may be a command to it, stands as its escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
