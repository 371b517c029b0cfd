"""What figures share: choices, heat maps of one choice out of many, legends, and the forms of numbers and names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import altair as alt
import numpy as np
import pandas as pd

from badit.render import number

ALL = "all"
# Charts with a row for each task or method give it this height, in pixels.
ROW = 23
# What one figure may hold; with more tasks, layers and modules can be chosen but not both.
MOST_VALUES = 150_000


def text_table(frame: pd.DataFrame, forms: Mapping[str, str]) -> pd.DataFrame:
    """Columns of a frame as text under headings without underscores: numbers by their form, text where it is empty."""
    columns = {
        name.replace("_", " "): [number(value, form) if form else str(value) for value in frame[name]]
        for name, form in forms.items()
    }
    return pd.DataFrame(columns, dtype=object)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Short names of tasks: task1590_diplomacy_text_generation is "1590 diplomacy"; whole where two would be equal."""
    plain = {name: re.sub(r"^task(\d+)_([^_]+).*", r"\1 \2", name, flags=re.DOTALL).replace("_", " ") for name in names}
    short = {name: text if len(text) <= 22 else text[:21].rstrip() + "…" for name, text in plain.items()}
    taken = list(short.values())
    return {name: each if taken.count(each) == 1 else name for name, each in short.items()}


def names_in(frame: pd.DataFrame, column: str) -> dict[str, str]:
    """The values of a column with their short names, in the order of categories, of numbers, or of appearance."""
    values = frame[column]
    known = values.cat.categories if values.dtype == "category" else values.unique()
    return short_names(map(str, sorted(known) if pd.api.types.is_numeric_dtype(values) else known))


def name_axis(names: Mapping[str, str], **options: Any) -> alt.Axis:
    """An axis that shows the short names of what has the full ones in the data."""
    return alt.Axis(labelExpr=f"({json.dumps(names)})[datum.label]", labelOverlap=False, **options)


def choice(name: str, options: Mapping[str, str] | Iterable[str]) -> alt.Parameter:
    """A list to choose from: the values of a column, perhaps with what they are called; the first one is chosen."""
    keys = list(dict.fromkeys(options))
    labels = list(options.values()) if isinstance(options, Mapping) else keys
    binding = alt.binding_select(options=keys, labels=labels, name=f"{name} ") if len(keys) > 1 else alt.Undefined
    return alt.param(name=name, value=keys[0], bind=binding)


def all_or_one(name: str, values: Iterable[Any], together: str = "") -> alt.Parameter:
    """All values of a column together, then each."""
    each = {str(value): f"layer {value}" if name == "layer" else value for value in sorted(set(values))}
    return choice(name, {ALL: together or f"all {name}s"} | (each if len(each) > 1 else {}))


