"""What figures share: their declaration, charts of which the reader chooses one out of many, heat maps and legends.

A run has tens of thousands of values such as the cosines of every layer and module. They are kept as one line of text
for each choice, while what belongs to the same place in every line is written once; the chart looks the chosen line up:

    places    {row, column, …, index}         lines  {key: "3|mlp.gate_proj", values: "0.12,-0.034,,…"}
    value  =  the number after ``index`` commas of the line of layer + "|" + module; nothing where there is none
"""

# pandas' own types make every selection a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import altair as alt
import numpy as np
import pandas as pd

from badit.report.formatting import short_names

ALL = "all"
# Charts with a row for each task or method give it this height, in pixels.
ROW = 23
# What one figure may hold; with more tasks, layers and modules can be chosen but not both.
MOST_VALUES = 150_000
# Heat maps: the height of few, of many and of very many rows, and the width that a number needs, in pixels.
_HIGH_ROW, _LOW_ROW, _MANY_ROWS, _MATRIX_HEIGHT, _NUMBER_WIDTH = 38, 13, 40, 320, 34
# How many letters a row of a legend has room for next to names of tasks on a phone, and on a page wider than _WIDE.
_NARROW_ROW, _WIDE_ROW, _WIDE = 36, 80, 480


@dataclass(frozen=True)
class Figure:
    """A figure or a table of the page.

    Args:
        section: the key of the section that it is in.
        title: its heading.
        table: the name of the frame that it is made from.
        draw: from that frame to an Altair chart, or to a DataFrame of text that is shown as a table; None where there
            is nothing to show. Its docstring is the caption, which says how to read the figure.
        width: the share of the text's width that it takes; "square" suits matrices.
    """

    section: str
    title: str
    table: str
    draw: Callable[[pd.DataFrame], Any]
    width: Literal["full", "half", "square"] = "full"

    @property
    def name(self) -> str:
        """Its name in the page and, exported, its file's: ``gradient_cosines`` draws gradient-cosines."""
        return self.draw.__name__.replace("_", "-")

    @property
    def caption(self) -> str:
        return " ".join((self.draw.__doc__ or "").split())


def choice(name: str, options: Mapping[str, str] | Iterable[str]) -> alt.Parameter:
    """A list to choose from: the values of a column, perhaps with what they are called; the first one is chosen."""
    names = dict(options) if isinstance(options, Mapping) else {option: option for option in options}
    keys, labels = list(names), list(names.values())
    binding = alt.binding_select(options=keys, labels=labels, name=f"{name} ") if len(keys) > 1 else alt.Undefined
    return alt.param(name=name, value=keys[0], bind=binding)


def layer_choice(layers: Iterable[int], all_layers: str = "all layers") -> alt.Parameter:
    """All layers together, then each."""
    names = {str(layer): f"layer {layer}" if layer >= 0 else "outside the layers" for layer in sorted(set(layers))}
    return choice("layer", {ALL: all_layers} | (names if len(names) > 1 else {}))


def module_choice(modules: Iterable[str]) -> alt.Parameter:
    """All modules together, then each."""
    names = {name: name for name in sorted(set(modules))}
    return choice("module", {ALL: "all modules"} | (names if len(names) > 1 else {}))


