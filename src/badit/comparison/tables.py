"""Tables of a comparison's results and of a run's scores, as text, Markdown, LaTeX or CSV."""

import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd

from badit.comparison.results import Results, summarise, task_means
from badit.metrics.answers import METRICS, score_text
from badit.support.console import one_line
from badit.support.text import UNKNOWN, number, text_table

_escape_markdown = partial(re.compile(r"([\\`*_|<>\[\]~$&])").sub, r"\\\1")
_LATEX_NAMES = {
    "\\": "backslash",
    "~": "asciitilde",
    "^": "asciicircum",
    "<": "less",
    ">": "greater",
    "|": "bar",
}
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {character: rf"\text{name}{{}}" for character, name in _LATEX_NAMES.items()}
_LATEX |= {"±": r"$\pm$", "≈": r"$\approx$", "−": "$-$", "×": r"$\times$", "–": "--"}


class Table(NamedTuple):
    """The table of a comparison: ``texts``, with row names first, and in ``best`` the (row, column) of bold texts.

    ``notes`` are lines below the table. ``numbers`` has its rows in full precision and the cells that are not in it.
    """

    texts: pd.DataFrame
    best: Set[tuple[int, int]]
    notes: Sequence[str]
    numbers: pd.DataFrame


def method_table(results: Results, metric: str = "rouge_l", released: bool = False) -> Table:
    """Returns a table with one row per method that has scores."""
    last = {"rank": ("rank", "g")}
    if results.protocol == "sequential":
        runs, score = "runs", "AP"
        spreads = {
            "rouge_l": "AP",
            "forgetting": "forgetting",
            "backward_transfer": "BWT",
            "forward_transfer": "FWT",
        }
        notes = [
            "runs: seeds × task orders; AP: mean Rouge-L over tasks after the last task; rank: by AP, 1 is best",
            f"forgetting, BWT, FWT: {'as in released code' if released else 'standard form'}",
        ]
    else:
        runs, score = "seeds", METRICS[metric].label
        known = set(results.scores["metric"])
        spreads = {name: about.label for name, about in METRICS.items() if name in known}
        last |= {
            "task_rank": ("task rank", ".1f"),
            "seconds": ("time (s)", ".0f"),
            "peak_memory_gib": ("GiB", ".1f"),
        }
        notes = [
            f"rank: by {score}, 1 is best; task rank: mean of the ranks on the single tasks",
            "time: median over seeds; GiB: peak memory, maximum over seeds",
        ]
    summary = summarise(results, metric, "released" if released else "standard")
    summary = summary.loc[summary["runs"] > 0].reset_index(drop=True)
    columns: dict[str, Any] = {
        "method": summary["method"],
        "parameters": [number(count, ".0f") for count in summary["trainable_parameters"]],
        "lr": summary["learning_rate"].fillna(UNKNOWN),
        runs: summary["runs"].astype(str),
    }
    best = set()
    for name, title in spreads.items():
        means, stds = (summary[f"{name}_{part}"] for part in ("mean", "std"))
        unit = name if name in METRICS else "rouge_l"  # transfer is in points of Rouge-L
        lower_is_better = name == "forgetting" or METRICS[unit].lower_is_better
        best |= {(i, len(columns)) for i in best_of(means, lower_is_better)}
        spread = ["" if pd.isna(std) else f" ± {score_text(std, unit)}" for std in stds]
        columns[title] = [
            score_text(mean, unit) + text for mean, text in zip(means, spread, strict=True)
        ]
    columns[f"vs {results.reference} [95 %]"] = differences = []
    for row in summary.to_dict("records"):
        mean, low, high = (
            score_text(row[f"difference_{part}"], metric, "+") for part in ("mean", "low", "high")
        )
        differences.append(
            mean
            if mean == UNKNOWN
            else f"{mean} [{low}, {high}]{' ≈' if row['level'] is True else ''}"
        )
    columns |= {
        title: [number(x, form) for x in summary[name]] for name, (title, form) in last.items()
    }
    numbers = ["method", "trainable_parameters", "learning_rate", "runs"]
    numbers += [f"{name}_{part}" for name in spreads for part in ("mean", "std")]
    numbers += [name for name in summary if name.startswith("difference_")] + ["level", *last]
    notes = [*_difference_notes(results, summary, score, metric), *notes]
    return _with_omitted_cells(
        results, Table(pd.DataFrame(columns, dtype=object), best, notes, summary[numbers])
    )


