"""Figures of the interference between tasks: their gradients, and the units that they share."""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from badit.analysis.verdict import of_shown_parameters, within_noise
from badit.report.charts import (
    ALL,
    ROW,
    Figure,
    all_or_one,
    as_text,
    chart_by_choice,
    chart_of,
    choice,
    colour,
    legend,
    names_in,
    task_rows,
    with_all,
)
from badit.report.heat_maps import Look, cells_of_pairs, heat_map
from badit.support.text import number

_PAIRS_AT_EACH_END = 60


def gradient_cosines(frame: pd.DataFrame) -> Any:
    """Blue: a cosine above 0, orange: below 0; the scale has at least the range −0.25 to 0.25.
    Hatched: within noise, as the 95 % interval over instances includes 0 (all layers and modules
    together only). Gradients are those of the adapter's parameters, or of the model's weights if
    there is no adapter. For all layers and all modules, all gradients form one vector; otherwise
    the mean cosine is shown."""
    shown = of_shown_parameters(frame)
    overall = shown.query(f"layer == '{ALL}'")
    single = shown.query(f"layer != '{ALL}'")
    means = with_all(single, "layer", "module")
    if len(overall):
        # The mean of all layers and modules would hide the cosine of whole gradients.
        partial = means.query(f"layer != '{ALL}' or module != '{ALL}'")
        means = pd.concat([overall, partial])
    choices = [all_or_one(single, "layer"), all_or_one(single, "module")]
    cells = cells_of_pairs(means, "cosine")
    noise = None
    if len(overall):
        noise = cells_of_pairs(overall[within_noise(overall)], "cosine")
    return heat_map(cells, Look("cosine", least=0.25), choices, noise)


def gradient_cosines_weights(frame: pd.DataFrame) -> Any:
    """Cosines of the gradients of the base model's weights, without the adapter's parameters."""
    weights = frame.query("parameters != parameters.min()")
    if weights.empty:
        return None
    return gradient_cosines(weights)


def conflict_rate_by_layer(frame: pd.DataFrame) -> Any:
    """Share of the decided pairs of tasks that conflict: both gradients are reliable, and their
    cosine, corrected for noise, is negative. Modules without a decided pair are not shown."""
    return _by_layer(frame, "conflict_rate", "%")


def gradient_conflicts(frame: pd.DataFrame) -> pd.DataFrame:
    """A pair of tasks is decided if the signal of both gradients, the share of their squared norm
    that is not noise, is at least 0.7. It conflicts if the cosine, corrected for noise, is then
    negative. The numbers of instances are predictions (Spearman–Brown)."""
    rows = []
    for parameters, pairs in frame.groupby("parameters", sort=False):
        decided = pairs["conflict"].dropna()
        needed = pairs["instances_needed"].fillna(np.inf)
        rows.append(
            {
                "gradients of": parameters,
                "pairs": f"{len(pairs)}",
                "decided": f"{len(decided)}",
                "answer": _answer(len(pairs), int(decided.sum()), len(decided)),
                "instances for half of the pairs": _instances(needed.quantile(0.5, "lower")),
                "instances for all pairs": _instances(needed.max()),
            }
        )
    return pd.DataFrame(rows, dtype=object)


def _answer(pairs: int, conflicts: int, decided: int) -> str:
    if not decided:
        return "this data does not decide"
    answer = f"{conflicts} of {decided} decided pairs conflict"
    if decided < pairs:
        answer += f"; this data does not decide the other {pairs - decided}"
    return answer


def _instances(count: float) -> str:
    """Returns a number of instances per task; unknown if it is infinite."""
    return number(count, ".0f") if np.isfinite(count) else "unknown"


def reliability_by_layer(frame: pd.DataFrame) -> Any:
    """Cosine between the gradients of two halves of a task's instances, mean over tasks. If it is
    near 0, the cosines between tasks are noise."""
    return _by_layer(frame, "reliability", ".2f")


def _by_layer(frame: pd.DataFrame, column: str, form: str) -> Any:
    """Returns a chart of a column of ``gradient_summary`` over the layers, a line per module."""
    columns = ["layer", "module", "parameters", column]
    rows = frame.query("layer >= 0")[columns].dropna()
    if rows.empty:
        return None
    base = chart_of(rows, chosen="parameters").encode(
        alt.X("layer:Q")
        .title("layer")
        .scale(nice=False)
        .axis(format="d", values=_some_layers(rows["layer"]), grid=False),
        alt.Y(f"{column}:Q")
        .title(column.replace("_", " "))
        .scale(domainMax=1)
        .axis(format=form, tickCount=5),
        alt.Color("module:N").legend(legend(rows["module"])),
    )
    lines = base.mark_line(strokeWidth=1.8, tooltip=None)
    # With many layers, points would hide the line, but their tooltips are still needed.
    few = len(set(rows["layer"])) <= 12
    size, opacity = (25, 1) if few else (60, 0)
    points = base.mark_point(filled=True, size=size, opacity=opacity)
    chart = (lines + points).add_params(choice("parameters", sorted(rows["parameters"])))
    return chart.properties(height=220)


