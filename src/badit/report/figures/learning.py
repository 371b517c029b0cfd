"""Loss by step, scores by task, differences with their intervals, and what tasks do to one another's learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from badit.report.contract import Records
from badit.report.figures.choice import ROW, Choice, legend, with_choices
from badit.report.figures.heat_map import Axis, Shade, grid_cells, heat_map

_MOST_POINTS = 250
_COLOURS = 7
# Six, so that they and the seven colours repeat together only after 42 series.
_SYMBOLS = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def loss_curves(curves: Sequence[tuple[str, str, Records]]) -> Any:
    """The loss by step: as logged in faint, its running mean over five log lines in full colour.

    Args:
        curves: (series, run, records with step and loss); the runs of a series share its colour.
    """
    records = [
        {"series": series, "run": run, "step": point["step"], "loss": round(point["loss"], 4)}
        for series, run, points in curves
        for point in _thinned(points)
    ]
    series = list(dict.fromkeys(series for series, _, _ in curves))
    pick = alt.selection_point(name="pick", fields=["series"], bind="legend")
    base = (
        alt.Chart(alt.InlineData(values=records))
        .transform_window(mean="mean(loss)", frame=[-2, 2], groupby=["series", "run"], sort=[alt.SortField("step")])
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=5)),
            color=_series_colour(series, symbolType="stroke"),
            detail="run:N",
        )
    )
    loss = alt.Y("loss:Q", title="training loss (nats a token)", scale=alt.Scale(zero=False))
    raw = base.mark_line(strokeWidth=1).encode(
        y=loss, opacity=alt.condition(pick, alt.value(0.4), alt.value(0.05)), tooltip=alt.value(None)
    )
    smooth = base.mark_line(strokeWidth=2.2).encode(
        y="mean:Q",
        opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
        strokeDash=alt.StrokeDash("series:N", scale=_dashes(series), legend=legend(series, symbolType="stroke")),
        tooltip=alt.value(None),
    )
    spots = base.mark_point(size=60, filled=True, opacity=0).encode(
        y="mean:Q",
        tooltip=[
            alt.Tooltip("run:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("loss:Q", format=".3f"),
            alt.Tooltip("mean:Q", title="running mean", format=".3f"),
        ],
    )
    return alt.layer(raw, smooth, spots.add_params(pick)).properties(width="container", height=280)


def scores_by_task(scores: Records, series: Sequence[str]) -> Any:
    """A mark for each method's score on each task, the tasks by their mean score.

    Args:
        scores: records with task, full, series, rouge_l and exact_match.
        series: methods or runs, in the order of their colours.
    """
    pick = alt.selection_point(name="pick", fields=["series"], bind="legend")
    metric = Choice("metric", {"rouge_l": "Rouge-L", "exact_match": "exact match"})
    chart = (
        alt.Chart(alt.InlineData(values=scores))
        .transform_calculate(score="metric === 'rouge_l' ? datum.rouge_l : datum.exact_match")
        .mark_point(filled=True, size=75)
        .encode(
            x=alt.X(
                "score:Q", title="score (0 to 100)", scale=alt.Scale(zero=True, nice=True), axis=alt.Axis(tickCount=6)
            ),
            y=alt.Y("task:N", title=None, sort=_by_mean_score(scores), axis=alt.Axis(grid=True, labelOverlap=False)),
            color=_series_colour(series),
            shape=alt.Shape(
                "series:N",
                scale=alt.Scale(domain=list(series), range=[_SYMBOLS[i % len(_SYMBOLS)] for i in range(len(series))]),
                legend=legend(series),
            ),
            opacity=alt.condition(pick, alt.value(0.9), alt.value(0.08)),
            tooltip=[
                alt.Tooltip("full:N", title="task"),
                alt.Tooltip("series:N", title="run"),
                alt.Tooltip("rouge_l:Q", title="Rouge-L", format=".1f"),
                alt.Tooltip("exact_match:Q", title="exact match", format=".1f"),
            ],
        )
        .add_params(pick)
    )
    height = ROW * len({record["task"] for record in scores})
    return with_choices(chart, [metric]).properties(width="container", height=height)


def differences(records: Records, reference: str) -> Any:
    """Each method's difference to the reference, with its interval and a rule at none.

    Args:
        records: with method, mean, low and high, in points.
        reference: the method that the differences are taken to.
    """
    base = alt.Chart(alt.InlineData(values=records)).encode(
        y=alt.Y("method:N", title=None, sort=None),
        tooltip=[
            "method:N",
            alt.Tooltip("mean:Q", title="difference", format="+.2f"),
            alt.Tooltip("low:Q", title="2.5 %", format="+.2f"),
            alt.Tooltip("high:Q", title="97.5 %", format="+.2f"),
        ],
    )
    title = f"Rouge-L points above {reference}"
    bars = base.mark_rule(style="interval", strokeWidth=2.5).encode(
        x=alt.X("low:Q", title=title, axis=alt.Axis(tickCount=6)), x2="high:Q"
    )
    means = base.mark_point(filled=True, size=90, opacity=1).encode(x="mean:Q")
    none = alt.Chart(alt.InlineData(values=[{"none": 0}])).mark_rule(style="reference", tooltip=None).encode(x="none:Q")
    return alt.layer(none, bars, means).properties(width="container", height=ROW * len(records))


def task_gap(gaps: Records, names: Mapping[str, str]) -> Any:
    """One model a task against one model for all tasks: the two scores of each task, joined."""
    kinds = ("one model a task", "one model for all")
    records = [
        {
            "method": gap["method"],
            "task": names[gap["task"]],
            "full": gap["task"],
            "single": gap["single"],
            "multi": gap["multi"],
            "gap": gap["gap"],
        }
        for gap in gaps
    ]
    method = Choice("method", {name: name for name in dict.fromkeys(gap["method"] for gap in gaps)})
    tooltip = [
        alt.Tooltip("full:N", title="task"),
        alt.Tooltip("single:Q", title=kinds[0], format=".1f"),
        alt.Tooltip("multi:Q", title=kinds[1], format=".1f"),
        alt.Tooltip("gap:Q", title="gap", format="+.1f"),
    ]
    order = [record["task"] for record in sorted(records, key=lambda record: record["gap"] or 0.0)]
    base = (
        alt.Chart(alt.InlineData(values=records))
        .transform_filter("datum.method === method")
        .encode(y=alt.Y("task:N", title=None, sort=list(dict.fromkeys(order)), axis=alt.Axis(labelOverlap=False)))
    )
    span = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("single:Q", title="Rouge-L", axis=alt.Axis(tickCount=6)), x2="multi:Q", tooltip=tooltip
    )
    colour = alt.Color("kind:N", scale=alt.Scale(domain=list(kinds)), legend=legend(kinds))
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=list(kinds), range=["circle", "diamond"]))
    marks = [
        base.transform_calculate(kind=f"'{kind}'")
        .mark_point(filled=True, size=80, opacity=1)
        .encode(x=f"{column}:Q", color=colour, shape=shape, tooltip=tooltip)
        for column, kind in zip(("single", "multi"), kinds, strict=True)
    ]
    height = ROW * len(set(order))
    return with_choices(alt.layer(span, *marks), [method]).properties(width="container", height=height)


def transfer(
    stages: Sequence[str],
    tasks: Sequence[str],
    scores: Mapping[tuple[int, str], float | None],
    names: Mapping[str, str],
) -> Any:
    """The score on each task after each stage of a sequence."""
    rows = [f"{i + 1}. {names[stage]}" for i, stage in enumerate(stages)]
    values = [scores.get((i, task)) for i in range(len(stages)) for task in tasks]
    limit = max((value for value in values if value is not None), default=1.0) or 1.0
    return heat_map(
        grid_cells(len(stages), len(tasks)),
        {(): values},
        rows=Axis("after training on", rows, list(stages)),
        columns=Axis("Rouge-L on", [names[task] for task in tasks], list(tasks)),
        shade=Shade("Rouge-L", limit, kind="magnitude", format=".0f", written=True),
    )


def _series_colour(series: Sequence[str], **options: Any) -> alt.Color:
    return alt.Color(
        "series:N",
        scale=alt.Scale(domain=list(dict.fromkeys(series))),
        legend=legend(series, **options),
    )


def _dashes(series: Sequence[str]) -> alt.Scale:
    """Lines of the first seven series are solid; those that have their colours again are dashed, then dotted."""
    kinds = [[1, 0], [6, 3], [2, 2]]
    return alt.Scale(domain=list(series), range=[kinds[i // _COLOURS % len(kinds)] for i in range(len(series))])


def _by_mean_score(scores: Records) -> list[str]:
    means: dict[str, list[float]] = {}
    for record in scores:
        means.setdefault(record["task"], []).append(record["rouge_l"])
    return sorted(means, key=lambda task: -fmean(means[task]))


def _thinned(points: Records) -> Records:
    """At most 250 points of a curve, each the mean of its neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [{"step": group[-1]["step"], "loss": fmean(point["loss"] for point in group)} for group in groups]
