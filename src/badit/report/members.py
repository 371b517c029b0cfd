"""The runs of a comparison that count, as far as their folders are still there."""

from __future__ import annotations

from dataclasses import dataclass

from badit.report.sources import Source


@dataclass(frozen=True)
class Member:
    """A run, and the method that it is one of."""

    method: str
    run: Source


def members(source: Source) -> list[Member]:
    """The run itself, or a comparison's scored runs in the order of its methods."""
    from badit.compare import Cell

    if source.results is None:
        return [Member(source.label, source)]
    found = []
    for method in source.results.methods:
        for cell, _ in source.results.scored(method):
            place = Cell(method, cell.learning_rate, cell.seed, cell.order).path
            if (source.path / place).is_dir():
                found.append(Member(method, Source(label=str(place), path=source.path / place)))
    return found


def first_members(source: Source) -> list[Member]:
    """One run of each method."""
    by_method: dict[str, Member] = {}
    for member in members(source):
        by_method.setdefault(member.method, member)
    return list(by_method.values())
