"""The figures of the report: :data:`FIGURES`, which turn a table's frame into a chart or a table of text.

To add one, write a function whose docstring is the caption and add it to :data:`FIGURES`. Tasks of tables with pairs of
tasks are categories, ordered so that similar tasks are next to each other (see ``badit.report.sources``).
"""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import altair as alt
import numpy as np
import pandas as pd

from badit.comparison.tables import best_of
from badit.metrics.answers import METRICS, score_text
from badit.report import charts
from badit.report.sources import shown_parameters
from badit.support.text import UNKNOWN, number

_PERIODS = {"before": "before regrouping", "after": "after regrouping", "training": "in training"}
_HELD_OUT = "held-out data"


class Figure(NamedTuple):
    """A figure or a table in a section of the page, made from the frame named ``table``.

    ``draw`` turns the frame into an Altair chart, a DataFrame of text, or None if there is nothing to show. Its
    docstring is the caption. Its name is the figure's name, with "-" for "_". ``width`` "square" is for matrices.
    """

    section: str
    title: str
    table: str
    draw: Callable[[pd.DataFrame], Any]
    width: Literal["full", "half", "square"] = "full"


def loss_curves(frame: pd.DataFrame) -> Any:
    """The pale line is the logged loss with a method's own term, such as a balance loss; in long logs, means of several
    lines. The strong line is its running mean over five points."""
    return _curves(frame, "training loss (nats per token)", smoothed=2)


def held_out_losses(frame: pd.DataFrame) -> Any:
    """Mean loss on the tasks' validation instances."""
    return _curves(frame, "held-out loss (nats per token)", smoothed=0)


def _curves(frame: pd.DataFrame, title: str, smoothed: int) -> Any:
    """Returns a chart of losses by step, and their running mean with ``smoothed`` points on either side."""
    present = list(frame["series"].unique())
    series = frame.attrs.get("order") or present
    pick = alt.selection_point(name="pick", fields=["series"], bind="legend")
    # At most 250 points per curve, each the mean of adjacent log lines.
    curves = frame.groupby(["series", "run"], sort=False)
    lengths: Any = curves["step"].transform("size")
    point = curves.cumcount() // -(-lengths // 250)
    thinned = frame.groupby(["series", "run", point], sort=False).agg(
        {"step": "last", "loss": "mean"}
    )
    base = charts.chart_of(thinned.round({"loss": 4}).reset_index(["series", "run"])).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=5)),
        color=_colour("series", series, present, symbolType="stroke"),
        detail="run:N",
    )
    window: dict[str, Any] = {"frame": [-smoothed, smoothed], "sort": [alt.SortField("step")]}
    base = base.transform_window(mean="mean(loss)", groupby=["series", "run"], **window)
    loss = alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False))
    raw = base.mark_line(strokeWidth=1, tooltip=None)
    raw = raw.encode(y=loss, opacity=alt.condition(pick, alt.value(0.4), alt.value(0.05)))
    # When the seven colours repeat, lines are dashed, then dotted.
    dashes = alt.Scale(domain=series, range=[[1, 0]] * 7 + [[6, 3]] * 7 + [[2, 2]] * 7)
    dash = alt.StrokeDash(
        "series:N", scale=dashes, legend=charts.legend(present, values=present, symbolType="stroke")
    )
    smooth = base.mark_line(strokeWidth=2.2, tooltip=None)
    smooth = smooth.encode(
        y="mean:Q", opacity=alt.condition(pick, alt.value(1), alt.value(0.1)), strokeDash=dash
    )
    tooltip = [
        "run:N",
        "step:Q",
        "loss:Q",
        alt.Tooltip("mean:Q", title="running mean", format=".3f"),
    ]
    spots = (
        base.mark_point(size=60, filled=True, opacity=0)
        .encode(y="mean:Q", tooltip=tooltip)
        .add_params(pick)
    )
    return alt.layer(raw, smooth, spots).properties(height=280)


