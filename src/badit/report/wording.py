"""Numbers and names as the page shows them: a true minus sign, few digits, short names for long tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

UNKNOWN = "–"
_LONGEST = 22


def number(value: float | None, digits: int = 1, *, signed: bool = False, unit: str = "") -> str:
    """``number(-0.25, 2)`` is "−0.25"; what rounds to zero has no sign; an unknown number is a dash."""
    if value is None:
        return UNKNOWN
    return f"{value:{'+' if signed else '-'}z.{digits}f}".replace("-", "−") + unit


def percent(share: float | None, digits: int = 0) -> str:
    return UNKNOWN if share is None else number(100 * share, digits, unit="\u00a0%")


def whole(value: float | None) -> str:
    """A count with its thousands apart."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``counted(2, "task")`` is "2 tasks"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(parts: Iterable[str]) -> str:
    """``a, b and c``."""
    *head, last = list(parts) or [""]
    return f"{', '.join(head)} and {last}" if head else last


class TaskNames(Mapping[str, str]):
    """Short names of tasks, each its own: task1590_diplomacy_text_generation is "1590 diplomacy".

    A name of another form loses its underscores and, past 22 characters, its end. Where two would come out alike, both
    stay whole.
    """

    def __init__(self, names: Iterable[str]) -> None:
        full = list(dict.fromkeys(names))
        short = {name: _short(name) for name in full}
        taken = list(short.values())
        self._short = {name: each if taken.count(each) == 1 else name for name, each in short.items()}

    def __getitem__(self, name: str) -> str:
        return self._short[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._short)

    def __len__(self) -> int:
        return len(self._short)

    def within(self, text: str) -> str:
        """The text with each task's full name in it replaced by its short one."""
        for name in sorted(self._short, key=len, reverse=True):
            if name in text and "_" in name:
                text = text.replace(name, self._short[name])
        return text


def _short(name: str) -> str:
    match = re.match(r"task(\d+)_([^_]+)", name)
    plain = f"{match[1]} {match[2]}" if match else name.replace("_", " ")
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1].rstrip() + "…"