def _some_layers(layers: pd.Series) -> list[int]:
    """Returns at most nine evenly spaced layers, from the first one on, for an axis."""
    first, last = int(layers.min()), int(layers.max())
    return list(range(first, last + 1, 1 + (last - first) // 8))


def gradient_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Low and high are the ends of the cosine's 95 % interval over instances. The corrected cosine
    removes the noise of few instances (a dash: too noisy). A conflict is stated only for decided
    pairs; for the others, the number of instances per task that would decide them. The magnitude
    similarity is 1 for gradients with equal norms. Of more than 120 pairs, those in the middle are
    left out."""
    rows = of_shown_parameters(frame).dropna(subset="cosine").sort_values("cosine")
    lowest = rows[:_PAIRS_AT_EACH_END]
    # Not among the lowest, so that no pair of few is listed twice.
    highest = rows[_PAIRS_AT_EACH_END:][-_PAIRS_AT_EACH_END:]
    rows = pd.concat([lowest, highest]).rename(columns={"task_a": "task", "task_b": "other_task"})
    forms = {
        "task": "",
        "other_task": "",
        "cosine": ".3f",
        "low": ".2f",
        "high": ".2f",
        "corrected_cosine": ".2f",
        "magnitude_similarity": ".2f",
    }
    texts = as_text(rows, forms)
    needed = rows["instances_needed"].fillna(np.inf).map(_instances)
    texts["conflict"] = rows["conflict"].map({1.0: "yes", 0.0: "no"})
    texts["conflict"] = texts["conflict"].fillna("not decided: " + needed + " instances")
    return texts


def gradient_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """A task with a large norm has more effect on a mixed batch. The signal is the reliability of
    the whole gradient; a task whose signal is below 0.7 needs more instances (predicted)."""
    forms = {
        "task": "",
        "norm": ".2f",
        "reliability": ".2f",
        "signal": ".2f",
        "instances": ".0f",
        "instances_needed": ".0f",
        "parameters": "",
    }
    return as_text(frame, forms)


GRADIENTS = [
    Figure("Conflicts that this data decides", "gradient_overall", gradient_conflicts),
    Figure("Cosine between tasks' gradients", "gradient_cosines", gradient_cosines, "square"),
    Figure("Cosine of weight gradients", "gradient_cosines", gradient_cosines_weights, "square"),
    Figure("Conflict rate by layer", "gradient_summary", conflict_rate_by_layer, "half"),
    Figure("Reliability by layer", "gradient_summary", reliability_by_layer, "half"),
    Figure("Pairs of tasks, the lowest cosine first", "gradient_overall", gradient_pairs),
    Figure("Gradients of single tasks", "gradient_tasks", gradient_tasks),
]


def shared_units(frame: pd.DataFrame) -> Any:
    """Bars above the dashed line mean more sharing than by chance. Units that no task marks are not
    shown."""
    rows = frame.query("tasks > 0 and layer >= 0")
    if rows.empty:
        return None
    series = ["measured", "by chance"]
    rows = rows.rename(columns={"kind": "units", "share": "measured", "chance": "by chance"})
    shares = rows.melt(["units", "layer", "tasks"], series, "series")
    choices = [choice("units", frame["kind"]), all_or_one(rows, "layer", "mean over layers")]
    base, _ = chart_by_choice(shares, ["tasks", "series"], choices)
    base = base.encode(
        alt.X("tasks:O").title("number of tasks that share a unit").axis(labelAngle=0),
        alt.Y("value:Q").title("share of all units").axis(format="%", tickCount=5),
        colour("series", series),
    )
    bars = base.transform_filter("datum.series === 'measured'").mark_bar(cornerRadiusEnd=2)
    points = alt.OverlayMarkDef(size=36, filled=True)
    line = base.transform_filter("datum.series === 'by chance'")
    line = line.mark_line(point=points, strokeDash=[4, 3])
    return (bars + line).add_params(*choices).properties(height=240)


def units_of_tasks(frame: pd.DataFrame) -> Any:
    """Units of all layers that this task alone, some tasks or all tasks mark."""
    # A single task has nothing to share units with.
    if len(set(frame["task"])) < 2:
        return None
    groups = ["this task alone", "some tasks", "all tasks"]
    rows = frame.rename(columns={"exclusive": "this task alone", "universal": "all tasks"})
    rows["some tasks"] = frame["marked"] - frame["exclusive"] - frame["universal"]
    sums = rows.groupby(["kind", "task"], sort=False, observed=True)[groups].sum().reset_index()
    units = sums.melt(["kind", "task"], groups, "part", "units")
    units["order"] = units["part"].map(groups.index)

    tasks = names_in(frame, "task")
    chart = (
        chart_of(units, chosen="kind")
        .mark_bar()
        .encode(
            alt.X("share:Q")
            .title("share of the task's marked units")
            .axis(format="%", tickCount=5),
            task_rows(tasks),
            colour("part", groups),
            order=alt.Order("order:Q"),
            tooltip=["task:N", "part:N", "units:Q", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    # Computed in the chart, after it has selected the chosen kind of unit.
    chart = chart.transform_joinaggregate(total="sum(units)", groupby=["task"])
    chart = chart.transform_calculate(share="datum.units / datum.total")
    chart = chart.add_params(choice("kind", frame["kind"]))
    return chart.properties(height=ROW * len(tasks))


def unit_overlaps(frame: pd.DataFrame) -> Any:
    """Jaccard overlap over all layers: units that both tasks mark, divided by units that either
    task marks."""
    rows = frame.rename(columns={"kind": "units"})
    look = Look("overlap (Jaccard)", signed=False)
    return heat_map(cells_of_pairs(rows, "overlap"), look, [choice("units", rows["units"])])


UNITS = [
    Figure("Units shared by k tasks", "coactivation", shared_units),
    Figure("Units marked by one, some or all tasks", "coactivation_tasks", units_of_tasks),
    Figure("Overlap of marked units between tasks", "coactivation_pairs", unit_overlaps, "square"),
]
