"""Gradient interference: do tasks pull the same weights apart?"""

from __future__ import annotations

from collections.abc import Sequence

from badit.report.blocks import Cards, Cell, Figure, Section, Table
from badit.report.context import ON_RUNS, Report
from badit.report.contract import Records
from badit.report.figures import interference as figures
from badit.report.numbers import conflict_rate, kinds_of_parameters, overall_of
from badit.report.sources import Source
from badit.report.wording import UNKNOWN, number, percent, whole

_TABLES = ("gradient_pairs", "gradient_overall", "gradient_summary", "gradient_tasks")
_MOST_PAIRS = 120
_LEAD = (
    "Two tasks whose gradients point in opposite directions (cosine below 0) undo each other's steps. Gradients are "
    "noisy: the reliability, the cosine between gradients on two halves of one task's own instances, says how near to "
    "1 any cosine could come here."
)
# Column of gradient_summary, what it is called, its format, how to read it.
_BY_LAYER = (
    ("conflict_rate", "conflict rate", "%", "Share of pairs of tasks with a negative cosine."),
    (
        "reliability",
        "reliability",
        ".2f",
        "Cosine between gradients on two halves of a task's instances, mean over tasks. Near 0, the cosines between "
        "tasks are noise.",
    ),
)


def section(report: Report) -> Section:
    blocks = report.of_each(
        report.runs, _TABLES, lambda source: _blocks(report, source), "The analysis holds no gradients."
    )
    return Section("gradients", "Gradient interference", _LEAD, blocks or [ON_RUNS])


def _blocks(report: Report, source: Source) -> list[Figure | Table | Cards]:
    tables = source.tables
    kinds = kinds_of_parameters(source)
    overall = overall_of(source, kinds[0]) if kinds else []
    blocks: list[Figure | Table | Cards] = []
    if overall or "gradient_pairs" in tables:
        blocks.append(_cosines(report, source, tables.get("gradient_pairs", []), overall, kinds[:1]))
    blocks += [_cosines(report, source, [], overall_of(source, kind), [kind], f"-{kind}") for kind in kinds[1:]]
    blocks += _by_layer(report, source)
    if overall:
        blocks.append(_pairs_table(report, source, overall))
    if "gradient_tasks" in tables:
        blocks.append(_tasks_table(report, source, tables["gradient_tasks"]))
    return blocks


def _cosines(
    report: Report, source: Source, pairs: Records, overall: Records, kinds: Sequence[str], suffix: str = ""
) -> Figure:
    choice = (
        " Choose a layer or a module: with all of both, the gradients are taken as one vector; with all of one, the "
        "mean of the cosines is shown."
    )
    return report.figure(
        source,
        f"gradient-cosines{suffix}",
        "Cosine between tasks' gradients" + "".join(f" ({_called(kind)})" for kind in kinds),
        figures.gradient_cosines(pairs, overall, report.names, _first(report, kinds)),
        *(["gradient_pairs"] if pairs else []),
        *(["gradient_overall"] if overall else []),
        alt=f"Matrix of cosines between the gradients of tasks; {percent(conflict_rate(overall))} of pairs are "
        "negative.",
        caption="Blue: the tasks pull the same way; orange: they conflict. Colours end at the legend's limits. Tasks "
        "that are alike stand together." + (choice if pairs else ""),
        width="square",
    )


def _by_layer(report: Report, source: Source) -> list[Figure]:
    summary = [record for record in source.tables.get("gradient_summary", []) if record["layer"] >= 0]
    kinds = list(dict.fromkeys(record["parameters"] for record in summary))
    blocks: list[Figure] = []
    for kind in kinds:
        for column, title, form, caption in _BY_LAYER:
            rows = [row for row in summary if row["parameters"] == kind and row[column] is not None]
            if not rows:
                continue
            values = [row[column] for row in rows]
            blocks.append(
                report.figure(
                    source,
                    f"{title.replace(' ', '-')}-by-layer-{kind}",
                    f"{title.capitalize()} by layer" + (f" ({_called(kind)})" if len(kinds) > 1 else ""),
                    figures.by_layer(rows, column, title, form),
                    "gradient_summary",
                    alt=f"{title.capitalize()} by layer, a line for each module, "
                    f"from {number(min(values), 2)} to {number(max(values), 2)}.",
                    caption=caption,
                    width="half",
                )
            )
    return blocks


def _pairs_table(report: Report, source: Source, overall: Records) -> Table:
    known = [record for record in overall if record["cosine"] is not None]
    known.sort(key=lambda record: record["cosine"])
    half = _MOST_PAIRS // 2
    shown = known if len(known) <= _MOST_PAIRS else known[:half] + known[-half:]
    rows = [
        [
            Cell(
                f"{report.names[record['task_a']]} × {report.names[record['task_b']]}",
                hint=f"{record['task_a']} × {record['task_b']}",
            ),
            Cell.of(record["cosine"], 3),
            Cell.of(record["corrected_cosine"], 2),
            Cell.of(record["magnitude_similarity"], 2),
        ]
        for record in shown
    ]
    left_out = len(known) - len(shown)
    return report.table(
        source,
        "gradient-pairs",
        "Pairs of tasks, the most conflicting first",
        ["pair", "cosine", "corrected cosine", "magnitude similarity"],
        rows,
        "gradient_overall",
        caption="The corrected cosine is what the cosine would be without the noise of few instances; a dash: the "
        "halves of a task agree too little to tell. Magnitude similarity is 1 where both gradients are as large."
        + (f" {left_out} pairs in the middle are left out." if left_out else ""),
    )


def _tasks_table(report: Report, source: Source, tasks: Records) -> Table:
    several = len({record["parameters"] for record in tasks}) > 1
    rows = [
        [
            Cell(report.names[record["task"]], hint=record["task"]),
            *([Cell(_called(record["parameters"]))] if several else []),
            Cell(_three_digits(record["norm"]), record["norm"]),
            Cell.of(record["reliability"], 2),
            Cell(whole(record["instances"]), record["instances"]),
        ]
        for record in tasks
    ]
    return report.table(
        source,
        "gradient-tasks",
        "Gradients of single tasks",
        ["task", *(["parameters"] if several else []), "norm", "reliability", "instances"],
        rows,
        "gradient_tasks",
        caption="A task with a large norm weighs more in a mixed batch; one with low reliability needs more instances "
        "to be measured well.",
    )


def _first(report: Report, kinds: Sequence[str]) -> Records:
    """What the order of the tasks is taken from: the first run with cosines of this kind."""
    found = (overall_of(run, kind) for kind in kinds for run in report.runs)
    return next((records for records in found if records), [])


def _called(kind: str) -> str:
    return {"adapter": "adapter's parameters", "weights": "the model's weights"}.get(kind, kind)


def _three_digits(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}".replace("-", "−")
