"""``badit table RESULTS``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from badit.cli.tables import FORMATS, OMITTED_FIELDS, Column, Table
from badit.errors import BaditError

if TYPE_CHECKING:
    from badit.evaluation.results import MethodSummary, Metric, Results
    from badit.statistics import Difference, Spread

_METRICS = {"rouge_l": "Rouge-L", "exact_match": "EM"}
# The scores whose best is made bold, and whether that is the highest (1) or the lowest (-1).
_SIGN_OF_BETTER = {"rouge_l": 1, "exact_match": 1, "forgetting": -1, "backward_transfer": 1, "forward_transfer": 1}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", help="a comparison's results.json, or the folder that holds it")
    parser.add_argument("--format", choices=list(FORMATS), default="text", help="default: text")
    parser.add_argument(
        "--metric",
        choices=list(_METRICS),
        default="rouge_l",
        help="of differences, ranks and --by-task; default: rouge_l",
    )
    parser.add_argument("--by-task", action="store_true", help="a row for each task, a column for each method")
    parser.add_argument(
        "--released", action="store_true", help="forgetting and transfer as SAPT's released code computes them"
    )


def execute(options: argparse.Namespace) -> None:
    print(
        render(
            options.results,
            form=options.format,
            metric=options.metric,
            by_task=options.by_task,
            released=options.released,
        )
    )


def render(
    path: str | os.PathLike[str],
    *,
    form: str = "text",
    metric: Metric = "rouge_l",
    by_task: bool = False,
    released: bool = False,
) -> str:
    """The table of a results file, or of the folder that holds it; the arguments are the command's options.

    Raises:
        BaditError: the file is missing or broken, or an option does not go with its protocol.
    """
    from badit.evaluation.results import load_results

    results = load_results(path)
    sequence = results.protocol == "sequential" and not by_task
    if released and not sequence:
        raise BaditError("--released: only for the table of a sequential comparison; leave it out")
    if metric != "rouge_l" and sequence:
        raise BaditError("--metric: forgetting and transfer are measured in Rouge-L; leave it out, or add --by-task")
    if by_task:
        content = _task_table(results, metric)
    elif sequence:
        content = _sequential_table(results, released=released)
    else:
        content = _mixed_table(results, metric)
    return FORMATS[form](content)


def _mixed_table(results: Results, metric: Metric) -> Table:
    from badit.evaluation.results import summarise

    columns = [
        *_FIRST_COLUMNS,
        Column("runs", "seeds"),
        _spread_column("rouge_l", "Rouge-L"),
        _spread_column("exact_match", "EM"),
        _difference_column(results),
        Column("rank", "rank", "{:g}".format),
        Column("task_rank", "task rank", "{:.1f}".format),
        Column("seconds", "time (s)", "{:,.0f}".format),
        Column("peak_memory_gib", "GiB", "{:.1f}".format),
    ]
    notes = [
        f"rank: by {_METRICS[metric]}, 1 is best; task rank: mean over tasks of the rank on each",
        "time: median, GiB: maximum over seeds",
    ]
    return _method_table(results, columns, summarise(results, metric=metric), _METRICS[metric], notes)


def _sequential_table(results: Results, *, released: bool) -> Table:
    from badit.evaluation.results import summarise

    columns = [
        *_FIRST_COLUMNS,
        Column("runs", "runs"),
        _spread_column("rouge_l", "AP"),
        _spread_column("forgetting", "forgetting"),
        _spread_column("backward_transfer", "BWT"),
        _spread_column("forward_transfer", "FWT"),
        _difference_column(results),
        Column("rank", "rank", "{:g}".format),
    ]
    notes = [
        "runs: seeds × task orders; AP: mean Rouge-L over tasks after the last one; rank: by AP, 1 is best",
        f"forgetting, BWT, FWT: {'as in released code' if released else 'standard form'}",
    ]
    summaries = summarise(results, form="released" if released else "standard")
    return _method_table(results, columns, summaries, "AP", notes)


def _method_table(
    results: Results, columns: Sequence[Column], summaries: Sequence[MethodSummary], score: str, notes: Sequence[str]
) -> Table:
    """A row for each method that has been scored; every column is an attribute of the summaries."""
    notes = [*notes, *_unscored(results)]
    summaries = [summary for summary in summaries if summary.runs]
    rows = [[getattr(summary, column.name) for column in columns] for summary in summaries]
    best = set()
    for j, column in enumerate(columns):
        if sign := _SIGN_OF_BETTER.get(column.name):
            best |= {(i, j) for i in _highest([None if row[j] is None else sign * row[j].mean for row in rows])}
    return Table(columns, rows, best, [*_difference_notes(results, summaries, score), *notes], _omitted(results))


def _task_table(results: Results, metric: Metric) -> Table:
    from badit.evaluation.results import task_means

    methods = [name for name in results.methods if results.scored(name)]
    columns = [Column("task", "task"), *(Column(f"{name}_{metric}", name, _score) for name in methods)]
    means = task_means(results, metric)
    rows: list[list[Any]] = [[task, *map(by_method.get, methods)] for task, by_method in means.items()]
    rows.append(["mean over tasks", *(fmean(by_method[name] for by_method in means.values()) for name in methods)])
    best = {(i, j) for i, row in enumerate(rows) for j in _highest([None, *row[1:]])}
    notes = [f"{_METRICS[metric]}, mean over each method's runs", *_unscored(results)]
    return Table(columns, rows, best, notes, _omitted(results))


def _unscored(results: Results) -> list[str]:
    names = [name for name in results.methods if not results.scored(name)]
    return [f"no finished run: {', '.join(names)}"] if names else []


def _highest(values: Sequence[float | None]) -> list[int]:
    """Where the highest value is; in several places if it is shared, up to rounding."""
    known = {i: value for i, value in enumerate(values) if value is not None}
    return [i for i, value in known.items() if value >= max(known.values()) - 1e-9]


def _difference_notes(results: Results, summaries: Sequence[MethodSummary], score: str) -> list[str]:
    reference = results.reference
    if not results.scored(reference):
        return [f"vs {reference}: no differences, as {reference} has no scores"]
    notes = [f"vs {reference}: paired difference in {score} and its 95 % bootstrap interval over runs and instances"]
    paired = [(summary, summary.difference.runs) for summary in summaries if summary.difference]
    notes += [
        f"{summary.method} vs {reference}: over the {runs} of its {summary.runs} runs that both have"
        for summary, runs in paired
        if runs < summary.runs
    ]
    if any(runs == 1 for _, runs in paired):
        notes.append("an interval over one run is over instances alone and says nothing of other seeds")
    return notes


def _omitted(results: Results) -> list[dict[str, Any]]:
    return [cell.model_dump(include=set(OMITTED_FIELDS)) for cell in results.omitted()]


def _spread_column(name: str, header: str) -> Column:
    return Column(name, header, _spread, ("mean", "std"))


def _difference_column(results: Results) -> Column:
    parts = ("mean", "low", "high", "share_not_positive", "runs")
    return Column("difference", f"vs {results.reference} [95 %]", _difference, parts)


def _spread(value: Spread) -> str:
    return _score(value.mean) + ("" if value.std is None else f" ± {_score(value.std)}")


def _difference(value: Difference) -> str:
    return f"{_score(value.mean, '+')} [{_score(value.low, '+')}, {_score(value.high, '+')}]"


def _score(value: float, sign: str = "-") -> str:
    # z: what rounds to zero has no sign.
    return f"{value:{sign}z.1f}".replace("-", "−")


_FIRST_COLUMNS = (
    Column("method", "method"),
    Column("trainable_parameters", "parameters", "{:,}".format),
    Column("learning_rate", "lr"),
)
