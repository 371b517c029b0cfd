"""Heat maps: a matrix of means, with choices of layers, modules or kinds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from badit.report.charts import ALL, ROW, chart_by_choice, chart_of, name_axis, names_in

MOST_WRITTEN = 20  # rows or columns of a map whose cells have their values
_DARK_INK = "#15171a"
_LIGHT_INK = "#ffffff"


@dataclass(frozen=True)
class Look:
    """How a heat map shows its values.

    Attributes:
        label: what the values are, for the legend.
        rows: the title of the rows; empty without a title.
        columns: the title of the columns; empty without a title.
        middle: the value at the start of the colour scale, or at its middle if ``signed``.
        signed: whether values on the two sides of ``middle`` have different colours.
        least: the least distance from ``middle`` at which the scale ends. It is doubled until the
            scale covers 98 % of the values, so maps of different runs mostly share a scale.
        form: the numbers' d3 format.
    """

    label: str
    rows: str = ""
    columns: str = ""
    middle: float = 0.0
    signed: bool = True
    least: float = 1.0
    form: str = ".2f"


def cells_of(frame: pd.DataFrame, rows: str, columns: str, value: str) -> pd.DataFrame:
    """Returns the frame with its columns renamed to those of a heat map: row, column and value."""
    return frame.rename(columns={rows: "row", columns: "column", value: "value"})


def cells_of_pairs(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Returns the cells of a symmetric matrix: pairs of tasks appear twice."""
    cells = cells_of(frame, "task_a", "task_b", value)
    return pd.concat([cells, cells.rename(columns={"row": "column", "column": "row"})])


def heat_map(
    cells: pd.DataFrame,
    look: Look,
    choices: Sequence[alt.Parameter] = (),
    noise: pd.DataFrame | None = None,
) -> Any:
    """Returns a heat map of the means of ``value`` under the chosen options, the layer first.

    Rows and columns are in the order of their categories, if any. The cells of ``noise`` are
    hatched where all layers and modules are shown together.
    """
    rows = names_in(cells, "row")
    columns = names_in(cells, "column")
    cells = cells.astype({"row": str, "column": str})
    base, values = chart_by_choice(cells, ["row", "column"], choices)
    limit = _limit(values, look)

    # Only short names fit side by side.
    upright = max(map(len, columns.values()), default=0) > 3
    angle = -90 if upright else 0
    base = base.encode(
        alt.X("column:N")
        .title(look.columns or None)
        .scale(domain=list(columns))
        .axis(name_axis(columns, labelAngle=angle, labelLimit=130)),
        alt.Y("row:N").title(look.rows or None).scale(domain=list(rows)).axis(name_axis(rows)),
        tooltip=[
            alt.Tooltip("row:N").title(look.rows or "row"),
            alt.Tooltip("column:N").title(look.columns or "column"),
            alt.Tooltip("value:Q").title(look.label).format(".4f"),
        ],
    )
    chart = _background() + base.mark_rect().encode(
        alt.Color("value:Q")
        .scale(_colour_scale(look))
        .legend(title=look.label, format=look.form, tickCount=3)
    )
    if noise is not None and len(noise):
        chart += _hatching(noise, choices)
    if max(len(rows), len(columns)) <= MOST_WRITTEN:
        chart += _numbers(base, look.form, len(columns))
    chart = chart.add_params(*choices, alt.param(name="limit", value=limit))
    return chart.properties(height=_height(len(rows)))


def _background() -> alt.Chart:
    """Returns the colour of missing values, behind all cells."""
    # Not the style of the chart's view, which charts of several layers do not have.
    return (
        chart_of(pd.DataFrame({"all": [0]}))
        .mark_rect(style="matrix", tooltip=None)
        .encode(x=alt.value(0), x2=alt.value("width"), y=alt.value(0), y2=alt.value("height"))
    )


def share_limits(drawn: Iterable[Any]) -> None:
    """Gives the heat maps of one figure, which are shown side by side, the same colour scale."""
    lists = [getattr(chart, "params", None) for chart in drawn]
    # Tables have no parameters, and Altair marks a chart without any as Undefined.
    parameters = [param for params in lists if isinstance(params, list) for param in params]
    limits = [parameter for parameter in parameters if parameter.name == "limit"]
    for parameter in limits:
        parameter.value = max(other.value for other in limits)


def _limit(values: pd.DataFrame, look: Look) -> float:
    """Returns where the colour scale ends, for all layers together and for single ones."""
    distances = pd.Series(np.ravel(values - look.middle), dtype=float).abs()
    covered = distances.quantile(0.98)
    limit = look.least
    while limit < covered < np.inf:
        limit *= 2
    return limit


def _colour_scale(look: Look) -> alt.Scale:
    end = {"expr": f"{look.middle} + limit"}
    # Values beyond the limit have the colour of the end.
    scale = alt.Scale(clamp=True, interpolate="rgb", domainMax=end)
    if look.signed:
        scale.range = "diverging"
        scale.domainMin = {"expr": f"{look.middle} - limit"}
        scale.domainMid = look.middle
    else:
        scale.range = "heatmap"
        scale.domainMin = look.middle
    return scale


def _hatching(cells: pd.DataFrame, choices: Sequence[alt.Parameter]) -> Any:
    """Returns diagonal lines over the cells, shown if every choice is that of all."""
    places: Any = cells[["row", "column"]].astype(str)
    chart = chart_of(places)
    chosen = " && ".join(f"{parameter.name} === '{ALL}'" for parameter in choices)
    if chosen:
        chart = chart.transform_filter(chosen)
    layers = []
    # From the left or lower edge of a cell to its upper or right edge, in shares of the cell.
    for left, right, low, high in ((0, 0.5, 0.5, 0), (0, 1, 1, 0), (0.5, 1, 1, 0.5)):
        line = chart.mark_rule(style="hatching", tooltip=None).encode(
            alt.X("column:N", bandPosition=left),
            alt.X2("column:N", bandPosition=right),
            alt.Y("row:N", bandPosition=low),
            alt.Y2("row:N", bandPosition=high),
        )
        layers.append(line)
    return alt.layer(*layers)


def _numbers(base: alt.Chart, form: str, columns: int) -> alt.Chart:
    """Returns the numbers of cells that are at least 21 pixels wide, readable on their colour."""
    is_light = "luminance(scale('color', datum.value)) > 0.25"
    opacity: Any = {"expr": f"width / {columns} < 21 ? 0 : 1"}
    size: Any = {"expr": f"width / {columns} < 34 ? 8.5 : 10"}
    # Without the zero before the point, for narrow cells; 10.5 keeps its own.
    text_of_value = f"format(datum.value, '{form}')"
    without_zero = f"replace({text_of_value}, '0.', '.')"
    written = f"abs(datum.value) < 1 ? {without_zero} : {text_of_value}"
    base = base.transform_calculate(written=written)
    text = base.mark_text(fontSize=size, opacity=opacity, tooltip=None)
    return text.encode(
        alt.Text("written:N"),
        color=alt.condition(is_light, alt.value(_DARK_INK), alt.value(_LIGHT_INK)),
    )


def _height(rows: int) -> int:
    if rows > 40:
        # Many rows share 1300 pixels, with at least 4 pixels each.
        return min(rows * 13, max(1300, rows * 4))
    return rows * min(38, max(ROW, 320 // max(1, rows)))
