"""Learning interference: what a task gains or loses by being learnt with others, or before them."""

from __future__ import annotations

from badit.report.blocks import Block, Figure, Heading, Note, Section
from badit.report.context import Report
from badit.report.figures import learning as figures
from badit.report.sources import Source
from badit.report.wording import counted, number

_LEAD = (
    "Interference where it counts, in scores: a model for all tasks against one model a task, and what is left of a "
    "task after others have been learnt."
)


def section(report: Report) -> Section:
    blocks: list[Block] = []
    for source in report.sources:
        found = _gap(report, source) + _transfer(report, source)
        if found and report.several:
            blocks.append(Heading(source.label))
        blocks += found
    if not blocks:
        blocks.append(
            Note(
                "This needs a comparison with single-task runs (compare.single_task in its recipe) or a run that "
                "learns its tasks in sequence (data.order); name its folder as well."
            )
        )
    return Section("learning", "Learning interference", _LEAD, blocks)


def _gap(report: Report, source: Source) -> list[Block]:
    gaps = source.tables.get("task_gap")
    if not gaps:
        return []
    known = [record["gap"] for record in gaps if record["gap"] is not None]
    mean = sum(known) / len(known) if known else None
    return [
        Figure(
            report.key("task-gap", source),
            "One model a task, or one for all",
            figures.task_gap(gaps, report.names),
            f"Rouge-L of single-task and multi-task models by task; the mean gap is {number(mean, signed=True)} "
            "points.",
            "A circle is the model trained on the task alone, a diamond the one trained on all tasks: a diamond to "
            "the left has lost by learning together. Tasks that gained come first.",
            report.origins(source, "task_gap"),
        )
    ]


def _transfer(report: Report, source: Source) -> list[Block]:
    records = source.tables.get("transfer")
    if not records:
        return []
    stages = {record["stage"]: record["trained_task"] for record in records}
    order = [stages[stage] for stage in sorted(stages)]
    place = {stage: i for i, stage in enumerate(sorted(stages))}
    tasks = list(dict.fromkeys([*order, *(record["task"] for record in records)]))
    scores = {(place[record["stage"]], record["task"]): record["rouge_l"] for record in records}
    return [
        Figure(
            report.key("transfer", source),
            "What is left of each task",
            figures.transfer(order, tasks, scores, report.names),
            f"Rouge-L on each task after each of {counted(len(order), 'stage')} of training.",
            "A row is the model after one more task; read a column downwards from the diagonal to see a task being "
            "forgotten. Cells above the diagonal, where there are any, are tasks not learnt yet.",
            report.origins(source, "transfer"),
            "square",
        )
    ]