def with_all(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows, and again under ALL of every column, so that their mean over the column can be chosen."""
    for column in columns:
        text = frame.assign(**{column: frame[column].astype(str)})
        frame = pd.concat([text, text.assign(**{column: ALL})])
    return frame


def chart_of(frame: pd.DataFrame) -> alt.Chart:
    """A chart of the frame's rows."""
    return alt.Chart(alt.InlineData(values=frame.astype(object).where(frame.notna(), None).to_dict("records")))


def values_by_choice(frame: pd.DataFrame, places: Sequence[str], choices: Sequence[alt.Parameter]) -> pd.DataFrame:
    """Means of the column ``value``: a row for each combination of options, joined by "|", a column for each place."""
    keys = pd.Series("", index=frame.index, dtype=str)
    for i, option in enumerate(choices):
        keys = keys + ("|" if i else "") + frame[option.name].astype(str)
    found = frame.assign(key=keys).pivot_table("value", "key", list(places), sort=False, observed=True)
    if found.size > MOST_VALUES:
        found = found.loc[[ALL in key.split("|") for key in found.index]]
    return found


def chosen(values: pd.DataFrame, choices: Sequence[alt.Parameter], *, symmetric: bool = False) -> alt.Chart:
    """A chart with a row for each place, which has its ``value`` under the chosen options; unknown values are left out.

    Args:
        values: from :func:`values_by_choice`.
        choices: to be added to the finished chart with ``add_params``.
        symmetric: whether a place's value is also that of the place with row and column exchanged.
    """
    places = values.columns.to_frame(index=False).assign(index=range(values.shape[1]))
    if symmetric:
        exchanged = {"row": "column", "column": "row", "row_full": "column_full", "column_full": "row_full"}
        places = pd.concat([places, places.rename(columns=exchanged)])
    lines = [
        {"key": key, "values": ",".join("" if np.isnan(value) else f"{value:.4g}" for value in row)}
        for key, row in zip(values.index, values.to_numpy(), strict=True)
    ]
    key = " + '|' + ".join(option.name for option in choices) or "''"
    return (
        chart_of(places)
        .transform_calculate(key=key)
        .transform_lookup(
            lookup="key", from_=alt.LookupData(data=alt.InlineData(values=lines), key="key", fields=["values"])
        )
        .transform_filter("isString(datum.values)")
        .transform_calculate(value="toNumber(split(datum.values, ',')[datum.index])")
        .transform_filter("isValid(datum.value)")
    )


def heat_map(
    frame: pd.DataFrame,
    rows: str,
    columns: str,
    label: str,
    *,
    choices: Sequence[alt.Parameter] = (),
    row_title: str = "",
    column_title: str = "",
    signed: bool = True,
    middle: float = 0.0,
    limit: float | None = None,
    form: str = ".2f",
    written: bool = False,
    symmetric: bool = False,
) -> Any:
    """A heat map of the column ``value``, means over what is not chosen.

    Args:
        frame: values, with a column for each choice.
        rows: the column that names the row; categories, where it has any, give the order.
        columns: the same for columns.
        label: what the value is, with its unit.
        choices: what is chosen by; the layer first.
        row_title: title of the rows.
        column_title: title of the columns.
        signed: whether values have a colour on each side of the middle.
        middle: the neutral value.
        limit: the distance from the middle that has the strongest colour, so that the same colour means the same in
            every layer; by default what nearly all values stay within.
        form: how numbers are written, as d3 knows it.
        written: write the number into the cell, too.
        symmetric: whether rows and columns name the two of an unordered pair.
    """
    both = [rows, columns]
    row_names, column_names = (names_in(frame, *(both if symmetric else [side])) for side in both)
    named = frame.assign(
        row=frame[rows].astype(str).map(row_names),
        row_full=frame[rows].astype(str),
        column=frame[columns].astype(str).map(column_names),
        column_full=frame[columns].astype(str),
    )
    values = values_by_choice(named, ["row", "row_full", "column", "column_full"], choices)
    of_all = np.array([key.split("|")[0] == ALL for key in values.index], dtype=bool)
    limits = [limit or limit_of(part.to_numpy(), middle) for part in (values[~of_all], values[of_all]) if len(part)]
    upright = max(map(len, column_names.values()), default=0) > 3
    below = alt.Axis(labelAngle=-90 if upright else 0, labelLimit=130, labelOverlap=False)
    base = chosen(values, choices, symmetric=symmetric).encode(
        x=alt.X("column:N", title=column_title or None, scale=_domain(column_names), axis=below),
        y=alt.Y("row:N", title=row_title or None, scale=_domain(row_names), axis=alt.Axis(labelOverlap=False)),
        tooltip=[
            alt.Tooltip("row_full:N", title=row_title or "row"),
            alt.Tooltip("column_full:N", title=column_title or "column"),
            alt.Tooltip("value:Q", title=label, format=".4f"),
        ],
    )
    # All layers together often vary less than one, and have a limit of their own.
    bound = repr(limits[0]) if limits else "1"
    if len(limits) > 1 and choices:
        bound = f"({choices[0].name} === '{ALL}' ? {limits[1]!r} : {limits[0]!r})"
    scale = alt.Scale(
        domainMin={"expr": f"{middle!r} - {bound}"} if signed else middle,
        domainMid=middle if signed else alt.Undefined,
        domainMax={"expr": f"{middle!r} + {bound}"},
        clamp=True,
        interpolate="rgb",
        range="diverging" if signed else "heatmap",
    )
    colour = alt.Color("value:Q", scale=scale, legend=alt.Legend(title=label, format=form, tickCount=4))
    chart = base.mark_rect().encode(color=colour)
    if written:
        # Where cells are wide enough for numbers, in the ink that stands out from the cell's colour.
        opacity = {"expr": f"width / {len(column_names)} < {_NUMBER_WIDTH} ? 0 : 1"}
        on_light = "luminance(scale('color', datum.value)) > 0.25"
        chart += base.mark_text(fontSize=10, opacity=opacity, tooltip=None).encode(
            text=alt.Text("value:Q", format=form),
            color=alt.condition(on_light, alt.value("#15171a"), alt.value("#ffffff")),
        )
    count = len(row_names)
    row_height = _LOW_ROW if count > _MANY_ROWS else min(_HIGH_ROW, max(ROW, _MATRIX_HEIGHT // max(1, count)))
    view = alt.ViewBackground(style="matrix")
    return chart.add_params(*choices).properties(width="container", height=count * row_height, view=view)


def names_in(frame: pd.DataFrame, *columns: str) -> dict[str, str]:
    """The values of columns with their short names, in the order of their categories, else of their appearance."""
    found: dict[str, None] = {}
    for column in columns:
        values = frame[column]
        found |= dict.fromkeys(map(str, values.cat.categories if values.dtype == "category" else values.unique()))
    return short_names(found)


def limit_of(values: Any, middle: float = 0.0, least: float = 0.01) -> float:
    """The distance from the middle that all but the outermost 2 % of values stay within, rounded up to two digits."""
    distances = np.abs(np.asarray(values, dtype=float).ravel() - middle)
    distances = np.sort(distances[np.isfinite(distances)])
    limit = max(float(distances[math.ceil(0.98 * len(distances)) - 1]) if len(distances) else 0.0, least)
    step = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return round(math.ceil(limit / step - 1e-9) * step, 10)


def legend(names: Iterable[str], *, room: int = _NARROW_ROW, **options: Any) -> alt.Legend | None:
    """A legend without a title whose rows fit the page; None where there is nothing to tell apart.

    Args:
        names: what the legend names.
        room: how many letters a row may have on a phone, or in a figure of half a page's width.
        options: more of Vega-Lite's properties.
    """
    different = list(dict.fromkeys(names))
    if len(different) < 2:
        return None
    longest = max(map(len, different)) + 4  # with its symbol
    # The page's room and not the plot's width, which is only known once the legend has its place. An exported figure
    # has no page, and is narrow.
    columns = f"containerSize()[0] >= {_WIDE} ? {max(1, _WIDE_ROW // longest)} : {max(1, room // longest)}"
    return alt.Legend(title=None, columns=cast(Any, {"expr": columns}), **options)


def _domain(names: Mapping[str, str]) -> alt.Scale:
    return alt.Scale(domain=list(names.values()))
