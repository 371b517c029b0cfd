"""Numbers and task names as the page shows them: a true minus sign, few digits, short names for long tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import pandas as pd

UNKNOWN = "–"
_LONGEST_NAME = 22


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """``number(-0.25, 2)`` is "−0.25"; what rounds to zero has no sign; an unknown number is a dash."""
    if value is None or pd.isna(value):
        return UNKNOWN
    return f"{value:{'+' if signed else '-'}z,.{digits}f}".replace("-", "−")


def whole(value: float | None) -> str:
    return number(value, 0)


def interval(mean: float | None, low: float | None, high: float | None) -> str:
    """``+1.2 [−0.3, +2.7]``."""
    shown = [number(value, signed=True) for value in (mean, low, high)]
    return UNKNOWN if UNKNOWN in shown else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def duration(seconds: float | None) -> str:
    """Minutes, as a table sorts them: ``38.1 min``."""
    return UNKNOWN if seconds is None or pd.isna(seconds) else f"{number(seconds / 60)} min"


def text_table(frame: pd.DataFrame, decimals: Mapping[str, int | None]) -> pd.DataFrame:
    """Columns of a frame as text under headings without underscores: numbers with so many decimals, None for text."""
    columns = {
        name.replace("_", " "): [str(value) if digits is None else number(value, digits) for value in frame[name]]
        for name, digits in decimals.items()
    }
    return pd.DataFrame(columns, dtype=object)


def shortened(text: str) -> str:
    """A text with the numbered tasks' names in it made short."""
    return re.sub(r"\btask(\d+)_([^\W_]+)\w*", r"\1 \2", text)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Short names of tasks, each unique: task1590_diplomacy_text_generation is "1590 diplomacy".

    A name of another form loses its underscores and, past 22 characters, its end. Where two would be equal, both stay
    whole.
    """
    short = {name: _short(name) for name in names}
    taken = list(short.values())
    return {name: each if taken.count(each) == 1 else name for name, each in short.items()}


def _short(name: str) -> str:
    match = re.match(r"task(\d+)_([^_]+)", name)
    plain = f"{match[1]} {match[2]}" if match else name.replace("_", " ")
    return plain if len(plain) <= _LONGEST_NAME else plain[: _LONGEST_NAME - 1].rstrip() + "…"