def with_all(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows, and again under ALL of every column, where there are none, so that their mean can be chosen."""
    for column in columns:
        if ALL not in set(frame[column]):
            text = frame.assign(**{column: frame[column].astype(str)})
            frame = pd.concat([text, text.assign(**{column: ALL})])
    return frame


def chart_of(frame: pd.DataFrame, chosen: str = "") -> alt.Chart:
    """A chart of the frame's rows; of those with the value that is ``chosen`` for a column of that name."""
    chart = alt.Chart(alt.InlineData(values=frame.astype(object).where(frame.notna(), None).to_dict("records")))
    return chart.transform_filter(f"datum.{chosen} === {chosen}") if chosen else chart


def chart_by_choice(
    frame: pd.DataFrame, places: Sequence[str], choices: Sequence[alt.Parameter]
) -> tuple[alt.Chart, pd.DataFrame]:
    """A chart of the places that have a ``value`` under the chosen options, the mean of the column of this name.

    Also these means: a row for each place, a column for each combination of options, joined by "|".
    """
    frame = with_all(frame, *(str(option.name) for option in choices if getattr(option.param, "value", None) == ALL))
    keys = pd.Series("", index=frame.index)
    for option in choices:
        keys = keys + "|" + frame[option.name].astype(str)
    values = frame.assign(key=keys.str[1:]).pivot_table("value", list(places), "key", sort=False, observed=True)
    if values.size > MOST_VALUES:
        values = values.loc[:, [ALL in key.split("|") for key in values]]
    # One text per place, not a column per key, whose lookup by name would need eval, which the page's policy refuses.
    texts = [",".join("" if pd.isna(x) else f"{x:.4g}" for x in row) for row in values.to_numpy()]
    key = f"indexof({json.dumps([*map(str, values)])},join([{','.join(str(option.name) for option in choices)}],'|'))"
    chart = chart_of(values.index.to_frame(index=False).assign(values=texts))
    chart = chart.transform_calculate(value=f"toNumber(split(datum.values,',')[{key}])")
    return chart.transform_filter("isValid(datum.value)"), values


def heat_map(
    frame: pd.DataFrame,
    rows: str,
    columns: str,
    value: str,
    label: str,
    *,
    choices: Sequence[alt.Parameter] = (),
    titles: tuple[str, str] = ("", ""),
    signed: bool = True,
    middle: float = 0.0,
    limit: float | None = None,
    form: str = ".2f",
    written: bool = False,
) -> Any:
    """A heat map of a column, means over what is not chosen (``choices``, the layer first).

    Args:
        rows, columns: columns of the frame, whose categories, where there are any, give the order. Pairs of tasks are
            shown in both orders.
        label: what the values are, with the unit; ``form`` is d3's.
        limit: how far from the ``middle`` values have colours of their own (default: nearly all), on each side if
            ``signed``.
        written: whether cells have their numbers.
    """
    frame = frame.rename(columns={rows: "row", columns: "column", value: "value"})
    if (rows, columns) == ("task_a", "task_b"):
        frame = pd.concat([frame, frame.rename(columns={"row": "column", "column": "row"})])
    row_names, column_names = names_in(frame, "row"), names_in(frame, "column")
    base, values = chart_by_choice(frame.astype({"row": str, "column": str}), ["row", "column"], choices)
    # All layers together often vary less than one, and have their own limit.
    of_all = np.array([key.split("|")[0] == ALL for key in values], dtype=bool)
    limits = [limit or limit_of(values.loc[:, part].to_numpy(), middle) for part in (of_all, ~of_all)]
    bound = f"limits[{choices[0].name} === '{ALL}' ? 0 : 1]" if of_all.any() else "limits[1]"
    upright = max(map(len, column_names.values()), default=0) > 3
    below = name_axis(column_names, labelAngle=-90 if upright else 0, labelLimit=130)
    base = base.encode(
        x=alt.X("column:N", title=titles[1] or None, scale=alt.Scale(domain=list(column_names)), axis=below),
        y=alt.Y("row:N", title=titles[0] or None, scale=alt.Scale(domain=list(row_names)), axis=name_axis(row_names)),
        tooltip=[
            alt.Tooltip("row:N", title=titles[0] or "row"),
            alt.Tooltip("column:N", title=titles[1] or "column"),
            alt.Tooltip("value:Q", title=label, format=".4f"),
        ],
    )
    ends: dict[str, Any] = {"domainMin": middle, "domainMax": {"expr": f"{middle} + {bound}"}, "range": "heatmap"}
    if signed:
        ends |= {"domainMin": {"expr": f"{middle} - {bound}"}, "domainMid": middle, "range": "diverging"}
    scale = alt.Scale(**ends, clamp=True, interpolate="rgb")
    colour = alt.Color("value:Q", scale=scale, legend=alt.Legend(title=label, format=form, tickCount=4))
    chart = base.mark_rect().encode(color=colour)
    if written:
        # Where cells are at least 34 pixels wide, in the ink that stands out from the cell's colour.
        opacity = {"expr": f"width / {len(column_names)} < 34 ? 0 : 1"}
        light = "luminance(scale('color', datum.value)) > 0.25"
        ink = alt.condition(light, alt.value("#15171a"), alt.value("#ffffff"))
        text = base.mark_text(fontSize=10, opacity=opacity, tooltip=None)
        chart += text.encode(text=alt.Text("value:Q", format=form), color=ink)
    row = 13 if len(row_names) > 40 else min(38, max(ROW, 320 // max(1, len(row_names))))
    view = alt.ViewBackground(style="matrix")
    chart = chart.add_params(*choices, alt.param(name="limits", value=limits))
    return chart.properties(height=len(row_names) * row, view=view)


def share_limits(drawn: Iterable[Any]) -> None:
    """Gives the heat maps of one figure, which are side by side, one colour scale."""
    of_charts = [each.params for each in drawn if isinstance(getattr(each, "params", None), list)]
    limits = [param for params in of_charts for param in params if param.name == "limits"]
    for param in limits:
        param.value = [max(each) for each in zip(*(other.value for other in limits), strict=True)]


def limit_of(values: np.ndarray, middle: float) -> float:
    """The distance from the middle that all but the outermost 2 % of values stay within, to two digits."""
    distances = np.abs(values[np.isfinite(values)] - middle)
    return float(f"{max(0.01, np.quantile(distances, 0.98) if len(distances) else 0):.2g}")


def legend(names: Iterable[str], **options: Any) -> alt.Legend | None:
    """A legend without a title whose rows fit the page; None where there is nothing to tell apart."""
    different = list(dict.fromkeys(names))
    if len(different) < 2:
        return None
    longest = max(map(len, different)) + 4  # letters, with the symbol
    # A page has room for 80 letters in a row, a phone and an exported figure, which has no container, for 36.
    columns = f"containerSize()[0] >= 480 ? {max(1, 80 // longest)} : {max(1, 36 // longest)}"
    return alt.Legend(title=None, columns=cast(Any, {"expr": columns}), **options)
