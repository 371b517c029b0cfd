"""Parts shared by figures: drop-down choices, heat maps with choices, legends, and formats of numbers and names."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import altair as alt
import numpy as np
import pandas as pd

from badit.support.text import number

ALL = "all"
ROW = 23  # height in pixels of a row for a task or a method
MOST_VALUES = 150_000  # of a figure; above it, a layer or a module can be chosen (if all can be), but not both


def as_text(frame: pd.DataFrame, forms: Mapping[str, str]) -> pd.DataFrame:
    """Returns columns of a frame as text, with headings without underscores; an empty form means a text column."""
    columns = {
        name.replace("_", " "): [
            number(value, form) if form else str(value) for value in frame[name]
        ]
        for name, form in forms.items()
    }
    return pd.DataFrame(columns, dtype=object)


def short_task_names(names: Iterable[str]) -> dict[str, str]:
    """Returns short task names: "1590 diplomacy" for task1590_diplomacy_text_generation; full names for duplicates."""
    plain = {
        name: re.sub(r"^task(\d+)_([^_]+).*", r"\1 \2", name, flags=re.DOTALL).replace("_", " ")
        for name in names
    }
    short = {
        name: text if len(text) <= 22 else text[:21].rstrip() + "…" for name, text in plain.items()
    }
    taken = list(short.values())
    return {name: each if taken.count(each) == 1 else name for name, each in short.items()}


def names_in(frame: pd.DataFrame, column: str) -> dict[str, str]:
    """Returns the values of a column with their short names, ordered by category, by number or by first appearance."""
    values = frame[column]
    known = values.cat.categories if values.dtype == "category" else values.unique()
    return short_task_names(
        map(str, sorted(known) if pd.api.types.is_numeric_dtype(values) else known)
    )


def name_axis(names: Mapping[str, str], **options: Any) -> alt.Axis:
    """Returns an axis that shows short names for the full names in the data."""
    overlap = "greedy" if len(names) > 60 else False  # greedy: leaves out names that would overlap
    return alt.Axis(
        labelExpr=f"({json.dumps(names)})[datum.label]", labelOverlap=overlap, **options
    )


def choice(name: str, options: Mapping[str, str] | Iterable[str]) -> alt.Parameter:
    """Returns a drop-down list of a column's values, optionally with labels; the first value is selected."""
    keys = list(dict.fromkeys(options))
    labels = list(options.values()) if isinstance(options, Mapping) else keys
    binding = (
        alt.binding_select(options=keys, labels=labels, name=f"{name} ")
        if len(keys) > 1
        else alt.Undefined
    )
    return alt.param(name=name, value=keys[0], bind=binding)


def all_or_one(frame: pd.DataFrame, name: str, together: str = "") -> alt.Parameter:
    """Returns a choice of all values of a column together, or of a single value."""
    each = {
        str(value): f"layer {value}" if name == "layer" else value
        for value in sorted(set(frame[name]))
    }
    return choice(name, {ALL: together or f"all {name}s"} | (each if len(each) > 1 else {}))


