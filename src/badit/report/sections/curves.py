"""Learning curves: the training loss by step."""

from __future__ import annotations

from badit.report.blocks import Block, Figure, Note, Section
from badit.report.context import Report
from badit.report.figures import learning
from badit.report.members import members
from badit.report.wording import counted, listed, number

_LEAD = "The loss on the training batches as it was logged. It says how training went, not how well a model answers."


def section(report: Report) -> Section:
    curves, origins = [], []
    for source in report.sources:
        found = [member for member in members(source) if member.run.losses]
        for member in found:
            series = f"{source.label}: {member.method}" if report.several and source.results else member.method
            curves.append((series, member.run.label, member.run.losses))
        if found:
            origins.append(report.origin(source, "metrics.jsonl" if source.results is None else "…/metrics.jsonl"))
    if not curves:
        note = Note(
            "No training has been logged: a base model does not train, and a comparison's runs may lie elsewhere."
        )
        return Section("curves", "Learning curves", _LEAD, [note])
    series = list(dict.fromkeys(name for name, _, _ in curves))
    ends = [f"{run} from {number(p[0]['loss'], 2)} to {number(p[-1]['loss'], 2)}" for _, run, p in curves[:6]]
    figure: Block = Figure(
        "loss-curves",
        "Training loss",
        learning.loss_curves(curves),
        f"Training loss by step of {counted(len(curves), 'run')}: {listed(ends)}.",
        "The pale line is what was logged, the strong one its running mean over five log lines. "
        + ("Click the legend to bring one forward." if len(series) > 1 else ""),
        origins,
    )
    return Section("curves", "Learning curves", _LEAD, [figure])
