"""Figures of scores and training: loss curves, scores by task, differences, and what tasks lose by one another.

To add one, write a function from a frame to a chart, or to a table of text, and add it to :data:`FIGURES`.
"""

# pandas' own types make every selection a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from badit.metrics import METRICS
from badit.report.charts import ROW, Figure, chart_of, choice, heat_map, legend, names_in
from badit.report.formatting import UNKNOWN, duration, interval, number, text_table

_MOST_POINTS = 250
_COLOURS = 7
# Six, so that they and the seven colours repeat together only after 42 series.
_SYMBOLS = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def loss_curves(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """The pale line is what was logged, the strong one its running mean over five log lines."""
    series = list(dict.fromkeys(frame["series"]))
    pick = alt.selection_point(name="pick", fields=["series"], bind="legend")
    base = (
        chart_of(pd.concat([_thinned(rows) for _, rows in frame.groupby(["series", "run"], sort=False)]))
        .transform_window(mean="mean(loss)", frame=[-2, 2], groupby=["series", "run"], sort=[alt.SortField("step")])
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=5)),
            color=_colour(series, symbolType="stroke"),
            detail="run:N",
        )
    )
    loss = alt.Y("loss:Q", title="training loss (nats per token)", scale=alt.Scale(zero=False))
    raw = base.mark_line(strokeWidth=1).encode(
        y=loss, opacity=alt.condition(pick, alt.value(0.4), alt.value(0.05)), tooltip=alt.value(None)
    )
    # Lines of the first seven series are solid; those that have their colours again are dashed, then dotted.
    kinds = [[1, 0], [6, 3], [2, 2]]
    dashes = alt.Scale(domain=series, range=[kinds[i // _COLOURS % len(kinds)] for i in range(len(series))])
    smooth = base.mark_line(strokeWidth=2.2).encode(
        y="mean:Q",
        opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
        strokeDash=alt.StrokeDash("series:N", scale=dashes, legend=legend(series, symbolType="stroke")),
        tooltip=alt.value(None),
    )
    spots = base.mark_point(size=60, filled=True, opacity=0).encode(
        y="mean:Q",
        tooltip=["run:N", "step:Q", "loss:Q", alt.Tooltip("mean:Q", title="running mean", format=".3f")],
    )
    return alt.layer(raw, smooth, spots.add_params(pick)).properties(width="container", height=280)


def _thinned(points: pd.DataFrame) -> pd.DataFrame:
    """At most 250 points of a curve, each the mean of its neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    means = {"series": "last", "run": "last", "step": "last", "loss": "mean"}
    return points.groupby(np.arange(len(points)) // size).agg(means).round({"loss": 4})


def scores_by_task(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """One mark for each run on each task, the tasks with the highest mean first; click the legend to bring one run
    forward."""
    rows = frame.pivot_table("score", ["task", "run"], "metric", sort=False).round(2).reset_index()
    metrics = [metric for metric in METRICS if metric in rows]
    series = list(dict.fromkeys(frame["run"]))
    names = names_in(frame, "task")
    rows = rows.assign(full=rows["task"], task=rows["task"].map(names))
    order = rows.groupby("task")[metrics[0]].mean().sort_values(ascending=False, kind="stable").index.tolist()
    labels = {metric: METRICS[metric].label for metric in metrics}
    pick = alt.selection_point(name="pick", fields=["run"], bind="legend")
    symbols = alt.Scale(domain=series, range=[_SYMBOLS[i % len(_SYMBOLS)] for i in range(len(series))])
    chart = (
        chart_of(rows)
        .transform_calculate(score="datum[metric]")
        .mark_point(filled=True, size=75)
        .encode(
            x=alt.X(
                "score:Q", title="score (0 to 100)", scale=alt.Scale(zero=True, nice=True), axis=alt.Axis(tickCount=6)
            ),
            y=alt.Y("task:N", title=None, sort=order, axis=alt.Axis(grid=True, labelOverlap=False)),
            color=_colour(series, field="run"),
            shape=alt.Shape("run:N", scale=symbols, legend=legend(series)),
            opacity=alt.condition(pick, alt.value(0.9), alt.value(0.08)),
            tooltip=[
                alt.Tooltip("full:N", title="task"),
                alt.Tooltip("run:N"),
                *(alt.Tooltip(f"{metric}:Q", title=label, format=".1f") for metric, label in labels.items()),
            ],
        )
        .add_params(pick, choice("metric", labels))
    )
    return chart.properties(width="container", height=ROW * len(order))


def scores_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Click a heading to sort; the last row has the means over tasks, and the best of several is in bold."""
    several = frame["run"].nunique() > 1
    tasks = frame["task"].unique()
    shown = pd.DataFrame({"task": [*tasks, "mean over tasks"]}, dtype=object)
    shown["instances"] = [number(n, 0) for n in frame.groupby("task")["n"].max()[tasks]] + [""]
    strong = []
    for metric, rows in frame.groupby("metric", sort=False):
        scores = rows.pivot_table("score", "task", "run", sort=False).reindex(tasks)
        values = np.vstack([scores, scores.mean()])
        for run, column in zip(scores, values.T, strict=True):
            heading = f"{run}: {METRICS[metric].label}" if several else METRICS[metric].label
            shown[heading] = [number(score) for score in column]
            best = np.flatnonzero(column >= np.nanmax(values, axis=1) - 1e-9)
            strong += [(i, heading) for i in best] if several else []
    shown.attrs |= {"footer": 1, "strong": strong}
    return shown


def methods(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over runs, with the highest mean's method in bold; the difference is paired by run and
    instance, with its 95 % bootstrap interval."""
    spreads = {name: metric.label for name, metric in METRICS.items()}
    spreads |= {name: name.replace("_", " ") for name in ("forgetting", "backward_transfer", "forward_transfer")}
    texts = {"method": frame["method"]}
    for name, heading in spreads.items():
        pairs = zip(frame[f"{name}_mean"], frame[f"{name}_std"], strict=True)
        texts[heading] = [number(mean) + (f" ± {number(std)}" if pd.notna(std) else "") for mean, std in pairs]
    differences = frame[["difference_mean", "difference_low", "difference_high"]].to_numpy()
    texts[f"against {frame['reference'].iloc[0]} [95\u00a0%]"] = [interval(*row) for row in differences]
    texts |= {"learning rate": frame["learning_rate"].fillna(UNKNOWN)}
    for name, digits in {"rank": 0, "task_rank": 1, "runs": 0, "trainable_parameters": 0}.items():
        texts[name.replace("_", " ")] = [number(value, digits) for value in frame[name]]
    texts["training"] = [duration(value) for value in frame["seconds"]]
    texts["peak memory (GiB)"] = [number(value) for value in frame["peak_memory_gib"]]
    shown = pd.DataFrame({heading: list(text) for heading, text in texts.items()}, dtype=object)
    shown = shown.loc[:, (shown != UNKNOWN).any()]
    best = (frame["rouge_l_mean"] == frame["rouge_l_mean"].max()).to_numpy()
    shown.attrs["strong"] = [(i, "method") for i in np.flatnonzero(best)]
    return shown


def missing_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """These runs failed or have not been made, and count for nothing."""
    return text_table(frame, {"method": None, "seed": 0, "order": None, "status": None, "error": None})


def differences(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Mean paired difference and its 95 % bootstrap interval over runs and instances: an interval that crosses the
    dotted line decides nothing, and one over a single run says nothing of other seeds."""
    base = chart_of(frame).encode(
        y=alt.Y("method:N", title=None, sort=None),
        tooltip=["method:N", *(alt.Tooltip(f"{name}:Q", format="+.2f") for name in ("mean", "low", "high"))],
    )
    title = f"Rouge-L points above {frame['reference'].iloc[0]}"
    x = alt.X("low:Q", title=title, axis=alt.Axis(tickCount=6))
    bars = base.mark_rule(style="interval", strokeWidth=2.5).encode(x=x, x2="high:Q")
    means = base.mark_point(filled=True, size=90, opacity=1).encode(x="mean:Q")
    zero = chart_of(pd.DataFrame({"zero": [0]})).mark_rule(style="reference", tooltip=None).encode(x="zero:Q")
    return alt.layer(zero, bars, means).properties(width="container", height=ROW * len(frame))


def task_gap(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """A circle is the model trained on the task alone, a diamond the one trained on all tasks: a diamond on the left
    has lost by learning together."""
    kinds = {"single": "one model per task", "multi": "one model for all"}
    names = names_in(frame, "task")
    rows = frame.assign(full=frame["task"], task=frame["task"].astype(str).map(names)).sort_values("gap")
    tooltip = [
        alt.Tooltip("full:N", title="task"),
        *(alt.Tooltip(f"{column}:Q", title=kind, format=".1f") for column, kind in kinds.items()),
        alt.Tooltip("gap:Q", title="gap", format="+.1f"),
    ]
    order = list(dict.fromkeys(rows["task"]))
    axis = alt.Axis(labelOverlap=False)
    base = chart_of(rows).transform_filter("datum.method === method")
    base = base.encode(y=alt.Y("task:N", title=None, sort=order, axis=axis), tooltip=tooltip)
    x = alt.X("single:Q", title="Rouge-L", axis=alt.Axis(tickCount=6))
    span = base.mark_rule(strokeWidth=2).encode(x=x, x2="multi:Q")
    domain = list(kinds.values())
    colour = alt.Color("kind:N", scale=alt.Scale(domain=domain), legend=legend(domain))
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=domain, range=["circle", "diamond"]))
    marks = [
        base.transform_calculate(kind=f"'{kind}'")
        .mark_point(filled=True, size=80, opacity=1)
        .encode(x=f"{column}:Q", color=colour, shape=shape)
        for column, kind in kinds.items()
    ]
    chart = alt.layer(span, *marks).add_params(choice("method", frame["method"]))
    return chart.properties(width="container", height=ROW * len(order))


def transfer(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """A row is the model after one more task: down a column from the diagonal, a task is forgotten."""
    rows = frame.sort_values("stage", kind="stable").rename(columns={"rouge_l": "value"})
    tasks = list(dict.fromkeys([*rows["trained_task"], *rows["task"]]))
    rows["task"] = pd.Categorical(rows["task"], tasks)
    limit = np.nanmax([*rows["value"], 1.0])
    titles = {"row_title": "after training on", "column_title": "Rouge-L on"}
    style = {"signed": False, "limit": float(limit), "form": ".0f", "written": True}
    return heat_map(rows, "trained_task", "task", "Rouge-L", **titles, **style)


def _colour(series: list[str], field: str = "series", **options: Any) -> alt.Color:
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=series), legend=legend(series, **options))


FIGURES = [
    Figure("scores", "Methods", "summary", methods),
    Figure("scores", "Runs without scores", "missing_runs", missing_runs),
    Figure("scores", "Differences", "differences", differences),
    Figure("scores", "Scores by task", "scores", scores_by_task),
    Figure("scores", "The same in numbers", "scores", scores_table),
    Figure("curves", "Training loss", "losses", loss_curves),
    Figure("learning", "One model per task, or one for all", "task_gap", task_gap),
    Figure("learning", "What is left of each task", "transfer", transfer, "square"),
]