def scores_by_task(frame: pd.DataFrame) -> Any:
    """One mark per task and run; in a comparison, per task and method (the mean over runs). Tasks are sorted by mean.
    Click the legend to highlight a run."""
    rows = frame.pivot_table("score", ["task", "run"], "metric", sort=False).round(3).reset_index()
    labels = {name: metric.label for name, metric in METRICS.items() if name in rows}
    present = list(frame["run"].unique())
    series = frame.attrs.get("order") or present
    order = (
        rows.groupby("task")[next(iter(labels))]
        .mean()
        .sort_values(ascending=False, kind="stable")
        .index.tolist()
    )
    pick = alt.selection_point(name="pick", fields=["run"], bind="legend")
    shapes = alt.Scale(
        domain=series,
        range=["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"],
    )
    tooltip = ["task:N", "run:N"]
    tooltip += [
        alt.Tooltip(f"{name}:Q", title=labels[name], format=f".{METRICS[name].decimals}f")
        for name in labels
    ]
    score = {
        "title": "score (0 to 100; NLL in nats)",
        "scale": alt.Scale(zero=True),
        "axis": alt.Axis(tickCount=6),
    }
    chart = (
        charts.chart_of(rows)
        .transform_calculate(score="datum[metric]")
        .mark_point(filled=True, size=75)
    )
    chart = chart.add_params(pick, charts.choice("metric", labels)).encode(
        x=alt.X("score:Q", **score),
        y=alt.Y(
            "task:N",
            title=None,
            sort=order,
            axis=charts.name_axis(charts.short_task_names(order), grid=True),
        ),
        color=_colour("run", series, present),
        shape=alt.Shape("run:N", scale=shapes, legend=charts.legend(present, values=present)),
        opacity=alt.condition(pick, alt.value(0.9), alt.value(0.08)),
        tooltip=tooltip,
    )
    return chart.properties(height=charts.ROW * len(order))


