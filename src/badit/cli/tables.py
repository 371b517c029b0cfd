"""Tables: numbers once, and their forms for the terminal, for a paper and for other programs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from badit.errors import one_line

if TYPE_CHECKING:
    from badit.evaluation.results import Scores, TaskScores

UNKNOWN = "–"
# Of a comparison's cell that is not in the table; they are the last columns of its CSV form.
OMITTED_FIELDS = ("method", "seed", "order", "learning_rate", "status", "error")

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_|<>\[\]])")
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "−": "$-$",
        "×": r"$\times$",
        "–": "--",
    }
)


@dataclass(frozen=True)
class Column:
    """A column: its CSV name, its header elsewhere, and how a value is shown there.

    CSV has the attributes `parts` of a value in columns of their own.
    """

    name: str
    header: str
    show: Callable[[Any], str] = str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Values by row and column, the first column naming the row; None is a value that is not known.

    Attributes:
        best: (row, column) of the values to make bold.
        notes: lines below the table.
        omitted: cells of the comparison that the values do not cover, each with the keys OMITTED_FIELDS.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    best: Set[tuple[int, int]]
    notes: Sequence[str]
    omitted: Sequence[Mapping[str, Any]]

    @property
    def header(self) -> list[str]:
        return [one_line(column.header) for column in self.columns]

    def shown(self, escape: Callable[[str], str] = str, bold: Callable[[str], str] = str) -> list[list[str]]:
        """The rows as text."""
        return [
            [
                (bold if (i, j) in self.best else str)(
                    escape(UNKNOWN if value is None else one_line(column.show(value)))
                )
                for j, (column, value) in enumerate(zip(self.columns, row, strict=True))
            ]
            for i, row in enumerate(self.rows)
        ]

    def footer(self) -> list[str]:
        """The notes and the omitted cells, one line each."""
        return [one_line(line) for line in (*self.notes, *(f"not in the table: {_described(c)}" for c in self.omitted))]


def text(content: Table) -> str:
    body = table(content.header, content.shown(), right=set(range(1, len(content.columns))))
    return "\n".join([body, "", *content.footer()])


def markdown(content: Table) -> str:
    def escape(value: str) -> str:
        return _MARKDOWN_SPECIAL.sub(r"\\\1", value)

    rule = ["---", *("---:" for _ in content.columns[1:])]
    rows = [[escape(title) for title in content.header], rule, *content.shown(escape, lambda value: f"**{value}**")]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {escape(line)}" for line in content.footer())])


def latex(content: Table) -> str:
    """A booktabs tabular; the lines below the table become comments."""

    def line(row: Sequence[str]) -> str:
        return " & ".join(row) + r" \\"

    def escape(value: str) -> str:
        return value.translate(_LATEX)

    rows = content.shown(escape, lambda value: rf"\textbf{{{value}}}")
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(content.columns) - 1)}}}",
            r"\toprule",
            line([escape(title) for title in content.header]),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(f"% {note}" for note in content.footer()),
        ]
    )


def comma_separated(content: Table) -> str:
    """CSV in full precision; a cell that was left out is a row of its own, with its status."""
    rows: list[dict[str, Any]] = []
    for values in content.rows:
        row: dict[str, Any] = {}
        for column, value in zip(content.columns, values, strict=True):
            parts = {f"{column.name}_{part}": getattr(value, part, None) for part in column.parts}
            row |= parts or {column.name: value}
        rows.append(row)
    names = dict.fromkeys([*(name for row in rows[:1] for name in row), *OMITTED_FIELDS])
    file = io.StringIO()
    writer = csv.DictWriter(file, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, *content.omitted])
    return file.getvalue().removesuffix("\n")


FORMATS: dict[str, Callable[[Table], str]] = {
    "text": text,
    "markdown": markdown,
    "latex": latex,
    "csv": comma_separated,
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Set[int] = frozenset()) -> str:
    """Aligned columns under a header and a rule; the columns in ``right`` are right-aligned."""
    header, *rows = [[*map(one_line, line)] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def score_table(scores: Mapping[str, Scores]) -> str:
    """Rouge-L and exact match by task, a pair of columns for each entry of ``scores``, and the means below."""
    names = list(scores)
    header = ["task", *(f"{name} {metric}" for name in names for metric in ("Rouge-L", "EM"))]
    tasks = next(iter(scores.values())).tasks
    rows = [[task, *(_cells(scores[name].tasks[task] for name in names))] for task in tasks]
    rows.append(["mean over tasks", *_cells(scores[name] for name in names)])
    return table(header, rows, right=set(range(1, len(header))))


def _cells(entries: Iterable[Scores | TaskScores]) -> list[str]:
    return [f"{score:.1f}" for entry in entries for score in (entry.rouge_l, entry.exact_match)]


def _described(cell: Mapping[str, Any]) -> str:
    """``lora, seed 0, learning rate 0.002: failed (out of memory)``."""
    values = {name: cell[name] for name in OMITTED_FIELDS[1:4] if cell[name] is not None}
    place = ", ".join([cell["method"], *(f"{name.replace('_', ' ')} {value}" for name, value in values.items())])
    reason = " ".join((cell["error"] or "").split())
    return f"{place}: {cell['status']}" + (f" ({reason:.100})" if reason else "")
