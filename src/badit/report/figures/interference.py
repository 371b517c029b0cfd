"""How tasks' gradients agree or conflict, and which units they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from badit.report.contract import Records
from badit.report.figures.choice import ALL, ROW, Choice, chosen, layer_choice, legend, module_choice, with_choices
from badit.report.figures.heat_map import Axis, Shade, heat_map, limit_of, pair_cells, pair_index
from badit.report.figures.ordering import in_order, tasks_of

# What one figure may hold; with more tasks, modules and layers can be chosen but not both.
_MOST_VALUES = 150_000


def gradient_cosines(pairs: Records, overall: Records, names: Mapping[str, str], like: Records) -> Any:
    """Task × task cosines of gradients: all modules together, or those of a layer and a module.

    Args:
        pairs: rows of ``gradient_pairs``; means are taken over what is not chosen.
        overall: rows of ``gradient_overall`` for one kind of parameters; may be empty.
        names: short names of the tasks.
        like: the rows that give the order of the tasks, its own or another run's.
    """
    together = overall or _means_over_all(pairs)
    tasks = in_order(tasks_of([*together, *pairs]), like or together, "cosine")
    sums: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    place = _places(tasks)
    for record in pairs:
        if record["cosine"] is not None:
            layer, module, index = str(record["layer"]), record["module"], place(record)
            for key in ((layer, module), (layer, ALL), (ALL, module)):
                sums[key][index].append(record["cosine"])
    size = len(pair_index(len(tasks)))
    if len(sums) * size > _MOST_VALUES:
        sums = {key: values for key, values in sums.items() if ALL in key}  # pyright: ignore[reportAssignmentType]
    lists = {key: [fmean(values[i]) if i in values else None for i in range(size)] for key, values in sums.items()}
    overall_list: list[float | None] = [None] * size
    for record in together:
        overall_list[place(record)] = record["cosine"]
    lists = {(ALL, ALL): overall_list, **lists}
    axis = _axis(tasks, names)
    single = [value for key, values in lists.items() if key[0] != ALL for value in values]
    shade = Shade("cosine", limit_of(single or overall_list), limit_of(overall_list))
    choices = [layer_choice(record["layer"] for record in pairs), module_choice(record["module"] for record in pairs)]
    return heat_map(pair_cells(len(tasks)), lists, rows=axis, columns=axis, shade=shade, choices=choices)


def by_layer(summary: Records, column: str, title: str, form: str) -> Any:
    """A column of ``gradient_summary`` over the layers, a line for each module."""
    records = [
        {"layer": record["layer"], "module": record["module"], "value": record[column]}
        for record in summary
        if record["layer"] >= 0 and record[column] is not None
    ]
    several = len({record["module"] for record in records}) > 1
    base = alt.Chart(alt.InlineData(values=records)).encode(
        x=alt.X(
            "layer:Q", title="layer", scale=alt.Scale(nice=False), axis=alt.Axis(format="d", tickCount=8, grid=False)
        ),
        y=alt.Y("value:Q", title=title, axis=alt.Axis(format=form, tickCount=5)),
        color=alt.Color("module:N", legend=legend((record["module"] for record in records), room=46)),
        tooltip=["layer:Q", "module:N", alt.Tooltip("value:Q", title=title, format=form)],
    )
    lines = base.mark_line(strokeWidth=1.8, tooltip=None)
    spots = base.mark_point(filled=True, size=20 if not several else 60, opacity=1 if not several else 0)
    return (lines + spots).properties(width="container", height=220)


def shared_units(coactivation: Records) -> Any:
    """The share of units that exactly k tasks have in common, against chance."""
    kinds = list(dict.fromkeys(record["kind"] for record in coactivation))
    most = max(record["tasks"] for record in coactivation)
    found: dict[tuple[str, ...], list[list[float]]] = defaultdict(lambda: [[] for _ in range(2 * most)])
    for record in coactivation:
        if record["tasks"] and record["layer"] >= 0:
            for layer in (str(record["layer"]), ALL):
                for series, column in enumerate(("share", "chance")):
                    if record[column] is not None:
                        found[record["kind"], layer][series * most + record["tasks"] - 1].append(record[column])
    lists = {key: [fmean(values) if values else None for values in places] for key, places in found.items()}
    series = ("measured", "by chance")
    places = [
        {"tasks": k + 1, "series": name, "index": i * most + k} for i, name in enumerate(series) for k in range(most)
    ]
    choices = [
        Choice("units", {kind: kind for kind in kinds}),
        layer_choice((record["layer"] for record in coactivation if record["layer"] >= 0), "mean over layers"),
    ]
    base = chosen(places, lists, choices).encode(
        x=alt.X("tasks:O", title="number of tasks that share a unit", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("value:Q", title="share of all units", axis=alt.Axis(format="%", tickCount=5)),
        color=alt.Color("series:N", scale=_series(*series), legend=legend(series)),
        tooltip=[
            alt.Tooltip("tasks:O", title="tasks"),
            alt.Tooltip("series:N", title="share"),
            alt.Tooltip("value:Q", title="of all units", format=".3%"),
        ],
    )
    bars = base.transform_filter(f"datum.series === '{series[0]}'").mark_bar(cornerRadiusEnd=2)
    chance = base.transform_filter(f"datum.series === '{series[1]}'").mark_line(
        point=alt.OverlayMarkDef(size=36, filled=True), strokeDash=[4, 3]
    )
    return with_choices(bars + chance, choices).properties(width="container", height=240)


def units_of_tasks(tasks: Records, names: Mapping[str, str]) -> Any:
    """Each task's marked units: its own alone, shared by some, shared by all."""
    parts = ("this task alone", "some tasks", "all tasks")
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for record in tasks:
        marked, own, universal = (record[column] or 0 for column in ("marked", "exclusive", "universal"))
        for i, count in enumerate((own, marked - own - universal, universal)):
            sums[record["kind"], record["task"]][i] += count
    records = [
        {"kind": kind, "task": names[task], "full": task, "part": part, "order": i, "units": counts[i]}
        for (kind, task), counts in sums.items()
        for i, part in enumerate(parts)
    ]
    choice = Choice("units", {kind: kind for kind in dict.fromkeys(record["kind"] for record in tasks)})
    chart = (
        alt.Chart(alt.InlineData(values=records))
        .transform_filter("datum.kind === units")
        .transform_joinaggregate(total="sum(units)", groupby=["task"])
        .transform_calculate(share="datum.units / datum.total")
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title="share of the task's marked units", axis=alt.Axis(format="%", tickCount=5)),
            y=alt.Y("task:N", title=None, sort=None),
            order=alt.Order("order:Q"),
            color=alt.Color("part:N", scale=_series(*parts), legend=legend(parts)),
            tooltip=[
                alt.Tooltip("full:N", title="task"),
                alt.Tooltip("part:N", title="marked for"),
                alt.Tooltip("units:Q", title="number", format=","),
                alt.Tooltip("share:Q", title="share", format=".1%"),
            ],
        )
    )
    return with_choices(chart, [choice]).properties(
        width="container", height=ROW * len({record["task"] for record in tasks})
    )