def scores_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Click a heading to sort. The last row has the means over tasks. The best of several runs is in bold."""
    several = len(set(frame["run"])) > 1
    tasks = frame["task"].unique()
    shown = pd.DataFrame({"task": [*tasks, "mean over tasks"]}, dtype=object)
    shown["instances"] = [number(n, ".0f") for n in frame.groupby("task")["n"].max()[tasks]] + [""]
    strong = []
    for metric, about in (
        (name, METRICS[name]) for name in METRICS if name in set(frame["metric"])
    ):
        scores = (
            frame[frame["metric"] == metric]
            .pivot_table("score", "task", "run", sort=False)
            .reindex(tasks)
        )
        values = np.vstack([scores, scores.mean()])
        headings = [f"{run}: {about.label}" if several else about.label for run in scores]
        shown[headings] = [[score_text(score, metric) for score in row] for row in values]
        if several:
            compared = (
                values if scores.notna().all(axis=None) else values[:-1]
            )  # not means of different tasks
            strong += [
                (i, headings[j])
                for i, row in enumerate(compared)
                for j in best_of(row, about.lower_is_better)
            ]
    shown.attrs |= {"footer": 1, "strong": strong}
    return shown


def methods(frame: pd.DataFrame) -> pd.DataFrame:
    """The output of badit table: mean ± standard deviation over runs, the best in bold."""
    return frame


def differences(frame: pd.DataFrame) -> Any:
    """Mean paired difference and its 95 % bootstrap interval over runs and instances. An interval that includes 0 (the
    dotted line) is not conclusive. An interval over one run covers no other seeds. The untuned model is left out."""
    tooltip = [
        "method:N",
        *(alt.Tooltip(f"{name}:Q", format="+.2f") for name in ("mean", "low", "high")),
    ]
    base = charts.chart_of(frame).encode(
        y=alt.Y("method:N", title=None, sort=None), tooltip=tooltip
    )
    x = alt.X(
        "low:Q",
        title=f"Rouge-L points above {frame['reference'].iloc[0]}",
        axis=alt.Axis(tickCount=6),
    )
    bars = base.mark_rule(style="interval", strokeWidth=2.5).encode(x=x, x2="high:Q")
    means = base.mark_point(filled=True, size=90, opacity=1).encode(x="mean:Q")
    zero = (
        charts.chart_of(pd.DataFrame({"zero": [0]}))
        .mark_rule(style="reference", tooltip=None)
        .encode(x="zero:Q")
    )
    return alt.layer(zero, bars, means).properties(height=charts.ROW * len(frame))


def task_gap(frame: pd.DataFrame) -> Any:
    """A circle is the model trained on the task alone, a diamond the model trained on all tasks. If the diamond is on
    the left, joint training lowered the score."""
    single, multi = kinds = ["one model per task", "one model for all"]
    rows = frame.sort_values("gap").rename(columns={"single": single, "multi": multi})
    order = list(dict.fromkeys(rows["task"]))
    y = alt.Y(
        "task:N", title=None, sort=order, axis=charts.name_axis(charts.short_task_names(order))
    )
    tooltip = ["task:N", *(alt.Tooltip(f"{name}:Q", format=".1f") for name in (*kinds, "gap"))]
    base = charts.chart_of(rows, chosen="method").encode(y=y, tooltip=tooltip)
    x = alt.X(f"{single}:Q", title="Rouge-L", axis=alt.Axis(tickCount=6))
    span = base.mark_rule(strokeWidth=2).encode(x=x, x2=f"{multi}:Q")
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=["circle", "diamond"]))
    marks = base.transform_fold(kinds, ["kind", "score"]).mark_point(
        filled=True, size=80, opacity=1
    )
    marks = marks.encode(x="score:Q", color=_colour("kind", kinds), shape=shape)
    chart = (span + marks).add_params(charts.choice("method", frame["method"]))
    return chart.properties(height=charts.ROW * len(order))


def transfer(frame: pd.DataFrame) -> Any:
    """Each row is the model after one more task. Scores that decrease down a column show forgetting."""
    rows = frame.sort_values("stage", kind="stable")
    rows["task"] = pd.Categorical(
        rows["task"], list(dict.fromkeys([*rows["trained_task"], *rows["task"]]))
    )
    titles = ("after training on", "Rouge-L on")
    style = {
        "signed": False,
        "limit": float(np.nanmax([*rows["rouge_l"], 1.0])),
        "form": ".0f",
        "written": True,
    }
    return charts.heat_map(
        rows, "trained_task", "task", "rouge_l", "Rouge-L", titles=titles, **style
    )


def _colour(
    field: str, names: Sequence[str], present: Sequence[str] = (), **options: Any
) -> alt.Color:
    """Returns an encoding with a colour for each name; the legend shows the names that are present (default: all)."""
    shown = charts.legend(present or names, **options, **({"values": present} if present else {}))
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names)), legend=shown)


def gradient_cosines(frame: pd.DataFrame) -> Any:
    """Blue pairs of tasks agree, orange pairs conflict. Gradients are those of the adapter's parameters, or of the
    model's weights if there is no adapter. For all layers and all modules, all gradients form one vector; otherwise the
    mean cosine is shown."""
    own = frame[frame["parameters"] == shown_parameters(frame)]
    together, single = own[own["layer"] == charts.ALL], own[own["layer"] != charts.ALL]
    choices = [charts.all_or_one(single, name) for name in ("layer", "module")]
    means = charts.with_all(single, "layer", "module")
    if len(together):
        means = pd.concat(
            [together, means[(means["layer"] != charts.ALL) | (means["module"] != charts.ALL)]]
        )
    return charts.heat_map(means, "task_a", "task_b", "cosine", "cosine", choices=choices)


def gradient_cosines_weights(frame: pd.DataFrame) -> Any:
    """Cosines of the gradients of the base model's weights, without the adapter's parameters."""
    weights = frame[frame["parameters"] != shown_parameters(frame)]
    return gradient_cosines(weights) if len(weights) else None


def conflict_rate_by_layer(frame: pd.DataFrame) -> Any:
    """Share of pairs of tasks whose gradients have a negative cosine."""
    return _by_layer(frame, "conflict_rate", "conflict rate", "%")


def reliability_by_layer(frame: pd.DataFrame) -> Any:
    """Cosine between the gradients of two halves of a task's instances, mean over tasks. If it is near 0, the cosines
    between tasks are noise."""
    return _by_layer(frame, "reliability", "reliability", ".2f")


def _by_layer(frame: pd.DataFrame, column: str, title: str, form: str) -> Any:
    """Returns a chart of a column of ``gradient_summary`` over the layers, with a line for each module."""
    rows = frame.loc[
        (frame["layer"] >= 0) & frame[column].notna(), ["layer", "module", "parameters", column]
    ]
    if rows.empty:
        return None
    layers = alt.Axis(format="d", tickCount=8, tickMinStep=1, grid=False)
    base = charts.chart_of(rows, chosen="parameters").encode(
        x=alt.X("layer:Q", title="layer", scale=alt.Scale(nice=False), axis=layers),
        y=alt.Y(
            f"{column}:Q",
            title=title,
            axis=alt.Axis(format=form, tickCount=5),
            scale=alt.Scale(domainMax=1),
        ),
        color=alt.Color("module:N", legend=charts.legend(rows["module"])),
    )
    size, opacity = (25, 1) if rows["layer"].nunique() <= 12 else (60, 0)
    chart = base.mark_line(strokeWidth=1.8, tooltip=None) + base.mark_point(
        filled=True, size=size, opacity=opacity
    )
    return chart.add_params(
        charts.choice("parameters", sorted(set(rows["parameters"])))
    ).properties(height=220)


def gradient_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """The corrected cosine removes the noise of few instances (a dash: too noisy). The magnitude similarity is 1 for
    gradients with equal norms. Of more than 120 pairs, those in the middle are left out."""
    rows = frame[
        (frame["parameters"] == shown_parameters(frame)) & frame["cosine"].notna()
    ].sort_values("cosine")
    rows = pd.concat([rows[:60], rows[60:][-60:]]).rename(
        columns={"task_a": "task", "task_b": "other_task"}
    )
    forms = {
        "task": "",
        "other_task": "",
        "cosine": ".3f",
        "corrected_cosine": ".2f",
        "magnitude_similarity": ".2f",
    }
    return charts.as_text(rows, forms)


def gradient_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """A task with a large norm has more effect on a mixed batch. A task with low reliability needs more instances."""
    forms = {"task": "", "norm": ".2f", "reliability": ".2f", "instances": ".0f", "parameters": ""}
    return charts.as_text(frame, forms)


def shared_units(frame: pd.DataFrame) -> Any:
    """Bars above the dashed line mean more sharing than by chance. Units that no task marks are not shown."""
    rows = frame[(frame["tasks"] > 0) & (frame["layer"] >= 0)]
    if rows.empty:
        return None
    names = ["measured", "by chance"]
    rows = rows.rename(columns={"kind": "units", "share": names[0], "chance": names[1]})
    long = rows.melt(["units", "layer", "tasks"], names, "series")
    choices = [
        charts.choice("units", frame["kind"]),
        charts.all_or_one(rows, "layer", "mean over layers"),
    ]
    base = charts.chart_by_choice(long, ["tasks", "series"], choices)[0].encode(
        x=alt.X("tasks:O", title="number of tasks that share a unit", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("value:Q", title="share of all units", axis=alt.Axis(format="%", tickCount=5)),
        color=_colour("series", names),
    )
    measured, by_chance = (base.transform_filter(f"datum.series === '{name}'") for name in names)
    chance = by_chance.mark_line(point=alt.OverlayMarkDef(size=36, filled=True), strokeDash=[4, 3])
    return (
        (measured.mark_bar(cornerRadiusEnd=2) + chance).add_params(*choices).properties(height=240)
    )


def units_of_tasks(frame: pd.DataFrame) -> Any:
    """Units of all layers that this task alone, some tasks or all tasks mark."""
    if len(set(frame["task"])) < 2:
        return None
    parts = ["this task alone", "some tasks", "all tasks"]
    some = frame["marked"] - frame["exclusive"] - frame["universal"]
    rows = frame.rename(columns={"exclusive": parts[0], "universal": parts[2]}).assign(
        **{parts[1]: some}
    )
    sums = rows.groupby(["kind", "task"], sort=False, observed=True)[parts].sum().reset_index()
    names = charts.names_in(frame, "task")
    long = sums.melt(["kind", "task"], parts, "part", "units")
    chart = charts.chart_of(
        long.assign(order=long["part"].map(parts.index)), chosen="kind"
    ).mark_bar()
    chart = chart.transform_joinaggregate(total="sum(units)", groupby=["task"])
    chart = chart.transform_calculate(share="datum.units / datum.total").encode(
        x=alt.X(
            "share:Q",
            title="share of the task's marked units",
            axis=alt.Axis(format="%", tickCount=5),
        ),
        y=alt.Y("task:N", title=None, sort=list(names), axis=charts.name_axis(names)),
        order=alt.Order("order:Q"),
        color=_colour("part", parts),
        tooltip=["task:N", "part:N", "units:Q", alt.Tooltip("share:Q", format=".1%")],
    )
    return chart.add_params(charts.choice("kind", frame["kind"])).properties(
        height=charts.ROW * len(names)
    )


def unit_overlaps(frame: pd.DataFrame) -> Any:
    """Jaccard overlap over all layers: units that both tasks mark, divided by units that either task marks."""
    choices, rows = [charts.choice("units", frame["kind"])], frame.rename(columns={"kind": "units"})
    return charts.heat_map(
        rows, "task_a", "task_b", "overlap", "overlap (Jaccard)", choices=choices, signed=False
    )


def expert_angles(frame: pd.DataFrame) -> Any:
    """Means over modules. Solid lines: the grouping made at that step, or the fixed one. Dashed lines: the previous
    grouping, on the same steps. Diamonds: the trained adapter on held-out data. Dotted line: 90°."""
    chart = _by_step(frame, "degrees", "angle (degrees)", zero=False)
    # A line at 90°, and invisible lines at 85° and 95°: a shorter scale would exaggerate small differences.
    lines = pd.DataFrame({"degrees": [85, 90, 95], "seen": [0, 1, 0]})
    right_angle = charts.chart_of(lines).mark_rule(style="reference", tooltip=None)
    right_angle = right_angle.encode(
        y="degrees:Q", opacity=alt.Opacity("seen:Q", scale=None, legend=None)
    )
    return None if chart is None else chart + right_angle


def expert_cosines(frame: pd.DataFrame) -> Any:
    """Mean |cosine| between components' gradients: 0 is orthogonal, and opposite directions count as similar."""
    return _by_step(frame, "abs_cos", "mean |cosine|", zero=True)


