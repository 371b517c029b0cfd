"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Set[int] = frozenset()) -> str:
    """Aligned columns under a header and a rule; the columns in ``right`` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Rouge-L and exact match by task, a pair of columns for each entry of ``scores``, and the means below."""
    names = list(scores)
    header = ["task", *(f"{name} {metric}" for name in names for metric in ("Rouge-L", "EM"))]
    tasks = next(iter(scores.values()))["tasks"]
    rows = [[task, *(_cells(scores[name]["tasks"][task] for name in names))] for task in tasks]
    rows.append(["mean over tasks", *_cells(scores[name] for name in names)])
    return table(header, rows, right=set(range(1, len(header))))


def _cells(entries: Any) -> list[str]:
    return [f"{entry[metric]:.1f}" for entry in entries for metric in ("rouge_l", "exact_match")]
