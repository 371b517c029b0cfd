"""Expert geometry: are experts at right angles in what they learn, and what does regrouping move?"""

from __future__ import annotations

from statistics import fmean

from badit.report.blocks import Cards, Figure, Section, Table
from badit.report.context import ON_RUNS, Report
from badit.report.contract import Records, known
from badit.report.figures import experts as figures
from badit.report.numbers import moved_components
from badit.report.sources import Source
from badit.report.wording import counted, number, percent

_TABLES = ("expert_angles", "component_flow")
_LEAD = (
    "An expert is a group of rank-1 components. If experts are abilities of their own, gradients agree within an "
    "expert and are at right angles between experts. All angles are on steps or data that the grouping was not made "
    "from. A signed mean hides opposite directions, so the mean |cosine| stands beside it."
)
_NO_COMPONENTS = "There are no angles to show: the method has no experts with components of their own."


def section(report: Report) -> Section:
    blocks = report.of_each(report.runs, _TABLES, lambda source: _blocks(report, source), _NO_COMPONENTS)
    return Section("geometry", "Expert geometry", _LEAD, blocks or [ON_RUNS])


def _blocks(report: Report, source: Source) -> list[Figure | Table | Cards]:
    blocks: list[Figure | Table | Cards] = []
    if angles := source.tables.get("expert_angles"):
        blocks += [
            report.figure(
                source,
                "expert-angles",
                "Angles within and between experts",
                figures.expert_angles(angles, "degrees"),
                "expert_angles",
                alt=f"Angles between components' gradients by training step: {_last_angles(angles)}.",
                caption="Mean over modules; the dotted line is 90°. Solid: the grouping made at that step; dashed: "
                "the one before it, on the same steps. A diamond: the finished adapter on held-out data.",
                width="half",
            ),
            report.figure(
                source,
                "expert-cosines",
                "The same without signs",
                figures.expert_angles(angles, "abs_cos"),
                "expert_angles",
                alt="Mean absolute cosine between components' gradients by training step, within and between experts.",
                caption="Mean |cosine| between components' gradients: 0 is at right angles, and opposite directions "
                "count as near.",
                width="half",
            ),
        ]
    if flow := source.tables.get("component_flow"):
        steps, shown = {record["step"] for record in flow}, figures.flow_steps(flow)
        moved, total = moved_components(flow)
        blocks.append(
            report.figure(
                source,
                "component-flow",
                "Where regrouping took the components",
                figures.component_flow(flow),
                "component_flow",
                alt=f"Shares of each expert's components that went to each expert; {percent(moved / total)} moved.",
                caption="A row is an expert before the regrouping, its cells are where its components went; the "
                f"diagonal stayed. Of {counted(len(steps), 'regrouping')}, {len(shown)} are there to choose from.",
                width="square",
            )
        )
    return blocks


def _last_angles(angles: Records) -> str:
    """The latest angles that there are, in words."""
    dated = [record for record in angles if record["measured"] != "before" and record["step"] is not None]
    last = max((record["step"] for record in dated), default=None)
    final = [record for record in dated if record["step"] == last]
    within, between = (known(final, f"{group}_degrees") for group in ("within", "between"))
    if not within or not between:
        return "not all are known"
    return f"at the last, {number(fmean(within))}° within and {number(fmean(between))}° between experts"
