"""Overview: what was run, its headline numbers, and what they come to."""

from __future__ import annotations

from typing import Any

from badit.evaluation.results import RESULTS
from badit.report.blocks import Block, Findings, Section, Summary, Tile
from badit.report.context import Report
from badit.report.findings import findings
from badit.report.sources import Source
from badit.report.wording import counted, duration, listed, number

_LEAD = ""
_OPTIONS = {"num_experts": "experts", "r": "rank"}


def section(report: Report) -> Section:
    blocks: list[Block] = [
        _of_run(report, source) if source.results is None else _of_comparison(report, source)
        for source in report.sources
    ]
    if found := findings(report):
        blocks.append(Findings(found))
    return Section("overview", "Overview", _LEAD, blocks)


def _of_run(report: Report, run: Source) -> Summary:
    training = run.environment.get("training")
    training = training if isinstance(training, dict) else {}
    tiles: list[Tile] = []
    if run.scores is not None:
        tiles += [
            Tile(number(run.scores.rouge_l), "Rouge-L"),
            Tile(number(run.scores.exact_match), "exact match"),
            Tile(str(len(run.scores.tasks)), "tasks"),
        ]
    if parameters := _number(training, "trainable_parameters"):
        tiles.append(Tile(_short(parameters), "trainable parameters"))
    if steps := _number(training, "steps"):
        tiles.append(Tile(f"{steps:,.0f}", "steps"))
    if seconds := _number(training, "seconds"):
        tiles.append(Tile(duration(seconds), "training time"))
    files = [
        ("scores.json", run.scores is not None),
        ("config.yaml", bool(run.config)),
        ("environment.json", bool(run.environment)),
    ]
    origins = [report.origin(run, file) for file, there in files if there]
    return Summary(run.label, _described(run), tiles, origins)


def _described(run: Source) -> str:
    if not run.config:
        return "An analysis without its run's configuration."
    model = str(run.section("model").get("name", "an unnamed model"))
    data, method, training = run.section("data"), run.section("method"), run.section("training")
    source = {"builtin": "the built-in tasks"}.get(str(data.get("source")), str(data.get("source")))
    if run.method == "base":
        return f"{model} as it is, on {source}."
    options = [
        f"{value} {_OPTIONS[key]}" if key != "r" else f"rank {value}"
        for key, value in method.items()
        if key in _OPTIONS
    ]
    how = f" ({', '.join(options)})" if options else ""
    order = data.get("order")
    sequence = "" if order is None else ", one task after another"
    rate = training.get("learning_rate")
    facts = [f"learning rate {rate:g}"] if isinstance(rate, float) else []
    facts += [f"seed {training['seed']}"] if "seed" in training else []
    return f"{model} tuned by {run.method}{how} on {source}{sequence}" + (f"; {listed(facts)}." if facts else ".")


def _of_comparison(report: Report, source: Source) -> Summary:
    results = source.results
    assert results is not None
    summaries = source.summaries
    scored = [scores for method in results.methods for _, scores in results.scored(method)]
    tiles = [Tile(str(len(summaries)), "scored methods"), Tile(str(len(scored)), "scored runs")]
    if scored:
        tiles.append(Tile(str(len(scored[0].tasks)), "tasks"))
    tiles += [
        Tile(number(summary.rouge_l.mean), f"Rouge-L, {summary.method}")
        for summary in summaries
        if summary.rouge_l and summary.method in (results.reference, "badit")
    ]
    how = "all tasks mixed" if results.protocol == "mixed" else "one task after another"
    what = f"A comparison of {counted(len(results.methods), 'method')}, {how}"
    text = f"{what}; differences are taken to {results.reference}."
    return Summary(source.label, text, tiles, [report.origin(source, RESULTS)])


def _number(values: dict[str, Any], key: str) -> float | None:
    value = values.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _short(count: float) -> str:
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
