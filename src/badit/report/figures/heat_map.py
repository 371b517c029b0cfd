"""Heat maps: of tasks against tasks, tasks against experts, experts against experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from badit.report.figures.choice import ALL, ROW, Choice, chosen, with_choices

# In pixels: the height of few, of many and of very many rows, and the width that a number needs.
_HIGH_ROW, _LOW_ROW, _MANY_ROWS = 38, 13, 40
_MATRIX_HEIGHT = 320
_NUMBER_WIDTH = 34


@dataclass(frozen=True)
class Axis:
    """The rows or the columns: their names as they are shown, and in full."""

    title: str | None
    names: Sequence[str]
    full: Sequence[str] = ()

    def at(self, position: int) -> tuple[str, str]:
        return self.names[position], (self.full or self.names)[position]


@dataclass(frozen=True)
class Shade:
    """How a value becomes a colour.

    Args:
        title: what the value is, with its unit.
        limit: the distance from ``middle`` that has the strongest colour, so that the same colour means the same in
            every layer.
        limit_of_all: the same for all layers together, which often vary less.
        kind: "signed" values have a colour each side of the middle.
        written: put the number into the cell, too.
    """

    title: str
    limit: float
    limit_of_all: float | None = None
    kind: Literal["signed", "magnitude"] = "signed"
    middle: float = 0.0
    format: str = ".2f"
    written: bool = False


def heat_map(
    cells: Iterable[tuple[int, int, int]],
    lists: Mapping[tuple[str, ...], Sequence[float | None]],
    *,
    rows: Axis,
    columns: Axis,
    shade: Shade,
    choices: Sequence[Choice] = (),
) -> Any:
    """A heat map of the chosen list of values.

    Args:
        cells: (row, column, index): which value of a list belongs where.
        lists: see :func:`badit.report.figures.choice.chosen`; None leaves a cell empty.
        rows: the rows, from the top.
        columns: the columns.
        shade: the colours.
        choices: what is chosen by.
    """
    base = chosen([_place(*cell, rows, columns) for cell in cells], lists, choices).encode(
        x=alt.X("column:N", title=columns.title, scale=alt.Scale(domain=list(columns.names)), axis=_below(columns)),
        y=alt.Y("row:N", title=rows.title, scale=alt.Scale(domain=list(rows.names)), axis=alt.Axis(labelOverlap=False)),
        tooltip=[
            alt.Tooltip("row_full:N", title=rows.title or "row"),
            alt.Tooltip("column_full:N", title=columns.title or "column"),
            alt.Tooltip("value:Q", title=shade.title, format=".4f"),
        ],
    )
    chart = base.mark_rect().encode(color=_colour(shade, choices))
    if shade.written:
        chart += _numbers(base, shade, len(columns.names))
    height = len(rows.names) * _row_height(len(rows.names))
    view = alt.ViewBackground(style="matrix")
    return with_choices(chart, choices).properties(width="container", height=height, view=view)


def limit_of(values: Iterable[float | None], *, middle: float = 0.0, least: float = 0.01) -> float:
    """The distance from the middle that all but the outermost 2 % of values stay within, rounded up to two digits."""
    distances = sorted(abs(value - middle) for value in values if value is not None)
    limit = max(distances[math.ceil(0.98 * len(distances)) - 1] if distances else 0.0, least)
    step = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return round(math.ceil(limit / step - 1e-9) * step, 10)


def pair_index(size: int) -> dict[tuple[int, int], int]:
    """The place of each pair a < b among all of them, row by row."""
    pairs = ((a, b) for a in range(size) for b in range(a + 1, size))
    return {pair: i for i, pair in enumerate(pairs)}


def pair_cells(size: int) -> list[tuple[int, int, int]]:
    """Both cells of every pair: a symmetric matrix without its diagonal."""
    return [cell for (a, b), i in pair_index(size).items() for cell in ((a, b, i), (b, a, i))]


def grid_cells(rows: int, columns: int) -> list[tuple[int, int, int]]:
    return [(i, j, i * columns + j) for i in range(rows) for j in range(columns)]


def _place(row: int, column: int, index: int, rows: Axis, columns: Axis) -> dict[str, Any]:
    (row_name, row_full), (column_name, column_full) = rows.at(row), columns.at(column)
    return {
        "index": index,
        "row": row_name,
        "row_full": row_full,
        "column": column_name,
        "column_full": column_full,
    }


def _row_height(rows: int) -> int:
    if rows > _MANY_ROWS:
        return _LOW_ROW
    return min(_HIGH_ROW, max(ROW, _MATRIX_HEIGHT // max(1, rows)))


def _below(columns: Axis) -> alt.Axis:
    """Names of more than a few letters are set upright."""
    upright = max(map(len, columns.names), default=0) > 3
    return alt.Axis(labelAngle=-90 if upright else 0, labelLimit=130, labelOverlap=False)


def _colour(shade: Shade, choices: Sequence[Choice]) -> alt.Color:
    limit = repr(shade.limit)
    if shade.limit_of_all is not None and choices:
        limit = f"({choices[0].name} === '{ALL}' ? {shade.limit_of_all!r} : {limit})"
    signed = shade.kind == "signed"
    scale = alt.Scale(
        domainMin={"expr": f"{shade.middle!r} - {limit}"} if signed else shade.middle,
        domainMid=shade.middle if signed else alt.Undefined,
        domainMax={"expr": f"{shade.middle!r} + {limit}"},
        clamp=True,
        interpolate="rgb",
        range="diverging" if signed else "heatmap",
    )
    return alt.Color("value:Q", scale=scale, legend=alt.Legend(title=shade.title, format=shade.format, tickCount=4))


def _numbers(base: alt.Chart, shade: Shade, columns: int) -> alt.Chart:
    """The values, where cells are wide enough for them, in the ink that stands out from the cell's colour."""
    opacity = {"expr": f"width / {columns} < {_NUMBER_WIDTH} ? 0 : 1"}
    on_light = "luminance(scale('color', datum.value)) > 0.25"
    return base.mark_text(fontSize=10, opacity=opacity, tooltip=None).encode(
        text=alt.Text("value:Q", format=shade.format),
        color=alt.condition(on_light, alt.value("#15171a"), alt.value("#ffffff")),
    )