def _by_step(frame: pd.DataFrame, unit: str, title: str, *, zero: bool) -> Any:
    """Returns a chart of values within and between experts by step: means over modules, for all layers or one."""
    names = {**_PERIODS, "held-out": _HELD_OUT}
    rows = frame.assign(measured=frame["measured"].map(names)).dropna(subset=["step", "measured"])
    groups = ["within experts", "between experts"]
    rows = rows.rename(columns={f"within_{unit}": groups[0], f"between_{unit}": groups[1]})
    long = rows.melt(["step", "measured", "layer"], groups, "group").dropna(subset=["value"])
    if long.empty:
        return None
    choices = [charts.all_or_one(rows[rows["layer"] >= 0], "layer")]
    base = charts.chart_by_choice(long, ["step", "measured", "group"], choices)[0].encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=5)),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=zero)),
        color=_colour("group", groups),
    )
    shown, layers = set(long["measured"]), []
    if periods := [name for name in _PERIODS.values() if name in shown]:
        logged = base.transform_filter(f"datum.measured !== '{_HELD_OUT}'")
        dashes = alt.Scale(domain=periods, range=[[3, 3], [1, 0]][-len(periods) :])
        series = charts.legend(periods, symbolStrokeColor="#808690")  # visible in both themes
        dash = alt.StrokeDash("measured:N", scale=dashes, legend=series)
        layers.append(logged.mark_line(strokeWidth=2, tooltip=None).encode(strokeDash=dash))
        layers.append(logged.mark_point(filled=True, size=28, opacity=1))
    if _HELD_OUT in shown:
        diamond = alt.Scale(domain=[_HELD_OUT], range=["diamond"])
        shape = alt.Shape("measured:N", scale=diamond, legend=alt.Legend(title=None))
        finished = base.transform_filter(f"datum.measured === '{_HELD_OUT}'")
        layers.append(finished.mark_point(filled=True, size=110, opacity=1).encode(shape=shape))
    return alt.layer(*layers).add_params(*choices).properties(height=260)


