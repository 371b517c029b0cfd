"""Tasks by their names, or by the numbers that Super-NaturalInstructions' names begin with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from badit.errors import BaditError, nearest


def resolve_names(wanted: Sequence[str], names: Iterable[str], *, field: str = "tasks") -> list[str]:
    """Full names for the `wanted` names and number prefixes, such as "task363" or "363", in their order.

    Raises:
        BaditError: one of them fits no task or several, or is there twice; ``field`` opens the message.
    """
    if isinstance(wanted, str):
        raise BaditError(f"{field}: must be a list of names, such as [{wanted!r:.60}], not one string")
    known = sorted(names)
    resolved = [_resolve_one(str(name), known, field) for name in wanted]
    if not resolved:
        raise BaditError(f"{field}: the list is empty; name at least one task or leave it out")
    if repeated := [name for index, name in enumerate(resolved) if name in resolved[:index]]:
        raise BaditError(f"{field}: {repeated[0]!r:.130} is named twice; name it once")
    return resolved


def _resolve_one(wanted: str, known: list[str], field: str) -> str:
    if wanted in known:
        return wanted
    matches = [name for name in known if _digits(wanted, r"(?:task)?(\d+)") == task_number(name)]
    if _digits(wanted, r"(?:task)?(\d+)") is None or not matches:
        raise BaditError(f"{field}: unknown task {wanted!r:.60}{nearest(wanted, known)}")
    if len(matches) > 1:
        raise BaditError(
            f"{field}: {wanted!r:.60} fits {len(matches)} tasks, such as {matches[0]!r:.130}; give a full name"
        )
    return matches[0]


def task_number(name: str) -> str | None:
    """The number in a name such as "task073_commonsenseqa", without leading zeros; None where there is none."""
    return _digits(name, r"task(\d+)(?:_.*)?")


def _digits(name: str, pattern: str) -> str | None:
    match = re.fullmatch(pattern, name)
    return match[1].lstrip("0") if match else None
