"""Heat maps: a matrix of means, with choices of layers, modules or kinds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from badit.report.charts import ALL, ROW, chart_by_choice, name_axis, names_in

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
        limit: the distance from ``middle`` at which the scale ends; None covers 98 % of the values.
        form: the numbers' d3 format.
        written: whether the cells contain their numbers.
    """

    label: str
    rows: str = ""
    columns: str = ""
    middle: float = 0.0
    signed: bool = True
    limit: float | None = None
    form: str = ".2f"
    written: bool = False


def cells_of(frame: pd.DataFrame, rows: str, columns: str, value: str) -> pd.DataFrame:
    """Returns the frame with its columns renamed to those of a heat map: row, column and value."""
    return frame.rename(columns={rows: "row", columns: "column", value: "value"})


def cells_of_pairs(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Returns the cells of a symmetric matrix: pairs of tasks appear twice."""
    cells = cells_of(frame, "task_a", "task_b", value)
    return pd.concat([cells, cells.rename(columns={"row": "column", "column": "row"})])


def heat_map(cells: pd.DataFrame, look: Look, choices: Sequence[alt.Parameter] = ()) -> Any:
    """Returns a heat map of the means of ``value`` under the chosen options, the layer first.

    Rows and columns are in the order of their categories, if any.
    """
    rows = names_in(cells, "row")
    columns = names_in(cells, "column")
    cells = cells.astype({"row": str, "column": str})
    base, values = chart_by_choice(cells, ["row", "column"], choices)
    # The layer is the first option in the keys of the columns.
    is_mean = np.array([key.split("|")[0] == ALL for key in values], dtype=bool)
    limits = [_limit(values.loc[:, is_mean], look), _limit(values.loc[:, ~is_mean], look)]
    # An expression of the chart, because the reader changes the choice on the page.
    limit = "limits[1]"
    if is_mean.any():
        limit = f"limits[{choices[0].name} === '{ALL}' ? 0 : 1]"

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
    chart = base.mark_rect().encode(
        alt.Color("value:Q")
        .scale(_colour_scale(look, limit))
        .legend(title=look.label, format=look.form, tickCount=4)
    )
    if look.written:
        chart += _numbers(base, look.form, len(columns))
    chart = chart.add_params(*choices, alt.param(name="limits", value=limits))
    return chart.properties(height=_height(len(rows)), view=alt.ViewBackground(style="matrix"))


def share_limits(drawn: Iterable[Any]) -> None:
    """Gives the heat maps of one figure, which are shown side by side, the same colour scale."""
    lists = [getattr(chart, "params", None) for chart in drawn]
    # Tables have no parameters, and Altair marks a chart without any as Undefined.
    parameters = [param for params in lists if isinstance(params, list) for param in params]
    limits = [parameter for parameter in parameters if parameter.name == "limits"]
    for parameter in limits:
        parameter.value = np.max([other.value for other in limits], axis=0).tolist()


def _limit(values: pd.DataFrame, look: Look) -> float:
    """Returns where the colour scale ends.

    The mean over all layers often varies less than single layers, so each has its own limit.
    """
    if look.limit is not None:
        return look.limit
    distances = pd.Series(np.ravel(values - look.middle), dtype=float).abs()
    # At least 0.01, so that equal values still give a scale.
    return float(f"{max(0.01, distances.quantile(0.98)):.2g}")


def _colour_scale(look: Look, limit: str) -> alt.Scale:
    end = {"expr": f"{look.middle} + {limit}"}
    # Values beyond the limit have the colour of the end.
    scale = alt.Scale(clamp=True, interpolate="rgb", domainMax=end)
    if look.signed:
        scale.range = "diverging"
        scale.domainMin = {"expr": f"{look.middle} - {limit}"}
        scale.domainMid = look.middle
    else:
        scale.range = "heatmap"
        scale.domainMin = look.middle
    return scale


def _numbers(base: alt.Chart, form: str, columns: int) -> alt.Chart:
    """Returns the numbers of cells that are at least 34 pixels wide, readable on their colour."""
    is_light = "luminance(scale('color', datum.value)) > 0.25"
    opacity: Any = {"expr": f"width / {columns} < 34 ? 0 : 1"}
    text = base.mark_text(fontSize=10, opacity=opacity, tooltip=None)
    return text.encode(
        alt.Text("value:Q").format(form),
        color=alt.condition(is_light, alt.value(_DARK_INK), alt.value(_LIGHT_INK)),
    )


def _height(rows: int) -> int:
    if rows > 40:
        # Many rows share 1300 pixels, with at least 4 pixels each.
        return min(rows * 13, max(1300, rows * 4))
    return rows * min(38, max(ROW, 320 // max(1, rows)))
