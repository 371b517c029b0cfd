"""Parts of figures: names, drop-down lists, colours, legends, and text for tables."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import altair as alt
import pandas as pd

from badit.support.text import number

ALL = "all"
ROW = 23  # height in pixels of a row for a task or a method
# Above this number of values, a layer or a module can be chosen (if all can be), but not both.
MOST_VALUES = 150_000
_LONGEST_NAME = 22  # of a task, in characters
_TASK_NAME = re.compile(r"^task(\d+)_([^_]+).*", re.DOTALL)


class Figure(NamedTuple):
    """A figure or a table of the page, made from the frame named ``table``.

    ``draw`` turns the frame into an Altair chart, a DataFrame of text, or None if there is nothing
    to show. Its docstring is the caption. Its name is the figure's name, with "-" for "_".
    ``width`` "square" is for matrices.
    """

    title: str
    table: str
    draw: Callable[[pd.DataFrame], Any]
    width: Literal["full", "half", "square"] = "full"


def as_text(frame: pd.DataFrame, forms: Mapping[str, str]) -> pd.DataFrame:
    """Returns columns of a frame as text, with headings without underscores.

    ``forms`` maps each column to the form of its numbers; an empty form means a text column.
    """
    columns = {}
    for name, form in forms.items():
        format_value = partial(number, form=form) if form else str
        columns[name.replace("_", " ")] = frame[name].map(format_value)
    return pd.DataFrame(columns, dtype=object)


def short_task_names(names: Iterable[str]) -> dict[str, str]:
    """Returns short task names: "1590 diplomacy" for task1590_diplomacy_text_generation.

    Names that would be shortened to the same text stay as they are.
    """
    shortened = {name: _shortened(name) for name in names}
    counts = Counter(shortened.values())
    return {name: text if counts[text] == 1 else name for name, text in shortened.items()}


def _shortened(name: str) -> str:
    text = _TASK_NAME.sub(r"\1 \2", name).replace("_", " ")
    if len(text) <= _LONGEST_NAME:
        return text
    return text[: _LONGEST_NAME - 1].rstrip() + "…"


def names_in(frame: pd.DataFrame, column: str) -> dict[str, str]:
    """Returns the values of a column with their short names.

    They are ordered by category, by number or by first appearance.
    """
    values = frame[column]
    if values.dtype == "category":
        names = values.cat.categories
    elif pd.api.types.is_numeric_dtype(values):
        names = sorted(values.unique())
    else:
        names = values.unique()
    return short_task_names(map(str, names))


def name_axis(names: Mapping[str, str], **options: Any) -> alt.Axis:
    """Returns an axis that shows short names for the full names in the data."""
    label = f"({json.dumps(names)})[datum.label]"
    # "greedy" leaves out names that would overlap.
    overlap = "greedy" if len(names) > 60 else False
    return alt.Axis(labelExpr=label, labelOverlap=overlap, **options)


def choice(name: str, values: Iterable[str], labels: Iterable[str] = ()) -> alt.Parameter:
    """Returns a drop-down list of a column's values; the first value is selected.

    A single value needs no list. The labels are the values if they are not given.
    """
    options = list(dict.fromkeys(values))
    if len(options) == 1:
        return alt.param(name=name, value=options[0])
    texts = list(labels) or options
    binding = alt.binding_select(options=options, labels=texts, name=f"{name} ")
    return alt.param(name=name, value=options[0], bind=binding)


def all_or_one(frame: pd.DataFrame, name: str, label_of_all: str = "") -> alt.Parameter:
    """Returns a choice of all values of a column together, or of a single value."""
    values = sorted(set(frame[name]))
    singles = map(str, values) if len(values) > 1 else ()
    prefix = "layer " if name == "layer" else ""
    labels = {value: f"{prefix}{value}" for value in singles}
    return choice(name, [ALL, *labels], [label_of_all or f"all {name}s", *labels.values()])


def with_all(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Returns the rows, and copies with ALL in each column without it, for a choice of the mean."""
    for column in columns:
        # These rows may be measured for all together, which is not the mean.
        if ALL in set(frame[column]):
            continue
        singles = frame.assign(**{column: frame[column].astype(str)})
        frame = pd.concat([singles, singles.assign(**{column: ALL})])
    return frame


def chart_of(frame: pd.DataFrame, chosen: str = "") -> alt.Chart:
    """Returns a chart of the frame's rows.

    ``chosen`` names a column and a choice; the chart shows the rows with the chosen value.
    """
    # JSON has no NaN; Vega reads null as a missing value.
    records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    chart = alt.Chart(alt.InlineData(values=records))
    if not chosen:
        return chart
    return chart.transform_filter(f"datum.{chosen} === {chosen}")


def chart_by_choice(
    frame: pd.DataFrame, places: list[str], choices: Sequence[alt.Parameter]
) -> tuple[alt.Chart, pd.DataFrame]:
    """Returns a chart of the places that have a ``value`` for the chosen options, and its means.

    The means of the column ``value`` have a row per place and a column per combination of
    options, joined by "|".
    """
    options: dict[str, Any] = {str(parameter.name): parameter.param for parameter in choices}
    frame = with_all(frame, *(name for name in options if options[name].value == ALL))
    keys = pd.Series("", index=frame.index)
    for name in options:
        keys += "|" + frame[name].astype(str)
    frame = frame.assign(key=keys.str[1:])
    # Means over what is not chosen, such as the modules of a layer.
    values = frame.pivot_table("value", places, "key", sort=False, observed=True)

    has_all = [ALL in key.split("|") for key in values]
    if values.size > MOST_VALUES and any(has_all):
        values = values.loc[:, has_all]

    # Each place has one text with all its values instead of a column per key. A lookup of a
    # column by name would need eval, which the page's policy forbids.
    texts: Any = values.map("{:.4g}".format, na_action="ignore").fillna("")
    texts = texts.agg(",".join, axis="columns")
    chart = chart_of(texts.rename("values").reset_index())
    position = f"indexof({json.dumps(list(values))},join([{','.join(options)}],'|'))"
    chart = chart.transform_calculate(value=f"toNumber(split(datum.values,',')[{position}])")
    return chart.transform_filter("isValid(datum.value)"), values


def colour(
    field: str, names: Sequence[str], present: Sequence[str] = (), **options: Any
) -> alt.Color:
    """Returns an encoding with a colour for each name.

    The legend shows the names that are present (default: all).
    """
    if present:
        options["values"] = present
    key = legend(present or names, **options)
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names)), legend=key)


def legend(names: Iterable[str], **options: Any) -> alt.Legend | None:
    """Returns a legend without a title whose rows fit the page; None for fewer than two names."""
    different = set(names)
    if len(different) < 2:
        return None
    longest = max(map(len, different)) + 4  # in characters, with the symbol
    # A row fits 80 characters on a page. It fits 36 on a phone and in an exported figure, which
    # has no container.
    columns = f"containerSize()[0] >= 480 ? {max(1, 80 // longest)} : {max(1, 36 // longest)}"
    return alt.Legend(title=None, columns=cast(Any, {"expr": columns}), **options)


def step_axis() -> alt.X:
    """Returns the horizontal axis of the column "step"."""
    return alt.X("step:Q").title("step").axis(grid=False, tickCount=5)


def task_rows(names: Mapping[str, str], **options: Any) -> alt.Y:
    """Returns a vertical axis with a row per task, in the order of the names."""
    return alt.Y("task:N", sort=list(names)).title(None).axis(name_axis(names, **options))
