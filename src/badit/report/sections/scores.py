"""Scores: by task, by method, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from badit.evaluation.results import Scores
from badit.report.blocks import Block, Cell, Figure, Heading, Note, Origin, Section, Table
from badit.report.context import Report, quoted
from badit.report.figures import learning
from badit.report.sections.comparisons import comparison_blocks, difference_figure
from badit.report.sources import Source
from badit.report.wording import counted, listed, whole

_METRICS = ("rouge_l", "exact_match")
_LEAD = (
    "Rouge-L is the longest common subsequence of answer and reference, exact match asks for the whole answer; both "
    "run from 0 to 100, are taken against the best of an instance's references, and every task counts the same in a "
    "mean."
)


def section(report: Report) -> Section:
    blocks: list[Block] = []
    if scored := report.scored_runs:
        if report.comparisons:
            blocks.append(Heading(listed(run.label for run in scored)))
        blocks += _of_runs(report, scored)
    for source in report.comparisons:
        if report.several:
            blocks.append(Heading(source.label))
        blocks += comparison_blocks(report, source)
    for run in report.runs:
        if run.scores is None and run.config:
            blocks.append(Note(f"{run.label} has no scores yet. Score it:", f"badit evaluate {quoted(run.path)}"))
    if not blocks:
        blocks.append(Note("An analysis alone has no scores: name the run's folder as well."))
    return Section("scores", "Scores", _LEAD, blocks)


def _of_runs(report: Report, runs: Sequence[Source]) -> list[Block]:
    by_run = {run.label: run.scores for run in runs if run.scores is not None}
    tasks = list(dict.fromkeys(task for scores in by_run.values() for task in scores.tasks))
    origins = [report.origin(run, "scores.json") for run in runs]
    records = [
        {"task": report.names[task], "full": task, "series": label, **_metrics(scores.tasks[task])}
        for label, scores in by_run.items()
        for task in scores.tasks
    ]
    blocks: list[Block] = [
        Figure(
            "scores-by-task",
            "Scores by task",
            learning.scores_by_task(records, list(by_run)),
            f"Scores of {counted(len(by_run), 'run')} on {counted(len(tasks), 'task')}, a row for each task.",
            "One mark for each run on each task; tasks with the highest mean come first. Choose the metric above; "
            "click the legend to bring one run forward.",
            origins,
        ),
        _task_table(report, "scores-table", by_run, tasks, origins),
    ]
    if report.run_differences:
        answers = [report.origin(run, "predictions/") for run in runs]
        blocks.append(difference_figure("run-differences", report.run_differences, runs[0].label, answers))
    return blocks


def _task_table(
    report: Report, key: str, by_run: Mapping[str, Scores], tasks: Sequence[str], origins: Sequence[Origin]
) -> Table:
    header = ["task", "instances"]
    for label in by_run:
        prefix = f"{label}: " if len(by_run) > 1 else ""
        header += [f"{prefix}Rouge-L", f"{prefix}exact match"]
    rows = []
    for task in tasks:
        entries = [scores.tasks.get(task) for scores in by_run.values()]
        sizes = [entry.instances for entry in entries if entry]
        row = [Cell(report.names[task], hint=task), Cell(whole(max(sizes)), max(sizes))]
        for entry in entries:
            row += [Cell.of(getattr(entry, metric, None)) for metric in _METRICS]
        rows.append(row)
    means = [Cell.of(getattr(scores, metric), strong=True) for scores in by_run.values() for metric in _METRICS]
    footer = [Cell("mean over tasks", strong=True), Cell(""), *means]
    return Table(key, "The same in numbers", header, rows, "Click a heading to sort.", origins, footer)


def _metrics(scores: Any) -> dict[str, float]:
    return {metric: round(getattr(scores, metric), 2) for metric in _METRICS}
