"""A comparison's methods: the table, differences to the reference with their intervals, and scores by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from badit.evaluation.results import RESULTS, MethodSummary, Results, Spread, task_means
from badit.report.blocks import Block, Cell, Figure, Note, Origin, Table
from badit.report.context import Report
from badit.report.contract import Records
from badit.report.figures import learning
from badit.report.numbers import difference_text
from badit.report.sources import Source
from badit.report.wording import UNKNOWN, counted, duration, number, whole
from badit.statistics import Difference


def difference_figure(key: str, found: Mapping[str, Difference], reference: str, origins: Sequence[Origin]) -> Figure:
    records = [{"method": name, "mean": each.mean, "low": each.low, "high": each.high} for name, each in found.items()]
    one_run = any(each.runs == 1 for each in found.values())
    return Figure(
        key,
        f"Difference to {reference}",
        learning.differences(records, reference),
        f"Mean differences in Rouge-L to {reference}, with intervals: "
        + "; ".join(f"{name} {difference_text(each)}" for name, each in found.items())
        + ".",
        "Mean paired difference in Rouge-L points and its 95 % bootstrap interval; right of the dotted line is better "
        f"than {reference}. An interval that crosses the line says that the order could be chance."
        + (" Over a single run each: the intervals are over instances alone and say nothing of other seeds." * one_run),
        origins,
    )


def comparison_blocks(report: Report, source: Source) -> list[Block]:
    results = source.results
    assert results is not None
    summaries = source.summaries
    origins = [report.origin(source, RESULTS)]
    if not summaries:
        return [Note("No run of this comparison is finished yet.", "")]
    found = {summary.method: summary.difference for summary in summaries if summary.difference is not None}
    blocks: list[Block] = [_summary_table(report, source, results, summaries, origins)]
    if found:
        blocks.append(difference_figure(report.key("differences", source), found, results.reference, origins))
    means = {metric: task_means(results, metric) for metric in ("rouge_l", "exact_match")}
    methods = [summary.method for summary in summaries]
    records: Records = [
        {
            "task": report.names[task],
            "full": task,
            "series": method,
            "rouge_l": round(score, 2),
            "exact_match": round(means["exact_match"][task][method], 2),
        }
        for task, by_method in means["rouge_l"].items()
        for method, score in by_method.items()
    ]
    blocks += [
        Figure(
            report.key("methods-by-task", source),
            "Methods by task",
            learning.scores_by_task(records, methods),
            f"Mean scores of {counted(len(methods), 'method')} on {counted(len(means['rouge_l']), 'task')}.",
            "Means over a method's runs; tasks with the highest mean come first. Choose the metric above; click the "
            "legend to bring one method forward.",
            origins,
        ),
        _method_table(report, source, means["rouge_l"], methods, origins),
    ]
    return blocks


def _summary_table(
    report: Report, source: Source, results: Results, summaries: Sequence[MethodSummary], origins: Sequence[Origin]
) -> Table:
    best = max(summary.rouge_l.mean for summary in summaries if summary.rouge_l)
    columns: list[tuple[str, list[Cell]]] = [
        ("method", [Cell(s.method, strong=bool(s.rouge_l and s.rouge_l.mean == best)) for s in summaries]),
        ("Rouge-L", [_spread(s.rouge_l) for s in summaries]),
        ("exact match", [_spread(s.exact_match) for s in summaries]),
        ("forgetting", [_spread(s.forgetting) for s in summaries]),
        ("backward transfer", [_spread(s.backward_transfer) for s in summaries]),
        ("forward transfer", [_spread(s.forward_transfer) for s in summaries]),
        (
            f"against {results.reference} [95\u00a0%]",
            [Cell(difference_text(s.difference), s.difference.mean if s.difference else None) for s in summaries],
        ),
        ("rank", [Cell.of(s.rank, 0) for s in summaries]),
        ("task rank", [Cell.of(s.task_rank) for s in summaries]),
        ("runs", [Cell(str(s.runs), s.runs) for s in summaries]),
        ("learning rate", [Cell(s.learning_rate or UNKNOWN, _first_number(s.learning_rate)) for s in summaries]),
        ("trainable parameters", [Cell(whole(s.trainable_parameters), s.trainable_parameters) for s in summaries]),
        ("training", [Cell(duration(s.seconds), s.seconds) for s in summaries]),
        ("peak memory", [Cell.of(s.peak_memory_gib, unit=" GiB") for s in summaries]),
    ]
    known = [(title, cells) for title, cells in columns if any(cell.text != UNKNOWN for cell in cells)]
    return Table(
        report.key("methods", source),
        "Methods",
        [title for title, _ in known],
        [list(row) for row in zip(*(cells for _, cells in known), strict=True)],
        "Mean ± standard deviation over runs; the difference is paired by run and instance, with its 95 % bootstrap "
        "interval. Rank 1 is best, the task rank is the mean of the ranks on the tasks; the method with the highest "
        "mean is in bold.",
        origins,
        notes=[f"Not in the table: {_omitted(cell)}" for cell in results.omitted()],
    )


def _method_table(
    report: Report,
    source: Source,
    means: Mapping[str, Mapping[str, float]],
    methods: Sequence[str],
    origins: Sequence[Origin],
) -> Table:
    rows = [
        [
            Cell(report.names[task], hint=task),
            *(Cell.of(by_method[method], strong=by_method[method] == max(by_method.values())) for method in methods),
        ]
        for task, by_method in means.items()
    ]
    caption = "Rouge-L, mean over a method's runs; the best of each task is in bold. Click a heading to sort."
    return Table(report.key("methods-table", source), "Rouge-L by task", ["task", *methods], rows, caption, origins)


def _omitted(cell: Any) -> str:
    place = [cell.method] + ([f"seed {cell.seed}"] if cell.seed is not None else [])
    place += [f"order {cell.order}"] if cell.order is not None else []
    reason = " ".join((cell.error or "").split())
    return f"{', '.join(place)}: {cell.status}" + (f" ({reason:.160})" if reason else "")


def _spread(spread: Spread | None) -> Cell:
    if spread is None:
        return Cell(UNKNOWN)
    return Cell(number(spread.mean) + ("" if spread.std is None else f" ± {number(spread.std)}"), spread.mean)


def _first_number(text: str | None) -> float | None:
    return float(text.split(" / ")[0]) if text else None
