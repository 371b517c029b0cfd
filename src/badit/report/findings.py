"""Sentences that sum the numbers up, made from the numbers alone.

Each says how much it rests on: an interval that includes zero, gradients whose halves disagree, gates that are all
alike are said to be so.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, pstdev

from badit.evaluation.results import RESULTS
from badit.report.blocks import Finding
from badit.report.context import Report
from badit.report.contract import Records
from badit.report.numbers import (
    conflict_rate,
    difference_text,
    kinds_of_parameters,
    moved_components,
    overall_of,
)
from badit.report.sources import Source
from badit.report.wording import counted, number, percent
from badit.statistics import Difference

_ALIKE_GATES = 0.02
_OVER = {"adapter": "the adapter's parameters", "weights": "the model's weights"}


def findings(report: Report) -> list[Finding]:
    """What stands out, source by source; nothing where nothing was measured."""
    found = list(_between_runs(report))
    for source in report.sources:
        prefix = f"{source.label}: " if report.several else ""
        for tables, text in _of_source(report, source):
            origins = report.origins(source, *tables) or [report.origin(source, RESULTS)]
            found.append(Finding(prefix + text, origins))
    return found


def _of_source(report: Report, source: Source) -> Iterator[tuple[tuple[str, ...], str]]:
    """(tables that it is from, sentence)."""
    if source.results is not None:
        for sentence in _of_comparison(source):
            yield (), sentence
    for kind in kinds_of_parameters(source)[:1]:
        yield from _on_gradients(source, kind)
    for kind in dict.fromkeys(record["kind"] for record in source.tables.get("coactivation", [])):
        yield from _on_units(source, kind)
    if angles := source.tables.get("expert_angles"):
        yield from _on_angles(angles)
    if flow := source.tables.get("component_flow"):
        moved, total = moved_components(flow)
        steps = len({record["step"] for record in flow})
        text = (
            f"A regrouping moves {percent(moved / total)} of the components, mean over {counted(steps, 'regrouping')}."
        )
        yield ("component_flow",), text
    if gates := source.tables.get("gates"):
        yield ("gates",), _on_gates(gates)
    if losses := source.tables.get("expert_losses"):
        yield ("expert_losses",), _on_losses(report, losses)
    for record in source.tables.get("ability_recovery", []):
        if record["measure"] == "correlation" and record["value"] is not None:
            p_value = record["p_value"]
            sure = "beyond" if (p_value or 0) < 0.05 else "not beyond"
            shown = "< 0.001" if p_value is not None and p_value < 0.001 else f"= {number(p_value, 3)}"
            yield (
                ("ability_recovery",),
                f"Gates agree with the tasks' known abilities with a correlation of {number(record['value'], 2)}, "
                f"{sure} chance (p {shown}).",
            )
    if gaps := source.tables.get("task_gap"):
        yield from _on_gaps(gaps)


def _between_runs(report: Report) -> Iterator[Finding]:
    for label, difference in report.run_differences.items():
        first = report.scored_runs[0]
        run = next(run for run in report.runs if run.label == label)
        origins = [report.origin(source, "predictions/") for source in (first, run)]
        over = "over instances, one run each"
        yield Finding(f"{label} against {first.label}: {_points(difference, over)}.", origins)


def _of_comparison(source: Source) -> Iterator[str]:
    results = source.results
    assert results is not None
    summaries = source.summaries
    ranked = sorted(summaries, key=lambda summary: -(summary.rouge_l.mean if summary.rouge_l else 0))
    if ranked and ranked[0].rouge_l:
        runs = counted(ranked[0].runs, "run")
        yield f"The highest mean Rouge-L is that of {ranked[0].method}: {number(ranked[0].rouge_l.mean)} over {runs}."
    for summary in ranked:
        if summary.difference is not None and summary.method.startswith("badit"):
            over = f"over {counted(summary.difference.runs, 'pair')} of runs"
            yield f"{summary.method} against {results.reference}: {_points(summary.difference, over)}."
    if omitted := results.omitted():
        yield f"Failed or missing: {counted(len(omitted), 'run')} of the comparison."


def _points(difference: Difference, over: str) -> str:
    mean, interval = difference_text(difference).split(" ", 1)
    chance = "; the interval includes 0, so this may be chance" if difference.low <= 0 <= difference.high else ""
    return f"{mean} Rouge-L points {interval} {over}{chance}"


def _on_gradients(source: Source, kind: str) -> Iterator[tuple[tuple[str, ...], str]]:
    overall = overall_of(source, kind)
    known = [record["cosine"] for record in overall if record["cosine"] is not None]
    if not known:
        return
    text = (
        f"The gradients of {percent(conflict_rate(overall))} of {counted(len(known), 'pair')} of tasks conflict "
        f"({_OVER.get(kind, kind)}); the mean cosine is {number(fmean(known), 2)}."
    )
    halves = [
        record["reliability"]
        for record in source.tables.get("gradient_tasks", [])
        if record["parameters"] == kind and record["reliability"] is not None
    ]
    if halves:
        text += f" Two halves of one task's instances agree with a cosine of {number(fmean(halves), 2)}"
        text += ": too little to tell conflict from noise." if fmean(halves) < 0.1 else " on average."
    yield ("gradient_overall", "gradient_tasks"), text


def _on_units(source: Source, kind: str) -> Iterator[tuple[tuple[str, ...], str]]:
    records = [record for record in source.tables["coactivation"] if record["kind"] == kind and record["layer"] >= 0]
    tasks = max((record["tasks"] for record in records), default=0)
    if tasks < 2:
        return
    marked, chance = (_several(records, column) for column in ("share", "chance"))
    universal = _mean([record["share"] for record in records if record["tasks"] == tasks])
    text = (
        f"Of the {kind} marked for any task, {percent(marked)} are marked for several (by chance {percent(chance)}); "
        f"{percent(universal, 1)} of all are marked for all {tasks} tasks."
    )
    yield ("coactivation",), text


def _several(records: Records, column: str) -> float | None:
    """Of the units with any task, the share with more than one."""
    sums = [sum(record[column] or 0 for record in records if record["tasks"] >= least) for least in (1, 2)]
    return sums[1] / sums[0] if sums[0] else None


def _on_angles(angles: Records) -> Iterator[tuple[tuple[str, ...], str]]:
    for measured, when in (("held-out", "On held-out data"), ("after", "On the steps after the last regrouping")):
        rows = [r for r in angles if r["measured"] == measured and r["within_degrees"] is not None]
        last = max((row["step"] for row in rows if row["step"] is not None), default=None)
        rows = [row for row in rows if row["step"] == last and row["between_degrees"] is not None]
        if rows:
            within, between = (fmean(row[f"{group}_degrees"] for row in rows) for group in ("within", "between"))
            text = (
                f"{when} the components' gradients are at {number(within)}° within experts, {number(between)}° between."
            )
            yield ("expert_angles",), text


def _on_gates(gates: Records) -> str:
    by_place: dict[tuple[object, ...], list[float]] = {}
    for record in gates:
        if record["mean"] is not None:
            by_place.setdefault((record["layer"], record["module"], record["expert"]), []).append(record["mean"])
    spread = fmean(pstdev(values) for values in by_place.values()) if by_place else 0.0
    alike = ": all tasks use nearly the same mixture" if spread < _ALIKE_GATES else ""
    return f"Between tasks, a gate differs by a standard deviation of {number(spread, 3)} (1 is neutral){alike}."


def _on_losses(report: Report, losses: Records) -> str:
    changes: dict[int, list[float]] = {}
    for record in losses:
        if record["change"] is not None:
            changes.setdefault(record["expert"], []).append(record["change"])
    worst = max(changes, key=lambda expert: fmean(changes[expert]))
    most = max((r for r in losses if r["change"] is not None), key=lambda record: record["change"])
    return (
        f"Expert {worst} is missed most: without it the loss rises by {number(fmean(changes[worst]), 3)} nats a token "
        f"on average. The largest single rise is {number(most['change'], 3)}, of {report.names[most['task']]} without "
        f"expert {most['expert']}."
    )


def _on_gaps(gaps: Records) -> Iterator[tuple[tuple[str, ...], str]]:
    for method in dict.fromkeys(record["method"] for record in gaps):
        known = [r["gap"] for r in gaps if r["method"] == method and r["gap"] is not None]
        if known:
            lost = sum(gap > 0 for gap in known)
            cost = "costs" if fmean(known) > 0 else "gains"
            text = (
                f"Learning all tasks together {cost} {method} {number(abs(fmean(known)))} Rouge-L points a task; "
                f"{lost} of {counted(len(known), 'task')} lose."
            )
            yield ("task_gap",), text


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
