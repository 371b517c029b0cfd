"""Figures of the experts: their geometry, and the atlas of the abilities that they learn."""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import re
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from badit.report.charts import (
    Figure,
    all_or_one,
    as_text,
    chart_by_choice,
    chart_of,
    choice,
    colour,
    legend,
    step_axis,
    with_all,
)
from badit.report.heat_maps import Look, cells_of, cells_of_pairs, heat_map
from badit.support.text import UNKNOWN

_PERIODS = {"before": "before regrouping", "after": "after regrouping", "training": "in training"}
_HELD_OUT = "held-out data"
_GREY = "#808690"  # visible in both themes
_MOST_REGROUPINGS = 12
_TASK_IN_TEXT = re.compile(r"\btask(\d+)_([^\W_]+)\w*")


def expert_angles(frame: pd.DataFrame) -> Any:
    """Means over modules. Solid lines: the grouping made at that step, or the fixed one. Dashed
    lines: the previous grouping, on the same steps. Diamonds: the trained adapter on held-out data.
    Dotted line: 90°."""
    chart = _by_step(frame, "degrees", "angle (degrees)", zero=False)
    if chart is None:
        return None
    # Invisible lines at 85° and 95°: a shorter scale would exaggerate small differences.
    angles = pd.DataFrame({"degrees": [85, 90, 95], "seen": [0, 1, 0]})
    right_angle = chart_of(angles).mark_rule(style="reference", tooltip=None)
    return chart + right_angle.encode(alt.Opacity("seen:Q").scale(None).legend(None), y="degrees:Q")


def expert_cosines(frame: pd.DataFrame) -> Any:
    """Mean |cosine| between components' gradients: 0 is orthogonal, and opposite directions count
    as similar."""
    return _by_step(frame, "abs_cos", "mean |cosine|", zero=True)


def _by_step(frame: pd.DataFrame, unit: str, title: str, *, zero: bool) -> Any:
    """Returns a chart of values within and between experts by step, for all layers or one."""
    names = {**_PERIODS, "held-out": _HELD_OUT}
    rows = frame.assign(measured=frame["measured"].map(names)).dropna(subset=["step", "measured"])
    groups = {f"within_{unit}": "within experts", f"between_{unit}": "between experts"}
    labels = list(groups.values())
    values = rows.rename(columns=groups).melt(["step", "measured", "layer"], labels, "group")
    values = values.dropna(subset=["value"])
    if values.empty:
        return None
    # Layer −1 stands for parameters outside the layers.
    choices = [all_or_one(rows.query("layer >= 0"), "layer")]
    base, _ = chart_by_choice(values, ["step", "measured", "group"], choices)
    base = base.encode(
        step_axis(), alt.Y("value:Q").title(title).scale(zero=zero), colour("group", labels)
    )

    measured = set(values["measured"])
    layers = []
    periods = [name for name in _PERIODS.values() if name in measured]
    if periods:
        logged = base.transform_filter(f"datum.measured !== '{_HELD_OUT}'")
        dash = (
            alt.StrokeDash("measured:N")
            # Dashed before and solid after a regrouping; a single period is solid.
            .scale(domain=periods, range=[[3, 3], [1, 0]][-len(periods) :])
            .legend(legend(periods, symbolStrokeColor=_GREY))
        )
        layers.append(logged.mark_line(strokeWidth=2, tooltip=None).encode(dash))
        layers.append(logged.mark_point(filled=True, size=28, opacity=1))
    if _HELD_OUT in measured:
        held_out = base.transform_filter(f"datum.measured === '{_HELD_OUT}'")
        diamond = alt.Shape("measured:N").scale(domain=[_HELD_OUT], range=["diamond"])
        marks = held_out.mark_point(filled=True, size=110, opacity=1)
        layers.append(marks.encode(diamond.legend(title=None)))
    return alt.layer(*layers).add_params(*choices).properties(height=260)


def component_flow(frame: pd.DataFrame) -> Any:
    """Each row is an expert before the regrouping. Its cells show where its components went; those
    on the diagonal stayed. At most twelve regroupings are shown."""
    steps = np.unique(frame["step"])
    count = min(len(steps), _MOST_REGROUPINGS)
    # Evenly spaced, with the first and the last one.
    steps = steps[np.linspace(0, len(steps) - 1, count).astype(int)]
    rows = with_all(frame.query("step in @steps"), "layer")
    moves = rows.groupby(["layer", "step", "from_expert", "to_expert"])["components"].sum()
    counts = moves.unstack(fill_value=0)
    shares = counts.div(counts.sum(axis="columns"), axis="rows").stack()
    cells = cells_of(shares.rename("share").reset_index(), "from_expert", "to_expert", "share")
    look = Look(
        "share of the expert's components",
        rows="from expert",
        columns="to expert",
        signed=False,
        form=".0%",
    )
    step = choice("step", map(str, steps), [f"step {step}" for step in steps])
    return heat_map(cells, look, [all_or_one(frame.query("layer >= 0"), "layer"), step])