def component_flow(frame: pd.DataFrame) -> Any:
    """Each row is an expert before the regrouping. Its cells show where its components went; those on the diagonal
    stayed. At most twelve regroupings are shown."""
    steps = np.unique(frame["step"])
    steps = steps[np.linspace(0, len(steps) - 1, min(len(steps), 12)).astype(int)]
    rows = charts.with_all(frame[frame["step"].isin(steps)], "layer")
    counts = (
        rows.groupby(["layer", "step", "from_expert", "to_expert"])["components"]
        .sum()
        .unstack(fill_value=0)
    )
    shares = (
        counts.div(counts.sum(axis="columns"), axis="rows").stack().rename("share").reset_index()
    )
    choices = [charts.all_or_one(frame[frame["layer"] >= 0], "layer")]
    choices.append(charts.choice("step", {str(step): f"step {step}" for step in steps}))
    style = {
        "titles": ("from expert", "to expert"),
        "signed": False,
        "limit": 1.0,
        "form": ".0%",
        "written": True,
    }
    label = "share of the expert's components"
    return charts.heat_map(
        shares, "from_expert", "to_expert", "share", label, choices=choices, **style
    )


def gates(frame: pd.DataFrame) -> Any:
    """Mean gate over a task's prompts: 1 is neutral, blue is larger, orange is smaller. The mean over layers has its
    own colour scale."""
    choices = [
        charts.all_or_one(frame, "layer", "mean over layers"),
        charts.all_or_one(frame, "module"),
    ]
    style = {"choices": choices, "titles": ("", "expert"), "middle": 1.0}
    return charts.heat_map(frame, "task", "expert", "mean", "mean gate", **style)