def overlaps(pairs: Records, names: Mapping[str, str], like: Records) -> Any:
    """Task × task overlap (Jaccard) of the marked units, the tasks in the order that ``like`` gives."""
    kinds = list(dict.fromkeys(record["kind"] for record in pairs))
    tasks = in_order(tasks_of(pairs), [record for record in like if record["kind"] == like[0]["kind"]], "overlap")
    place = _places(tasks)
    lists: dict[tuple[str, ...], list[float | None]] = {(kind,): [None] * len(pair_index(len(tasks))) for kind in kinds}
    for record in pairs:
        lists[record["kind"],][place(record)] = record["overlap"]
    axis = _axis(tasks, names)
    limit = limit_of(value for values in lists.values() for value in values)
    shade = Shade("overlap (Jaccard)", limit, kind="magnitude")
    choice = Choice("units", {kind: kind for kind in kinds})
    return heat_map(pair_cells(len(tasks)), lists, rows=axis, columns=axis, shade=shade, choices=[choice])


def _series(*names: str) -> alt.Scale:
    return alt.Scale(domain=list(names))


def _places(tasks: Sequence[str]) -> Any:
    """A function from a record with task_a and task_b to the pair's place."""
    position, index = {task: i for i, task in enumerate(tasks)}, pair_index(len(tasks))

    def place(record: Mapping[str, Any]) -> int:
        a, b = sorted((position[record["task_a"]], position[record["task_b"]]))
        return index[a, b]

    return place


def _axis(tasks: Sequence[str], names: Mapping[str, str]) -> Axis:
    return Axis(None, [names[task] for task in tasks], tasks)


def _means_over_all(pairs: Records) -> Records:
    cosines: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in pairs:
        if record["cosine"] is not None:
            cosines[record["task_a"], record["task_b"]].append(record["cosine"])
    return [{"task_a": a, "task_b": b, "cosine": fmean(values)} for (a, b), values in cosines.items()]
