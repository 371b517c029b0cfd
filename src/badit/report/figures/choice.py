"""Charts of which the reader sees one out of many: a layer's, a module's, a step's.

A run has tens of thousands of such values. They are kept as one line of text for each choice, while what belongs to the
same place in every line is written once; the chart looks the chosen line up by its key:

    places    {row, column, …, index}         lines  {key: "3|mlp.gate_proj", values: "0.12,-0.034,,…"}
    value  =  the number after ``index`` commas of the line of layer + "|" + module; nothing where there is none
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

ALL = "all"
# Charts with a row for each task or method give this much height to one, in pixels.
ROW = 23
# How many letters a legend's row has room for beside the names of tasks on a phone, and on a wider page.
_NARROW_ROW, _WIDE_ROW = 36, 80
_WIDE = 480  # pixels


@dataclass(frozen=True)
class Choice:
    """A list to choose from: the parameter's name, and its values with what they are called."""

    name: str
    options: Mapping[str, str]

    @property
    def parameter(self) -> alt.Parameter:
        keys = list(self.options)
        if len(keys) == 1:
            return alt.param(name=self.name, value=keys[0])
        binding = alt.binding_select(options=keys, labels=list(self.options.values()), name=f"{self.name} ")
        return alt.param(name=self.name, value=keys[0], bind=binding)


def layer_choice(layers: Iterable[int], called: str = "all layers") -> Choice:
    """All layers together, then each."""
    names = {str(layer): f"layer {layer}" if layer >= 0 else "outside the layers" for layer in sorted(set(layers))}
    return Choice("layer", {ALL: called} | (names if len(names) > 1 else {}))


def module_choice(modules: Iterable[str]) -> Choice:
    """All modules together, then each; only "all" where there is one."""
    names = sorted(set(modules))
    return Choice("module", {ALL: "all modules"} | ({name: name for name in names} if len(names) > 1 else {}))


def chosen(
    places: Sequence[Mapping[str, Any]],
    lists: Mapping[tuple[str, ...], Sequence[float | None]],
    choices: Sequence[Choice],
) -> alt.Chart:
    """A chart whose data are ``places``, each with its ``value`` from the chosen list; those without one are left out.

    Args:
        places: what is known of each value besides the value, ``index`` being its place in the lists.
        lists: by the options chosen, in the order of ``choices``; under () if there is nothing to choose.
        choices: to be added to the finished chart by :func:`with_choices`.
    """
    lines = alt.InlineData(values=[{"key": "|".join(key), "values": _line(values)} for key, values in lists.items()])
    key = " + '|' + ".join(choice.name for choice in choices) or "''"
    return (
        alt.Chart(alt.InlineData(values=list(places)))
        .transform_calculate(key=key)
        .transform_lookup(lookup="key", from_=alt.LookupData(data=lines, key="key", fields=["values"]))
        .transform_filter("isString(datum.values)")
        .transform_calculate(value="toNumber(split(datum.values, ',')[datum.index])")
        .transform_filter("isValid(datum.value)")
    )


def with_choices(chart: Any, choices: Sequence[Choice]) -> Any:
    """The chart, or layers, with the lists to choose from."""
    for choice in choices:
        chart = chart.add_params(choice.parameter)
    return chart


def legend(names: Iterable[str], *, room: int = _NARROW_ROW, **options: Any) -> alt.Legend | None:
    """A legend without a title whose rows fit the page; none where there is nothing to tell apart.

    Args:
        names: what the legend names.
        room: how many letters a row may have on a phone, or in a figure of half a page's width.
    """
    different = list(dict.fromkeys(names))
    if len(different) < 2:
        return None
    # The page's room and not the plot's width, which is only known once the legend has its place. An exported figure
    # has no page, and is narrow.
    narrow, wide = _columns(different, room), _columns(different, _WIDE_ROW)
    columns: Any = {"expr": f"containerSize()[0] >= {_WIDE} ? {wide} : {narrow}"}
    return alt.Legend(title=None, columns=columns, **options)


def _columns(names: Sequence[str], letters: int) -> int:
    """The most columns whose longest names, each with its symbol, have room in a row."""
    counts = range(min(len(names), 6), 1, -1)
    return next((n for n in counts if sum(max(map(len, names[i::n])) + 4 for i in range(n)) <= letters), 1)


def _line(values: Sequence[float | None]) -> str:
    return ",".join("" if value is None else f"{value:.4g}" for value in values)
