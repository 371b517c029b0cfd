"""The ability atlas: what each task draws on, and what each expert is for."""

from __future__ import annotations

from collections import defaultdict

from badit.report.blocks import Card, Cards, Cell, Figure, Section, Table
from badit.report.context import ON_RUNS, Report
from badit.report.contract import Records
from badit.report.figures import atlas as figures
from badit.report.sources import Source
from badit.report.wording import number

_TABLES = ("gates", "gate_similarity", "expert_losses", "abilities", "ability_recovery", "nearest_prompts")
_LEAD = (
    "Which experts each task draws on (its gates), how alike tasks are in that, and what is lost when an expert is "
    "switched off. Where gates differ little between tasks, experts are not abilities, whatever they are called."
)
_MEASURES = {
    "correlation": "correlation of gates with known abilities",
    "nearest_neighbour": "tasks whose nearest neighbour shares an ability",
}


def section(report: Report) -> Section:
    blocks = report.of_each(
        report.runs, _TABLES, lambda source: _blocks(report, source), "The method has no experts to measure."
    )
    return Section("atlas", "Ability atlas", _LEAD, blocks or [ON_RUNS])


def _blocks(report: Report, source: Source) -> list[Figure | Table | Cards]:
    tables, names = source.tables, report.names
    gates, similarity = tables.get("gates", []), tables.get("gate_similarity", [])
    like = report.first("gate_similarity")
    blocks: list[Figure | Table | Cards] = []
    if gates:
        blocks.append(
            report.figure(
                source,
                "gates",
                "What each task draws on",
                figures.gates(gates, names, like),
                "gates",
                alt="Mean gate of every expert for each task.",
                caption="Mean gate over a task's prompts: 1 is neutral, blue is more, orange is less. The mean over "
                "layers has a scale of its own, as it varies less.",
                width="square",
            )
        )
    if similarity:
        blocks.append(
            report.figure(
                source,
                "gate-similarity",
                "Tasks that draw on the same experts",
                figures.gate_similarity(similarity, names, like),
                "gate_similarity",
                alt="Matrix of correlations between the gates of tasks.",
                caption="Correlation of two tasks' gates over all layers, after taking off what all tasks have in "
                "common. Tasks that are alike stand together.",
                width="square",
            )
        )
    if losses := tables.get("expert_losses"):
        blocks.append(
            report.figure(
                source,
                "expert-losses",
                "What is lost without an expert",
                figures.expert_losses(losses, names, like),
                "expert_losses",
                alt="How much each task's loss rises when one expert's gates are set to 0 in all layers.",
                caption="Blue: the task needs the expert; orange: it would do better without.",
                width="square",
            )
        )
    if abilities := tables.get("abilities"):
        blocks.append(_cards(report, source, abilities))
    if recovery := tables.get("ability_recovery"):
        blocks.append(_recovery_table(report, source, recovery))
    return blocks


def _cards(report: Report, source: Source, abilities: Records) -> Cards:
    prompts: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for record in sorted(source.tables.get("nearest_prompts", []), key=lambda record: record["rank"]):
        prompts[record["expert"]].append((report.names[record["task"]], record["prompt"]))
    cards = [
        Card(
            f"Expert {record['expert']}",
            report.names.within(record["summary"]),
            {
                "drawn on most by": report.names.within(record["tasks"]) or "no task in particular",
                "missed most by": report.names.within(record["hurt_most"]) or "no task in particular",
                "mean gate": number(record["mean_gate"], 2),
                "spread over tasks": number(record["spread"], 3),
                "loss without it": number(record["change"], 3, signed=True, unit=" nats a token"),
            },
            prompts[record["expert"]],
        )
        for record in abilities
    ]
    return Cards(
        "The experts one by one",
        cards,
        "The sentences are made from the numbers above; the prompts are those that draw on the expert most.",
        report.origins(source, "abilities", "nearest_prompts"),
        report.run(source),
    )


def _recovery_table(report: Report, source: Source, recovery: Records) -> Table:
    rows = [
        [
            Cell(_MEASURES.get(record["measure"]) or record["measure"]),
            Cell.of(record["value"], 2),
            Cell.of(record["chance"], 2),
            Cell.of(record["p_value"], 4),
        ]
        for record in recovery
    ]
    return report.table(
        source,
        "ability-recovery",
        "Do gates find the abilities that the tasks are known to share?",
        ["measure", "measured", "by chance", "p-value"],
        rows,
        "ability_recovery",
        caption="The built-in tasks were made from known abilities. The p-value is the share of random reassignments "
        "of abilities that do at least as well.",
    )
