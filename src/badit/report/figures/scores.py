"""Figures of scores and losses: of runs and methods, during training, and between tasks."""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Callable, Collection
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from badit.comparison.tables import best_of
from badit.metrics.answers import METRICS, score_text
from badit.report.charts import (
    ROW,
    Figure,
    chart_of,
    choice,
    colour,
    legend,
    short_task_names,
    step_axis,
    task_rows,
)
from badit.report.heat_maps import Look, cells_of, heat_map
from badit.support.text import number

_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
_UNIT = "nats per token"
_RUNS_IN_A_TABLE = 3  # with all metrics, which fits the page
_MOST_POINTS = 250  # of a curve
_FEW_POINTS = 12  # at most, of curves that are drawn as points
# When the theme's seven colours repeat, lines are dashed, then dotted.
_DASHES = [[1, 0]] * 7 + [[6, 3]] * 7 + [[2, 2]] * 7


def methods(frame: pd.DataFrame) -> pd.DataFrame:
    """The output of badit table: mean ± standard deviation over runs, the best in bold."""
    return frame


def differences(frame: pd.DataFrame) -> Any:
    """Mean paired difference and its 95 % bootstrap interval over runs and instances. An interval
    that includes 0 (the dotted line) is not conclusive. An interval over one run covers no other
    seeds. The untuned model is left out."""
    low = (
        alt.X("low:Q")
        .title(f"{frame.attrs.get('metric', 'Rouge-L')} points above {frame['reference'].iloc[0]}")
        .axis(tickCount=6)
    )
    values = [alt.Tooltip(f"{name}:Q", format="+.2f") for name in ("mean", "low", "high")]
    base = chart_of(frame).encode(
        alt.Y("method:N", sort=None).title(None), tooltip=["method:N", *values]
    )
    intervals = base.mark_rule(style="interval", strokeWidth=2.5).encode(low, x2="high:Q")
    means = base.mark_point(filled=True, size=90, opacity=1).encode(x="mean:Q")
    zero = chart_of(pd.DataFrame({"zero": [0]})).encode(x="zero:Q")
    zero = zero.mark_rule(style="reference", tooltip=None)
    return (zero + intervals + means).properties(height=ROW * len(frame))


def scores_by_task(frame: pd.DataFrame) -> Any:
    """One mark per task and run; in a comparison, per task and method (the mean over runs). Tasks
    are sorted by mean. Click the legend to highlight a run."""
    scores = frame.pivot_table("score", ["task", "run"], "metric", sort=False)
    rows = scores.round(3).reset_index()
    metrics = {name: metric for name, metric in METRICS.items() if name in rows}
    means = rows.groupby("task")[next(iter(metrics))].mean()
    tasks = means.sort_values(ascending=False, kind="stable").index
    runs = list(frame["run"].unique())
    # The order of all figures, so that a run has the same colour in each.
    series = frame.attrs.get("order") or runs
    values = [
        alt.Tooltip(f"{name}:Q", title=metric.label, format=f".{metric.decimals}f")
        for name, metric in metrics.items()
    ]

    pick = alt.selection_point(name="pick", fields=["run"], bind="legend")
    chart = (
        chart_of(rows)
        .mark_point(filled=True, size=75)
        .encode(
            alt.X("score:Q")
            .title("score (0 to 100; NLL in nats)")
            .scale(zero=True)
            .axis(tickCount=6),
            task_rows(short_task_names(tasks), grid=True),
            colour("run", series, runs),
            alt.Shape("run:N")
            .scale(domain=series, range=_SHAPES)
            .legend(legend(runs, values=runs)),
            opacity=alt.condition(pick, alt.value(0.9), alt.value(0.08)),
            tooltip=["task:N", "run:N", *values],
        )
    )
    # One metric at a time, because their scales differ.
    chart = chart.transform_calculate(score="datum[metric]")
    shown = choice("metric", metrics, [metric.label for metric in metrics.values()])
    return chart.add_params(pick, shown).properties(height=ROW * len(tasks))