def task_table(results: Results, metric: str) -> Table:
    """Returns a table with one row per task and one column per method that has scores."""
    means = task_means(results, metric)
    means.loc["mean over tasks"] = [fmean(means[method]) for method in means]
    texts = means.map(lambda value: score_text(value, metric))
    texts.insert(0, "task", means.index, allow_duplicates=True)
    lower_is_better = METRICS[metric].lower_is_better
    best = {
        (i, j + 1) for i, row in enumerate(means.to_numpy()) for j in best_of(row, lower_is_better)
    }
    notes = [f"{METRICS[metric].label}, mean over each method's runs"]
    numbers = means.add_suffix(f"_{metric}", axis="columns").reset_index()
    return _with_omitted_cells(results, Table(texts, best, notes, numbers))


def _with_omitted_cells(results: Results, table: Table) -> Table:
    """Adds notes on methods without scores, and on missing and failed cells, whose numbers become the last rows."""
    notes = [*table.notes]
    if unscored := [name for name in results.methods if name not in results.scored_methods]:
        notes.append(f"no finished run: {', '.join(unscored)}")
    place = ["seed", "order", "learning_rate"]
    omitted = results.cells.loc[
        results.cells["status"] != "done", ["method", *place, "status", "error"]
    ].astype(object)
    if missing := Counter(omitted.loc[omitted["status"] == "missing", "method"]):
        notes.append(
            f"missing runs: {', '.join(f'{count} of {method}' for method, count in missing.items())}"
        )
    for cell in (
        omitted.where(omitted.notna(), None).loc[omitted["status"] == "failed"].to_dict("records")
    ):
        where = [
            f"{name.replace('_', ' ')} {cell[name]}" for name in place if cell[name] is not None
        ]
        reason = f" ({' '.join(cell['error'].split()):.100})" if cell["error"] else ""
        notes.append(f"failed: {', '.join([cell['method'], *where])}{reason}")
    return table._replace(
        notes=[*map(one_line, notes)], numbers=pd.concat([table.numbers.astype(object), omitted])
    )


def best_of(values: Any, lower_is_better: bool) -> list[int]:
    """Returns the indices of the best value: several if values are equal up to rounding."""
    merits = pd.Series(values, dtype=float).reset_index(drop=True) * (-1 if lower_is_better else 1)
    return merits.index[merits >= merits.max() - 1e-9].tolist()


def _difference_notes(
    results: Results, summary: pd.DataFrame, score: str, metric: str
) -> list[str]:
    reference = results.reference
    if reference not in results.scored_methods:
        return [f"vs {reference}: no differences, because {reference} has no scores"]
    interval = "its 95 % bootstrap interval over runs and instances"
    notes = [
        f"vs {reference}: paired difference in {score} over the runs that both have, and {interval}"
    ]
    if any(level is True for level in summary["level"].tolist()):
        notes.append(f"≈: equivalent, the 90 % interval lies within ±{METRICS[metric].margin:g}")
    paired = summary.loc[
        summary["method"] != reference, ["method", "runs", "difference_runs"]
    ].fillna(0)
    for method, runs, both in paired.itertuples(index=False):
        if both < runs:
            notes.append(
                f"{method} vs {reference}: over the {both} of its {runs} runs that both have"
            )
    if 1 in paired["difference_runs"].tolist():
        notes.append("an interval over one run covers instances only, not other seeds")
    return notes


def _lines(
    table: Table, escape: Callable[[str], str] = str, bold: Callable[[str], str] = str
) -> list[list[str]]:
    lines = [
        [escape(one_line(text)) for text in row]
        for row in (table.texts.columns, *table.texts.to_numpy())
    ]
    for row, column in table.best:
        lines[row + 1][column] = bold(lines[row + 1][column])
    return lines


def _text(table: Table) -> str:
    header, *rows = _lines(table)
    return "\n".join([text_table(header, rows), "", *table.notes])


def _markdown(table: Table) -> str:
    header, *rows = _lines(table, _escape_markdown, lambda value: f"**{value}**")
    lines = [
        f"| {' | '.join(row)} |" for row in (header, ["---", *("---:" for _ in header[1:])], *rows)
    ]
    return "\n".join([*lines, "", *(f"- {_escape_markdown(note)}" for note in table.notes)])


def _latex(table: Table) -> str:
    lines = _lines(
        table,
        lambda value: value.translate(str.maketrans(_LATEX)),
        lambda value: rf"\textbf{{{value}}}",
    )
    # After \\ of the row above, LaTeX would read [ as an optional argument, and * as a part of the command.
    header, *rows = [re.sub(r"^[\[*]", r"{\g<0>}", " & ".join(line)) + r" \\" for line in lines]
    begin, end = rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}", r"\end{tabular}"
    notes = [f"% {note}" for note in table.notes]
    return "\n".join([begin, r"\toprule", header, r"\midrule", *rows, r"\bottomrule", end, *notes])


#: Formats of a comparison's table. In CSV, each cell that is not in the table has an extra row with its status.
FORMATS: dict[str, Callable[[Table], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
    "csv": lambda table: table.numbers.to_csv(index=False).removesuffix("\n"),
}