def gate_similarity(frame: pd.DataFrame) -> Any:
    """Correlation of two tasks' gates over all layers, after subtracting the mean over tasks."""
    return charts.heat_map(frame, "task_a", "task_b", "similarity", "correlation", limit=1.0)


def expert_losses(frame: pd.DataFrame) -> Any:
    """Increase of a task's loss with an expert's gates set to 0 in all layers. Blue: the task needs the expert. Orange:
    the loss is lower without it. If an expert started as a part of the pretrained weight, that part is removed too, so
    its values are large whatever it learnt."""
    label, titles = "increase of the loss (nats per token)", ("", "disabled expert")
    return charts.heat_map(frame, "task", "expert", "change", label, titles=titles, written=True)


def abilities(frame: pd.DataFrame) -> pd.DataFrame:
    """If an expert started as a part of the pretrained weight, the increase of the loss includes the effect of
    removing that part."""
    named = frame[["tasks", "hurt_most"]].replace(re.compile(r"\btask(\d+)_([^\W_]+)\w*"), r"\1 \2")
    forms = {
        "expert": ".0f",
        "mean_gate": ".2f",
        "spread": ".3f",
        "change": ".3f",
        "tasks": "",
        "hurt_most": "",
    }
    headings = {"spread": "spread over tasks", "change": "loss increase without it"}
    headings |= {
        "tasks": "tasks with largest gates",
        "hurt most": "tasks with largest loss increase",
    }
    return charts.as_text(frame.assign(**named.replace({"": UNKNOWN})), forms).rename(
        columns=headings
    )