def scores_table(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Click a heading to sort. The last row has the means over tasks. The best of several runs is
    in bold, unless it is a tie."""
    if len(set(frame["run"])) > _RUNS_IN_A_TABLE:
        return None
    return _scores(frame, METRICS)


def _table_of(name: str) -> Callable[[pd.DataFrame], pd.DataFrame | None]:
    """Returns the function that makes the table of one metric, for many runs."""

    def table(frame: pd.DataFrame) -> pd.DataFrame | None:
        is_shown = len(set(frame["run"])) > _RUNS_IN_A_TABLE and name in set(frame["metric"])
        return _scores(frame, [name]) if is_shown else None

    # The figure's name and caption.
    table.__name__ = f"{name}_table"
    table.__doc__ = scores_table.__doc__
    return table


def _scores(frame: pd.DataFrame, metrics: Collection[str]) -> pd.DataFrame:
    """Returns the scores of each task, a column per metric and run."""
    tasks = frame["task"].unique()
    instances = frame.groupby("task")["n"].max()[tasks]
    table = pd.DataFrame({"task": [*tasks, "mean over tasks"]}, dtype=object)
    table["instances"] = [*(number(count, ".0f") for count in instances), ""]
    strong = []
    for name in metrics:
        rows = frame.query("metric == @name")
        if rows.empty:
            continue
        scores = rows.pivot_table("score", "task", "run", sort=False).reindex(tasks)
        values = np.vstack([scores, scores.mean()])
        label = METRICS[name].label
        headings = [label]
        if len(set(frame["run"])) > 1:
            headings = [run if len(metrics) == 1 else f"{run}: {label}" for run in scores]
            # Means of different tasks are not compared.
            compared = values[:-1] if scores.isna().to_numpy().any() else values
            for i, row in enumerate(compared):
                strong += [(i, headings[j]) for j in best_of(row, name)]
        table[headings] = [[score_text(score, name) for score in row] for row in values]
    table.attrs |= {"footer": 1, "strong": strong}
    return table


SCORES = [
    Figure("Methods", "methods", methods),
    Figure("Differences", "differences", differences),
    Figure("Scores by task", "scores", scores_by_task),
    Figure("Table of scores by task", "scores", scores_table),
    *(
        Figure(f"Table of {metric.label} by task", "scores", _table_of(name))
        for name, metric in METRICS.items()
    ),
]


def loss_curves(frame: pd.DataFrame) -> Any:
    """The pale line is the logged loss with a method's own term, such as a balance loss; in long
    logs, means of several lines. The strong line is its running mean over five points. Curves of
    few points are drawn as these points."""
    return _curves(frame, f"training loss ({frame.attrs.get('unit', _UNIT)})", smoothed=2)


def held_out_losses(frame: pd.DataFrame) -> Any:
    """Mean loss on the tasks' validation instances, over all instances or those of one task."""
    return _curves(frame, f"held-out loss ({frame.attrs.get('unit', _UNIT)})", smoothed=0)


def _curves(frame: pd.DataFrame, title: str, smoothed: int) -> Any:
    """Returns a chart of losses by step, for a chosen task if the frame has tasks.

    The strong line is the running mean with ``smoothed`` points on either side.
    """
    present = list(frame["series"].unique())
    series = frame.attrs.get("order") or present
    by_task = ["task"] if "task" in frame else []
    points_per_curve = frame.groupby(["series", "run", *by_task]).size()
    are_few = int(points_per_curve.max()) <= _FEW_POINTS
    if are_few:
        smoothed = 0
    pick = alt.selection_point(name="pick", fields=["series"], bind="legend")
    base = chart_of(_thinned(frame, by_task), chosen="".join(by_task)).encode(
        step_axis(), colour("series", series, present, symbolType="stroke"), detail="run:N"
    )
    base = base.transform_window(
        mean="mean(loss)",
        frame=[-smoothed, smoothed],
        sort=[alt.SortField("step")],
        groupby=["series", "run"],
    )

    pale = base.mark_line(strokeWidth=1, tooltip=None).encode(
        alt.Y("loss:Q").title(title).scale(zero=False),
        opacity=alt.condition(pick, alt.value(0.4), alt.value(0.05)),
    )
    strong = base.mark_line(strokeWidth=2.2, tooltip=None).encode(
        alt.StrokeDash("series:N")
        .scale(domain=series, range=_DASHES)
        .legend(legend(present, values=present, symbolType="stroke")),
        y="mean:Q",
        opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
    )
    # Of long curves the points are invisible: they are easier to hit with the pointer than a line.
    mean = alt.Tooltip("mean:Q", title="running mean", format=".3f")
    points = base.mark_point(size=60, filled=True, opacity=1 if are_few else 0).encode(
        y="mean:Q", tooltip=["run:N", "step:Q", "loss:Q", mean]
    )
    layers = points.add_params(pick) if are_few else strong + points.add_params(pick)
    chart = pale + layers
    if by_task:
        tasks = list(dict.fromkeys(frame["task"]))
        names = short_task_names(tasks)
        chart = chart.add_params(choice("task", tasks, [names[task] for task in tasks]))
    return chart.properties(height=280)


def _thinned(frame: pd.DataFrame, by_task: list[str]) -> pd.DataFrame:
    """Returns at most 250 points per curve, each the mean of adjacent log lines."""
    curve = ["series", "run", *by_task]
    curves = frame.groupby(curve, sort=False)
    lengths: Any = curves["step"].transform("size")
    # Rounded up, so that no curve has more points.
    lines_per_point = -(-lengths // _MOST_POINTS)
    point = curves.cumcount() // lines_per_point
    points = frame.groupby([*curve, point], sort=False)
    means = points.agg({"step": "last", "loss": "mean"})
    return means.round({"loss": 4}).reset_index(curve)


CURVES = [
    Figure("Training loss", "losses", loss_curves),
    Figure("Held-out loss", "held_out_losses", held_out_losses),
]


def task_gap(frame: pd.DataFrame) -> Any:
    """A circle is the model trained on the task alone, a diamond the model trained on all tasks. If
    the diamond is on the left, joint training lowered the score."""
    single, multi = models = ["one model per task", "one model for all"]
    rows = frame.sort_values("gap").rename(columns={"single": single, "multi": multi})
    tasks = short_task_names(dict.fromkeys(rows["task"]))
    values = [alt.Tooltip(f"{name}:Q", format=".1f") for name in (*models, "gap")]
    base = chart_of(rows, chosen="method").encode(task_rows(tasks), tooltip=["task:N", *values])

    start = alt.X(f"{single}:Q").title("Rouge-L").axis(tickCount=6)
    gaps = base.mark_rule(strokeWidth=2).encode(start, x2=f"{multi}:Q")
    marks = base.mark_point(filled=True, size=80, opacity=1).encode(
        colour("kind", models),
        alt.Shape("kind:N").scale(domain=models, range=["circle", "diamond"]),
        x="score:Q",
    )
    chart = gaps + marks.transform_fold(models, ["kind", "score"])
    chart = chart.add_params(choice("method", frame["method"]))
    return chart.properties(height=ROW * len(tasks))


def transfer(frame: pd.DataFrame) -> Any:
    """Each row is the model after one more task. Scores that decrease down a column show
    forgetting."""
    rows = frame.sort_values("stage", kind="stable")
    # The columns have the order of the rows, so that the diagonal is the task learnt last. A row
    # may stand for several tasks that were trained together.
    scored = {*rows["task"]}
    tasks = [
        task for task in dict.fromkeys([*rows["trained_task"], *rows["task"]]) if task in scored
    ]
    rows["task"] = pd.Categorical(rows["task"], tasks)
    look = Look(
        "Rouge-L",
        rows="after training on",
        columns="Rouge-L on",
        signed=False,
        least=100.0,
        form=".0f",
    )
    return heat_map(cells_of(rows, "trained_task", "task", "rouge_l"), look)


LEARNING = [
    Figure("One model per task and one model for all tasks", "task_gap", task_gap),
    Figure("Scores after each task of a sequence", "transfer", transfer, "square"),
]
