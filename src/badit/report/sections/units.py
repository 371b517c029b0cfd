"""Co-activation: do tasks use the same units?"""

from __future__ import annotations

from statistics import fmean

from badit.report.blocks import Cards, Figure, Section, Table
from badit.report.context import ON_RUNS, Report
from badit.report.contract import known
from badit.report.figures import interference as figures
from badit.report.sources import Source
from badit.report.wording import number

_TABLES = ("coactivation", "coactivation_tasks", "coactivation_pairs")
_LEAD = (
    "For each task, the units that it activates or moves most are marked. If tasks had parts of the model to "
    "themselves, few units would be marked for several. Units that many tasks share, far beyond chance, are where "
    "they can interfere."
)


def section(report: Report) -> Section:
    blocks = report.of_each(
        report.runs, _TABLES, lambda source: _blocks(report, source), "The analysis holds no co-activation."
    )
    return Section("units", "Co-activation", _LEAD, blocks or [ON_RUNS])


def _blocks(report: Report, source: Source) -> list[Figure | Table | Cards]:
    blocks: list[Figure | Table | Cards] = []
    if shares := source.tables.get("coactivation"):
        blocks.append(
            report.figure(
                source,
                "shared-units",
                "Units shared by k tasks",
                figures.shared_units(shares),
                "coactivation",
                alt="Bars: the share of units marked for exactly k tasks. Dashed: what independent tasks would share.",
                caption="Units marked for no task are not drawn. Bars above the dashed line: more sharing than by "
                "chance.",
            )
        )
    if counts := source.tables.get("coactivation_tasks"):
        blocks.append(
            report.figure(
                source,
                "units-of-tasks",
                "What each task has to itself",
                figures.units_of_tasks(counts, report.names),
                "coactivation_tasks",
                alt="Each task's marked units, split into those marked for it alone, for some tasks and for all tasks.",
                caption="All layers together: units marked for this task alone, for some others too, or for all of "
                "them. In a model that isolates tasks, the first part would be most of the bar.",
            )
        )
    if pairs := source.tables.get("coactivation_pairs"):
        chances = known(pairs, "chance")
        by_chance = f" By chance it would be about {number(fmean(chances), 2)}." if chances else ""
        blocks.append(
            report.figure(
                source,
                "unit-overlaps",
                "Overlap of marked units between tasks",
                figures.overlaps(pairs, report.names, report.first("coactivation_pairs")),
                "coactivation_pairs",
                alt="Matrix of the Jaccard overlap of the units marked for two tasks.",
                caption="Jaccard overlap: units marked for both tasks, of those marked for either, over all layers."
                + by_chance,
                width="square",
            )
        )
    return blocks