def nearest_prompts(frame: pd.DataFrame) -> pd.DataFrame:
    """Prompts of the measured instances, ranked by their gate for the expert relative to the other prompts."""
    forms = {"expert": ".0f", "rank": ".0f", "task": "", "prompt": ""}
    return charts.as_text(frame.sort_values(["expert", "rank"]), forms)


def ability_recovery(frame: pd.DataFrame) -> pd.DataFrame:
    """The p-value is the share of random permutations of the tasks' abilities with at least the same value."""
    measures = {
        "correlation": "correlation of gate similarity with known abilities",
        "nearest_neighbour": "share of tasks whose nearest neighbour shares an ability",
    }
    forms = {"measure": "", "value": ".2f", "chance": ".2f", "p_value": ".4f"}
    return charts.as_text(frame.replace({"measure": measures}), forms)


FIGURES = [  # in the order of the page
    Figure("scores", "Methods", "methods", methods),
    Figure("scores", "Differences", "differences", differences),
    Figure("scores", "Scores by task", "scores", scores_by_task),
    Figure("scores", "Table of scores by task", "scores", scores_table),
    Figure("curves", "Training loss", "losses", loss_curves),
    Figure("curves", "Held-out loss", "held_out_losses", held_out_losses),
    Figure(
        "gradients",
        "Cosine between tasks' gradients",
        "gradient_cosines",
        gradient_cosines,
        "square",
    ),
    Figure(
        "gradients",
        "Cosine of weight gradients",
        "gradient_cosines",
        gradient_cosines_weights,
        "square",
    ),
    Figure(
        "gradients", "Conflict rate by layer", "gradient_summary", conflict_rate_by_layer, "half"
    ),
    Figure("gradients", "Reliability by layer", "gradient_summary", reliability_by_layer, "half"),
    Figure(
        "gradients",
        "Pairs of tasks, the most conflicting first",
        "gradient_overall",
        gradient_pairs,
    ),
    Figure("gradients", "Gradients of single tasks", "gradient_tasks", gradient_tasks),
    Figure("units", "Units shared by k tasks", "coactivation", shared_units),
    Figure("units", "Units marked by one, some or all tasks", "coactivation_tasks", units_of_tasks),
    Figure(
        "units",
        "Overlap of marked units between tasks",
        "coactivation_pairs",
        unit_overlaps,
        "square",
    ),
    Figure("geometry", "Angles within and between experts", "expert_angles", expert_angles, "half"),
    Figure(
        "geometry",
        "Mean |cosine| within and between experts",
        "expert_angles",
        expert_cosines,
        "half",
    ),
    Figure(
        "geometry", "Components moved by regrouping", "component_flow", component_flow, "square"
    ),
    Figure("atlas", "Mean gates by task", "gates", gates, "square"),
    Figure("atlas", "Similarity of the tasks' gates", "gate_similarity", gate_similarity, "square"),
    Figure(
        "atlas", "Increase of the loss without an expert", "expert_losses", expert_losses, "square"
    ),
    Figure("atlas", "Summary of each expert", "abilities", abilities),
    Figure(
        "atlas",
        "Prompts with the largest gates for each expert",
        "nearest_prompts",
        nearest_prompts,
    ),
    Figure(
        "atlas", "Agreement of gates with known abilities", "ability_recovery", ability_recovery
    ),
    Figure("learning", "One model per task and one model for all tasks", "task_gap", task_gap),
    Figure("learning", "Scores after each task of a sequence", "transfer", transfer, "square"),
]