GEOMETRY = [
    Figure("Angles within and between experts", "expert_angles", expert_angles, "half"),
    Figure("Mean |cosine| within and between experts", "expert_angles", expert_cosines, "half"),
    Figure("Components moved by regrouping", "component_flow", component_flow, "square"),
]


def clusters(frame: pd.DataFrame) -> Any:
    """Share of a task's prompts in each cluster. Tasks in one column share their experts. A layer
    numbers its clusters by itself, unless all layers have the same."""
    choices = [_one_of(frame, "layer", "layer "), _one_of(frame, "module")]
    look = Look("share of the task's prompts", columns="cluster", signed=False, form=".0%")
    return heat_map(cells_of(frame, "task", "cluster", "share"), look, choices)


def gates(frame: pd.DataFrame) -> Any:
    """Mean gate over a task's prompts: 1 is neutral, blue is larger, orange is smaller. Every layer
    has its own router, so an expert's number has no meaning across layers."""
    choices = [_one_of(frame, "layer", "layer "), _one_of(frame, "module")]
    look = Look("mean gate", columns="expert", middle=1.0)
    return heat_map(cells_of(frame, "task", "expert", "mean"), look, choices)


def _one_of(frame: pd.DataFrame, name: str, prefix: str = "") -> alt.Parameter:
    """Returns a choice of one layer or one module."""
    values = [str(value) for value in sorted(set(frame[name]))]
    return choice(name, values, [f"{prefix}{value}" for value in values])


def gate_similarity(frame: pd.DataFrame) -> Any:
    """Correlation of two tasks' gates over all layers, after subtracting the mean over tasks. It is
    0 for unrelated tasks and 1 for equal gates. Hatched: within noise, as far from 0 as gates that
    are random and independent in every module."""
    cells = cells_of_pairs(frame, "similarity")
    noise = cells[cells["value"].abs() <= cells["noise"]]
    return heat_map(cells, Look("similarity"), (), noise)


def expert_losses(frame: pd.DataFrame) -> Any:
    """Increase of a task's loss with an expert's gates set to 0 in all layers. Blue: the task needs
    the expert. Orange: the loss is lower without it. If an expert started as a part of the
    pretrained weight, that part is removed too, so its values are large whatever it learnt."""
    label = "increase of the loss (nats per token)"
    look = Look(label, columns="disabled expert", least=0.1)
    return heat_map(cells_of(frame, "task", "expert", "change"), look)


def abilities(frame: pd.DataFrame) -> pd.DataFrame:
    """If an expert started as a part of the pretrained weight, the increase of the loss includes
    the effect of removing that part."""
    named = frame[["tasks", "hurt_most"]].replace(_TASK_IN_TEXT, r"\1 \2").replace({"": UNKNOWN})
    forms = {
        "expert": ".0f",
        "mean_gate": ".2f",
        "spread": ".3f",
        "change": ".3f",
        "tasks": "",
        "hurt_most": "",
    }
    headings = {
        "spread": "spread over tasks",
        "change": "loss increase without it",
        "tasks": "tasks with largest gates",
        "hurt most": "tasks with largest loss increase",
    }
    return as_text(frame.assign(**named), forms).rename(columns=headings)


def nearest_prompts(frame: pd.DataFrame) -> pd.DataFrame:
    """Prompts of the measured instances, ranked by their gate for the expert relative to the other
    prompts."""
    forms = {"expert": ".0f", "rank": ".0f", "task": "", "prompt": ""}
    return as_text(frame.sort_values(["expert", "rank"]), forms)


def ability_recovery(frame: pd.DataFrame) -> pd.DataFrame:
    """The p-value is the share of random permutations of the tasks' abilities with at least the
    same value."""
    measures = {
        "correlation": "correlation of gate similarity with known abilities",
        "nearest_neighbour": "share of tasks whose nearest neighbour shares an ability",
    }
    forms = {"measure": "", "value": ".2f", "chance": ".2f", "p_value": ".4f"}
    return as_text(frame.replace({"measure": measures}), forms)


ATLAS = [
    Figure("Tasks by cluster of prompts", "clusters", clusters, "square"),
    Figure("Mean gates by task", "gates", gates, "square"),
    Figure("Similarity of the tasks' gates", "gate_similarity", gate_similarity, "square"),
    Figure("Increase of the loss without an expert", "expert_losses", expert_losses, "square"),
    Figure("Summary of each expert", "abilities", abilities),
    Figure("Prompts with the largest gates for each expert", "nearest_prompts", nearest_prompts),
    Figure("Agreement of gates with known abilities", "ability_recovery", ability_recovery),
]
