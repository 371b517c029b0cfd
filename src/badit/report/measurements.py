"""Figures of what an analysis measures: gradients, co-activation, experts, and learning together or in sequence.

To add one, write a function from a table's frame to a chart and add it to :data:`FIGURES`. Tasks of tables that pair
them are categories, whose order puts similar tasks next to one another (see ``badit.report.sources``).
"""

# pandas' own types make every selection a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from badit.report.charts import (
    ALL,
    ROW,
    Figure,
    chart_of,
    choice,
    chosen,
    heat_map,
    layer_choice,
    legend,
    module_choice,
    names_in,
    values_by_choice,
    with_all,
)
from badit.report.formatting import UNKNOWN, shortened, text_table

_MOST_PAIRS = 120
_MOST_STEPS = 12
_MOST_SPOTS = 12
_ROOM = 46  # letters in a row of the legend of a chart without long names on the left
_NEUTRAL = "#808690"  # visible on a light page and on a dark one
_MEASURED = {
    "before": "before regrouping",
    "after": "after regrouping",
    "training": "in training",
    "held-out": "held-out data",
}
_MEASURES = {
    "correlation": "correlation of gates with known abilities",
    "nearest_neighbour": "tasks whose nearest neighbour shares an ability",
}


def gradient_cosines(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Blue pairs of tasks agree and orange ones conflict, of the adapter's parameters where there is an adapter and
    else of the model's weights; with all layers and all modules the gradients are taken as one vector, otherwise the
    cosines' mean is shown."""
    frame = frame[frame["parameters"] == _kinds(frame)[0]].rename(columns={"cosine": "value"})
    together, single = frame[frame["layer"] == ALL], frame[frame["layer"] != ALL]
    means = with_all(single, "layer", "module")
    if len(together):
        means = means[(means["layer"] != ALL) | (means["module"] != ALL)]
    choices = [layer_choice(single["layer"].astype(int)), module_choice(single["module"])]
    rows = pd.concat([together, means])
    return heat_map(rows, "task_a", "task_b", "cosine", choices=choices, symmetric=True)


def gradient_cosines_weights(frame: pd.DataFrame) -> alt.TopLevelMixin | None:
    """The same for the weights that the adapter adds to."""
    other = _kinds(frame)[1:]
    return gradient_cosines(frame[frame["parameters"] == other[0]]) if other else None


def conflict_rate_by_layer(frame: pd.DataFrame) -> alt.TopLevelMixin | None:
    """Share of pairs of tasks whose gradients have a negative cosine."""
    return _by_layer(frame, "conflict_rate", "conflict rate", "%")


def reliability_by_layer(frame: pd.DataFrame) -> alt.TopLevelMixin | None:
    """Cosine between gradients on two halves of a task's instances, mean over tasks: near 0, the cosines between tasks
    are noise."""
    return _by_layer(frame, "reliability", "reliability", ".2f")


def _by_layer(frame: pd.DataFrame, column: str, title: str, form: str) -> alt.TopLevelMixin | None:
    """A column of ``gradient_summary`` over the layers, a line for each module."""
    rows = frame.loc[(frame["layer"] >= 0) & frame[column].notna(), ["layer", "module", "parameters", column]]
    if rows.empty:
        return None
    layers = alt.Axis(format="d", tickCount=8, grid=False)
    base = chart_of(rows).transform_filter("datum.parameters === parameters")
    base = base.encode(
        x=alt.X("layer:Q", title="layer", scale=alt.Scale(nice=False), axis=layers),
        y=alt.Y(f"{column}:Q", title=title, axis=alt.Axis(format=form, tickCount=5)),
        color=alt.Color("module:N", legend=legend(rows["module"], room=_ROOM)),
    )
    few = rows["layer"].nunique() <= _MOST_SPOTS
    spots = base.mark_point(filled=True, size=25 if few else 60, opacity=1 if few else 0)
    chart = base.mark_line(strokeWidth=1.8, tooltip=None) + spots
    return chart.add_params(choice("parameters", _kinds(rows))).properties(width="container", height=220)


def gradient_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """The corrected cosine is without the noise of few instances (a dash: too noisy to tell), magnitude similarity is 1
    where both gradients are equally large, and of more than 120 pairs those in the middle are left out."""
    rows = frame[(frame["parameters"] == _kinds(frame)[0]) & frame["cosine"].notna()].sort_values("cosine")
    if len(rows) > _MOST_PAIRS:
        rows = pd.concat([rows[: _MOST_PAIRS // 2], rows[-_MOST_PAIRS // 2 :]])
    rows = rows.rename(columns={"task_a": "task", "task_b": "other_task"})
    decimals = {"task": None, "other_task": None, "cosine": 3, "corrected_cosine": 2, "magnitude_similarity": 2}
    return text_table(rows, decimals)


def gradient_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """A task with a large norm weighs more in a mixed batch; one with low reliability needs more instances."""
    return text_table(frame, {"task": None, "norm": 2, "reliability": 2, "instances": 0, "parameters": None})


def shared_units(frame: pd.DataFrame) -> alt.TopLevelMixin | None:
    """Bars above the dashed line are more sharing than by chance; units marked for no task are not drawn."""
    rows = frame[(frame["tasks"] > 0) & (frame["layer"] >= 0)]
    if rows.empty:
        return None
    series = {"share": "measured", "chance": "by chance"}
    long = rows.rename(columns={"kind": "units"}).melt(["units", "layer", "tasks"], list(series), "series")
    long["series"] = long["series"].map(series)
    choices = [choice("units", frame["kind"]), layer_choice(rows["layer"], "mean over layers")]
    names = list(series.values())
    base = chosen(values_by_choice(with_all(long, "layer"), ["tasks", "series"], choices), choices).encode(
        x=alt.X("tasks:O", title="number of tasks that share a unit", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("value:Q", title="share of all units", axis=alt.Axis(format="%", tickCount=5)),
        color=alt.Color("series:N", scale=alt.Scale(domain=names), legend=legend(names)),
    )
    bars = base.transform_filter("datum.series === 'measured'").mark_bar(cornerRadiusEnd=2)
    chance = base.transform_filter("datum.series === 'by chance'").mark_line(
        point=alt.OverlayMarkDef(size=36, filled=True), strokeDash=[4, 3]
    )
    return (bars + chance).add_params(*choices).properties(width="container", height=240)


def units_of_tasks(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Units of all layers, marked for this task alone, for some others too, or for all of them."""
    parts = ["this task alone", "some tasks", "all tasks"]
    columns = ["marked", "exclusive", "universal"]
    sums = frame.groupby(["kind", "task"], sort=False, observed=True)[columns].sum().reset_index()
    middle = sums["marked"] - sums["exclusive"] - sums["universal"]
    sums = sums.assign(**dict(zip(parts, [sums["exclusive"], middle, sums["universal"]], strict=True)))
    names = names_in(frame, "task")
    long = sums.melt(["kind", "task"], parts, "part", "units").rename(columns={"task": "full"})
    long = long.assign(task=long["full"].map(names), order=long["part"].map(parts.index))
    chart = (
        chart_of(long)
        .transform_filter("datum.kind === kind")
        .transform_joinaggregate(total="sum(units)", groupby=["task"])
        .transform_calculate(share="datum.units / datum.total")
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title="share of the task's marked units", axis=alt.Axis(format="%", tickCount=5)),
            y=alt.Y("task:N", title=None, sort=list(names.values())),
            order=alt.Order("order:Q"),
            color=alt.Color("part:N", scale=alt.Scale(domain=parts), legend=legend(parts)),
            tooltip=[alt.Tooltip("full:N", title="task"), "part:N", "units:Q", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    return chart.add_params(choice("kind", frame["kind"])).properties(width="container", height=ROW * len(names))


def unit_overlaps(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Jaccard overlap over all layers: units marked for both tasks, of those marked for either."""
    rows = frame.rename(columns={"kind": "units", "overlap": "value"})
    units = choice("units", rows["units"])
    return heat_map(rows, "task_a", "task_b", "overlap (Jaccard)", choices=[units], signed=False, symmetric=True)


def expert_angles(frame: pd.DataFrame) -> alt.TopLevelMixin | None:
    """Means over modules: solid lines are the grouping made at that step, dashed ones the grouping before it on the
    same steps, diamonds the finished adapter on held-out data, the dotted line 90°."""
    chart = _by_step(frame, "degrees", "angle (degrees)", zero=False)
    # A line at 90°, and invisible ones 5° to both sides: a shorter scale would exaggerate small differences.
    lines = pd.DataFrame({"degrees": [85, 90, 95], "seen": [0, 1, 0]})
    right_angle = chart_of(lines).mark_rule(style="reference", tooltip=None)
    right_angle = right_angle.encode(y="degrees:Q", opacity=alt.Opacity("seen:Q", scale=None, legend=None))
    return None if chart is None else chart + right_angle


def expert_cosines(frame: pd.DataFrame) -> alt.TopLevelMixin | None:
    """Mean |cosine| between components' gradients: 0 is orthogonal, and opposite directions count as near."""
    return _by_step(frame, "abs_cos", "mean |cosine|", zero=True)


def _by_step(frame: pd.DataFrame, unit: str, title: str, *, zero: bool) -> Any:
    """Within and between experts by step: means over modules, of all layers or one."""
    step = frame["step"].where(frame["step"].notna() | (frame["measured"] != "held-out"), frame["step"].max())
    rows = frame.assign(step=step, measured=frame["measured"].map(_MEASURED)).dropna(subset=["step", "measured"])
    groups = {f"within_{unit}": "within experts", f"between_{unit}": "between experts"}
    long = rows.melt(["step", "measured", "layer"], list(groups), "group").dropna(subset=["value"])
    if long.empty:
        return None
    long["group"] = long["group"].map(groups)
    choices = [layer_choice(rows.loc[rows["layer"] >= 0, "layer"])]
    names = list(groups.values())
    base = chosen(values_by_choice(with_all(long, "layer"), ["step", "measured", "group"], choices), choices).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=5)),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=zero)),
        color=alt.Color("group:N", scale=alt.Scale(domain=names), legend=legend(names, room=_ROOM)),
    )
    shown = [name for name in _MEASURED.values() if name in set(long["measured"])]
    held_out = _MEASURED["held-out"]
    logged = base.transform_filter(f"datum.measured !== '{held_out}'")
    layers = []
    if periods := [name for name in shown if name != held_out]:
        dashes = alt.Scale(domain=periods, range=[[3, 3], [1, 0]] if len(periods) > 1 else [[1, 0]])
        series = legend(periods, room=_ROOM, symbolStrokeColor=_NEUTRAL)
        dash = alt.StrokeDash("measured:N", scale=dashes, legend=series)
        layers.append(logged.mark_line(strokeWidth=2, tooltip=None).encode(strokeDash=dash))
        layers.append(logged.mark_point(filled=True, size=28, opacity=1))
    if held_out in shown:
        diamond = alt.Scale(domain=[held_out], range=["diamond"])
        shape = alt.Shape("measured:N", scale=diamond, legend=alt.Legend(title=None))
        finished = base.transform_filter(f"datum.measured === '{held_out}'")
        layers.append(finished.mark_point(filled=True, size=110, opacity=1).encode(shape=shape))
    return alt.layer(*layers).add_params(*choices).properties(width="container", height=260)


def component_flow(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """A row is an expert before the regrouping and its cells are where its components went, so the diagonal stayed; at
    most twelve regroupings are shown."""
    steps = sorted(frame["step"].unique())
    if len(steps) > _MOST_STEPS:
        steps = [steps[i * (len(steps) - 1) // (_MOST_STEPS - 1)] for i in range(_MOST_STEPS)]
    experts = range(1 + frame[["from_expert", "to_expert"]].max().max())
    rows = with_all(frame[frame["step"].isin(steps)], "layer")
    counts = rows.groupby(["layer", "step", "from_expert", "to_expert"])["components"].sum().unstack(fill_value=0)
    counts = counts.reindex(columns=pd.Index(experts, name="to_expert"), fill_value=0)
    shares = counts.div(counts.sum(axis="columns"), axis="rows").stack().rename("value").reset_index()
    shares = shares.assign(**{name: pd.Categorical(shares[name], experts) for name in ("from_expert", "to_expert")})
    choices = [
        layer_choice(frame.loc[frame["layer"] >= 0, "layer"]),
        choice("step", {str(step): f"step {step}" for step in steps}),
    ]
    return heat_map(
        shares,
        "from_expert",
        "to_expert",
        "share of the expert's components",
        choices=choices,
        row_title="from expert",
        column_title="to expert",
        signed=False,
        limit=1.0,
        form=".0%",
        written=True,
    )


def gates(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Mean gate over a task's prompts: 1 is neutral, blue is more, orange is less; the mean over layers has its own
    colour scale."""
    choices = [layer_choice(frame["layer"], "mean over layers"), module_choice(frame["module"])]
    rows = with_all(_with_every_expert(frame).rename(columns={"mean": "value"}), "layer", "module")
    return heat_map(rows, "task", "expert", "mean gate", choices=choices, column_title="expert", middle=1.0)


def gate_similarity(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Correlation of two tasks' gates over all layers, without what all tasks have in common."""
    rows = frame.rename(columns={"similarity": "value"})
    return heat_map(rows, "task_a", "task_b", "correlation", limit=1.0, symmetric=True)


def expert_losses(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Rise of a task's loss when an expert's gates are 0 in all layers: blue tasks need the expert, orange ones would
    do better without."""
    rows = _with_every_expert(frame).rename(columns={"change": "value"})
    label, column = "rise of the loss (nats per token)", "expert switched off"
    return heat_map(rows, "task", "expert", label, column_title=column, written=True)


def abilities(frame: pd.DataFrame) -> pd.DataFrame:
    """The sentence in the last column is made from the numbers before it."""
    headings = {"tasks": "drawn_on_most_by", "hurt_most": "missed_most_by", "summary": "in_words"}
    rows = frame.assign(**{name: [shortened(text) or UNKNOWN for text in frame[name]] for name in headings})
    rows = rows.rename(columns={**headings, "spread": "spread_over_tasks", "change": "rise_of_the_loss_without_it"})
    numbers = {"mean_gate": 2, "spread_over_tasks": 3, "rise_of_the_loss_without_it": 3}
    return text_table(
        rows, {"expert": 0, "drawn_on_most_by": None, "missed_most_by": None, **numbers, "in_words": None}
    )


def nearest_prompts(frame: pd.DataFrame) -> pd.DataFrame:
    """Prompts of the measured instances by their gate for the expert."""
    rows = frame.sort_values(["expert", "rank"])
    return text_table(rows, {"expert": 0, "rank": 0, "task": None, "prompt": None})


def ability_recovery(frame: pd.DataFrame) -> pd.DataFrame:
    """The p-value is the share of random reassignments of the built-in tasks' abilities that do at least as well."""
    rows = frame.replace({"measure": _MEASURES})
    return text_table(rows, {"measure": None, "value": 2, "chance": 2, "p_value": 4})


def _kinds(frame: pd.DataFrame) -> list[str]:
    """What gradients are over: the adapter's parameters before the weights that they adapt."""
    return sorted(frame["parameters"].unique(), key=lambda kind: (kind != "adapter", kind))


def _with_every_expert(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(expert=pd.Categorical(frame["expert"], range(1 + frame["expert"].max())))


FIGURES = [
    Figure("gradients", "Cosine between tasks' gradients", "gradient_cosines", gradient_cosines, "square"),
    Figure("gradients", "The same of the weights", "gradient_cosines", gradient_cosines_weights, "square"),
    Figure("gradients", "Conflict rate by layer", "gradient_summary", conflict_rate_by_layer, "half"),
    Figure("gradients", "Reliability by layer", "gradient_summary", reliability_by_layer, "half"),
    Figure("gradients", "Pairs of tasks, the most conflicting first", "gradient_overall", gradient_pairs),
    Figure("gradients", "Gradients of single tasks", "gradient_tasks", gradient_tasks),
    Figure("units", "Units shared by k tasks", "coactivation", shared_units),
    Figure("units", "What each task has to itself", "coactivation_tasks", units_of_tasks),
    Figure("units", "Overlap of marked units between tasks", "coactivation_pairs", unit_overlaps, "square"),
    Figure("geometry", "Angles within and between experts", "expert_angles", expert_angles, "half"),
    Figure("geometry", "The same without signs", "expert_angles", expert_cosines, "half"),
    Figure("geometry", "Where regrouping took the components", "component_flow", component_flow, "square"),
    Figure("atlas", "What each task draws on", "gates", gates, "square"),
    Figure("atlas", "Tasks that draw on the same experts", "gate_similarity", gate_similarity, "square"),
    Figure("atlas", "What is lost without an expert", "expert_losses", expert_losses, "square"),
    Figure("atlas", "The experts one by one", "abilities", abilities),
    Figure("atlas", "The prompts that draw on each expert most", "nearest_prompts", nearest_prompts),
    Figure("atlas", "Do gates find the tasks' known abilities?", "ability_recovery", ability_recovery),
]