def with_all(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Returns the rows, and copies with ALL in each column without it, so that the mean can be chosen."""
    for column in columns:
        if ALL not in set(frame[column]):
            text = frame.assign(**{column: frame[column].astype(str)})
            frame = pd.concat([text, text.assign(**{column: ALL})])
    return frame


def chart_of(frame: pd.DataFrame, chosen: str = "") -> alt.Chart:
    """Returns a chart of the frame's rows; ``chosen`` names a column and a choice, which filters the rows."""
    chart = alt.Chart(
        alt.InlineData(values=frame.astype(object).where(frame.notna(), None).to_dict("records"))
    )
    return chart.transform_filter(f"datum.{chosen} === {chosen}") if chosen else chart


def chart_by_choice(
    frame: pd.DataFrame, places: Sequence[str], choices: Sequence[alt.Parameter]
) -> tuple[alt.Chart, pd.DataFrame]:
    """Returns a chart of the places that have a ``value`` for the chosen options, and the means that it shows.

    The means of the column ``value`` have a row per place and a column per combination of options, joined by "|".
    """
    frame = with_all(
        frame,
        *(str(option.name) for option in choices if getattr(option.param, "value", None) == ALL),
    )
    keys = pd.Series("", index=frame.index)
    for option in choices:
        keys = keys + "|" + frame[option.name].astype(str)
    values = frame.assign(key=keys.str[1:]).pivot_table(
        "value", list(places), "key", sort=False, observed=True
    )
    of_all = [ALL in key.split("|") for key in values]
    if values.size > MOST_VALUES and any(of_all):
        values = values.loc[:, of_all]
    # One text per place instead of a column per key: column lookup by name needs eval, which the page's policy forbids.
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
    """Returns a heat map of the means of a column under the chosen options (``choices``, the layer first).

    Rows and columns are in the order of their categories, if any, and pairs of tasks appear twice. The colour scale
    ends at the distance ``limit`` from ``middle``, on both sides if ``signed`` (default: covers 98 % of the values).
    ``form`` is the numbers' d3 format; ``written`` also writes them into the cells.
    """
    frame = frame.rename(columns={rows: "row", columns: "column", value: "value"})
    if (rows, columns) == ("task_a", "task_b"):
        frame = pd.concat([frame, frame.rename(columns={"row": "column", "column": "row"})])
    row_names, column_names = names_in(frame, "row"), names_in(frame, "column")
    base, values = chart_by_choice(
        frame.astype({"row": str, "column": str}), ["row", "column"], choices
    )
    # The mean over all layers often varies less than single layers, so it has its own limit.
    of_all = np.array([key.split("|")[0] == ALL for key in values], dtype=bool)
    apart = [
        pd.Series(np.ravel(values.loc[:, part] - middle), dtype=float).abs()
        for part in (of_all, ~of_all)
    ]
    limits = [limit or float(f"{max(0.01, each.quantile(0.98)):.2g}") for each in apart]
    bound = f"limits[{choices[0].name} === '{ALL}' ? 0 : 1]" if of_all.any() else "limits[1]"
    upright = max(map(len, column_names.values()), default=0) > 3
    below = name_axis(column_names, labelAngle=-90 if upright else 0, labelLimit=130)
    base = base.encode(
        x=alt.X(
            "column:N",
            title=titles[1] or None,
            scale=alt.Scale(domain=list(column_names)),
            axis=below,
        ),
        y=alt.Y(
            "row:N",
            title=titles[0] or None,
            scale=alt.Scale(domain=list(row_names)),
            axis=name_axis(row_names),
        ),
        tooltip=[
            alt.Tooltip("row:N", title=titles[0] or "row"),
            alt.Tooltip("column:N", title=titles[1] or "column"),
            alt.Tooltip("value:Q", title=label, format=".4f"),
        ],
    )
    ends: dict[str, Any] = {
        "domainMin": middle,
        "domainMax": {"expr": f"{middle} + {bound}"},
        "range": "heatmap",
    }
    if signed:
        ends |= {
            "domainMin": {"expr": f"{middle} - {bound}"},
            "domainMid": middle,
            "range": "diverging",
        }
    scale = alt.Scale(**ends, clamp=True, interpolate="rgb")
    colour = alt.Color(
        "value:Q", scale=scale, legend=alt.Legend(title=label, format=form, tickCount=4)
    )
    chart = base.mark_rect().encode(color=colour)
    if written:
        # Shown in cells that are at least 34 pixels wide, in black or white depending on the cell's colour.
        opacity = {"expr": f"width / {len(column_names)} < 34 ? 0 : 1"}
        ink = alt.condition(
            "luminance(scale('color', datum.value)) > 0.25",
            alt.value("#15171a"),
            alt.value("#ffffff"),
        )
        text = base.mark_text(fontSize=10, opacity=opacity, tooltip=None)
        chart += text.encode(text=alt.Text("value:Q", format=form), color=ink)
    row = 13 if len(row_names) > 40 else min(38, max(ROW, 320 // max(1, len(row_names))))
    view = alt.ViewBackground(style="matrix")
    chart = chart.add_params(*choices, alt.param(name="limits", value=limits))
    return chart.properties(
        height=min(len(row_names) * row, max(1300, len(row_names) * 4)), view=view
    )


def share_limits(drawn: Iterable[Any]) -> None:
    """Gives the heat maps of one figure, which are shown side by side, the same colour scale."""
    of_charts = [each.params for each in drawn if isinstance(getattr(each, "params", None), list)]
    limits = [param for params in of_charts for param in params if param.name == "limits"]
    for param in limits:
        param.value = [max(each) for each in zip(*(other.value for other in limits), strict=True)]


def legend(names: Iterable[str], **options: Any) -> alt.Legend | None:
    """Returns a legend without a title whose rows fit the page; None for fewer than two different names."""
    different = list(dict.fromkeys(names))
    if len(different) < 2:
        return None
    longest = max(map(len, different)) + 4  # in characters, with the symbol
    # A row fits 80 characters on a page, and 36 on a phone and in an exported figure, which has no container.
    columns = f"containerSize()[0] >= 480 ? {max(1, 80 // longest)} : {max(1, 36 // longest)}"
    return alt.Legend(title=None, columns=cast(Any, {"expr": columns}), **options)
