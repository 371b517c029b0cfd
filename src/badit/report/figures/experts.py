"""How experts' gradients lie to one another over training, and where regrouping takes components."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import altair as alt

from badit.report.contract import Records
from badit.report.figures.choice import ALL, Choice, chosen, layer_choice, legend, with_choices
from badit.report.figures.heat_map import Axis, Shade, grid_cells, heat_map

Unit = Literal["degrees", "abs_cos"]

_GROUPS = ("within", "between")
_PERIODS = ("before", "after", "training")
_HELD_OUT = "held-out"
_NAMES = {
    "before": "before regrouping",
    "after": "after regrouping",
    "training": "in training",
    _HELD_OUT: "held-out data",
}
_MOST_STEPS = 12
_ROOM = 46  # letters in a row of the legend, as there are no long names at the left
_NEUTRAL = "#808690"  # seen on a light page and on a dark one


def expert_angles(angles: Records, unit: Unit) -> Any:
    """Angles, or mean |cosine|, within and between experts by step: means over modules, of all layers or one."""
    last = max((record["step"] for record in angles if record["step"] is not None), default=0)
    sums: dict[str, dict[tuple[Any, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in angles:
        step = last if record["measured"] == _HELD_OUT and record["step"] is None else record["step"]
        for group in _GROUPS:
            value = record[f"{group}_{unit}"]
            if value is not None and step is not None and record["measured"] in _NAMES:
                for layer in {str(record["layer"]), ALL}:
                    sums[layer][step, record["measured"], group].append(value)
    spots = sorted(sums[ALL])
    places = [
        {"step": step, "measured": _NAMES[measured], "group": f"{group} experts", "index": i}
        for i, (step, measured, group) in enumerate(spots)
    ]
    lists: dict[tuple[str, ...], list[float | None]] = {
        (layer,): [fmean(means[spot]) if spot in means else None for spot in spots] for layer, means in sums.items()
    }
    choices = [layer_choice(record["layer"] for record in angles if record["layer"] >= 0)]
    shown = [_NAMES[measured] for measured in _NAMES if any(spot[1] == measured for spot in spots)]
    return with_choices(_angle_chart(chosen(places, lists, choices), unit, shown), choices)


def _angle_chart(base: alt.Chart, unit: Unit, shown: Sequence[str]) -> Any:
    title = "angle (degrees)" if unit == "degrees" else "mean |cosine|"
    periods = [_NAMES[period] for period in _PERIODS if _NAMES[period] in shown]
    groups = [f"{group} experts" for group in _GROUPS]
    base = base.encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=5)),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=unit == "abs_cos")),
        color=alt.Color(
            "group:N",
            scale=alt.Scale(domain=groups),
            legend=legend(groups, room=_ROOM),
        ),
        tooltip=[
            alt.Tooltip("step:Q"),
            alt.Tooltip("group:N", title="gradients"),
            alt.Tooltip("measured:N"),
            alt.Tooltip("value:Q", title=title, format=".2f" if unit == "degrees" else ".3f"),
        ],
    )
    logged = base.transform_filter(f"datum.measured !== '{_NAMES[_HELD_OUT]}'")
    dashes = alt.Scale(domain=periods, range=[[3, 3], [1, 0]] if len(periods) > 1 else [[1, 0]])
    layers: list[Any] = []
    if periods:
        series = legend(periods, room=_ROOM, symbolStrokeColor=_NEUTRAL)
        dash = alt.StrokeDash("measured:N", scale=dashes, legend=series)
        layers.append(logged.mark_line(strokeWidth=2, tooltip=None).encode(strokeDash=dash))
        layers.append(logged.mark_point(filled=True, size=28, opacity=1))
    if _NAMES[_HELD_OUT] in shown:
        layers.append(
            base.transform_filter(f"datum.measured === '{_NAMES[_HELD_OUT]}'")
            .mark_point(filled=True, size=110, opacity=1)
            .encode(
                shape=alt.Shape(
                    "measured:N",
                    scale=alt.Scale(domain=[_NAMES[_HELD_OUT]], range=["diamond"]),
                    legend=alt.Legend(title=None),
                )
            )
        )
    if unit == "degrees":
        layers.append(_right_angle())
    return alt.layer(*layers).properties(width="container", height=260)


def _right_angle() -> alt.Chart:
    """A rule at 90°, and unseen ones 5° to both sides: a scale that shows less would make much of little."""
    rules = [{"degrees": degrees, "seen": int(degrees == 90)} for degrees in (85, 90, 95)]
    chart = alt.Chart(alt.InlineData(values=rules)).mark_rule(style="reference", tooltip=None)
    return chart.encode(y="degrees:Q", opacity=alt.Opacity("seen:Q", scale=None, legend=None))


def flow_steps(flow: Records) -> list[int]:
    """The steps that the flow is shown of: at most twelve, the first and the last among them."""
    steps = sorted({record["step"] for record in flow})
    if len(steps) <= _MOST_STEPS:
        return steps
    return [steps[i * (len(steps) - 1) // (_MOST_STEPS - 1)] for i in range(_MOST_STEPS)]


def component_flow(flow: Records) -> Any:
    """Where a regrouping took each expert's components: rows from, columns to, shares of the row."""
    steps = flow_steps(flow)
    experts = 1 + max(max(record["from_expert"], record["to_expert"]) for record in flow)
    counts: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0] * experts**2)
    for record in flow:
        if record["step"] in steps:
            for layer in {str(record["layer"]), ALL}:
                spot = record["from_expert"] * experts + record["to_expert"]
                counts[layer, str(record["step"])][spot] += record["components"] or 0
    lists = {key: _shares_of_rows(values, experts) for key, values in counts.items()}
    names = [str(expert) for expert in range(experts)]
    choices = [
        layer_choice(record["layer"] for record in flow if record["layer"] >= 0),
        Choice("step", {str(step): f"step {step}" for step in steps}),
    ]
    return heat_map(
        grid_cells(experts, experts),
        lists,
        rows=Axis("from expert", names),
        columns=Axis("to expert", names),
        shade=Shade("share of the expert's components", 1.0, kind="magnitude", format=".0%", written=True),
        choices=choices,
    )


def _shares_of_rows(counts: Sequence[float], size: int) -> list[float | None]:
    totals = [sum(counts[start : start + size]) for start in range(0, size * size, size)]
    return [count / totals[i // size] if totals[i // size] else None for i, count in enumerate(counts)]
