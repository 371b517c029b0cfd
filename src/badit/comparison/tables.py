"""Tables of a comparison's results, as text, Markdown, LaTeX or CSV."""

import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd

from badit.comparison.results import Results, differences, summarise, task_means
from badit.comparison.verdict import verdict
from badit.metrics.answers import METRICS, score_text
from badit.presets import NAMES
from badit.runs.scores import Transfer
from badit.support.console import one_line
from badit.support.text import UNKNOWN, number, text_table

_TRANSFER_TITLES = {
    "forgetting": "forgetting",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
}
_PLACE = ["seed", "order", "learning_rate"]  # of a cell of a method
_COSTS = {
    "rank": ("rank", "g"),
    "task_rank": ("task rank", ".1f"),
    "seconds": ("time (s)", ".0f"),
    "peak_memory_gib": ("GiB", ".1f"),
}

_escape_markdown = partial(re.compile(r"([\\`*_|<>\[\]~$&])").sub, r"\\\1")

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "−": "$-$",
    "×": r"$\times$",
    "–": "--",
}


class Table(NamedTuple):
    """The table of a comparison, before it is formatted.

    ``texts`` has row names first, and ``best`` the (row, column) of bold texts. ``notes`` are lines
    below the table. ``numbers`` has its rows in full precision and the cells that are not in it.
    """

    texts: pd.DataFrame
    best: Set[tuple[int, int]]
    notes: Sequence[str]
    numbers: pd.DataFrame


def method_table(results: Results, metric: str | None = None, released: bool = False) -> Table:
    """Returns a table with one row per method that has scores.

    ``metric`` is that of ranks and differences (default: ``results.metric``).
    """
    metric = metric or results.metric
    summary = summarise(results, metric, "released" if released else "standard")
    # The notes name methods without a finished run.
    summary = summary.query("runs > 0").reset_index(drop=True)
    if results.protocol == "sequential":
        runs, score = "runs", "AP"
        spreads = {"rouge_l": score, **_TRANSFER_TITLES}
        costs = {"rank": _COSTS["rank"]}
        notes = [
            "runs: seeds × task orders; AP: mean Rouge-L over tasks after the last task;"
            " rank: by AP, 1 is best",
            f"forgetting, BWT, FWT: {'as in released code' if released else 'standard form'}",
        ]
    else:
        runs, score = "seeds", METRICS[metric].label
        measured = set(results.scores["metric"])
        spreads = {name: METRICS[name].label for name in METRICS if name in measured}
        costs = _COSTS
        notes = [
            f"rank: by {score}, 1 is best; task rank: mean of the ranks on the single tasks",
            "time: median over seeds; GiB: peak memory, maximum over seeds",
        ]

    columns: dict[str, Any] = {
        "method": [_shown_name(results, method) for method in summary["method"]],
        "parameters": [number(count, ".0f") for count in summary["trainable_parameters"]],
        "lr": summary["learning_rate"].fillna(UNKNOWN),
        runs: summary["runs"].astype(str),
    }
    best = set[tuple[int, int]]()
    for name, title in spreads.items():
        best |= {(row, len(columns)) for row in _best_rows(summary, name)}
        columns[title] = _spread_texts(summary, name)
    columns[f"vs {results.reference} [95 %]"] = _difference_texts(summary, metric)
    if metric != "nll" and "nll" in set(results.scores["metric"]):
        losses = differences(results, "nll").add_prefix("nll_difference_")
        losses["nll_level"] = losses.pop("nll_difference_level").astype("boolean")
        losses["nll_difference_runs"] = losses["nll_difference_runs"].astype("Int64")
        summary = summary.join(losses, on="method")
        columns[f"NLL vs {results.reference} [95 %]"] = _difference_texts(summary, "nll", "nll_")
    for name, (title, form) in costs.items():
        columns[title] = [number(value, form) for value in summary[name]]

    numbers = ["method", "trainable_parameters", "learning_rate", "runs"]
    numbers += [f"{name}_{statistic}" for name in spreads for statistic in ("mean", "std")]
    numbers += [name for name in summary if name.startswith("difference_")] + ["level"]
    numbers += [name for name in summary if name.startswith(("nll_difference_", "nll_level"))]
    numbers += costs
    notes = [*_difference_notes(results, summary, score, metric), *notes]
    notes += _title_notes(results, list(summary["method"]))
    texts = pd.DataFrame(columns, dtype=object)
    table = _with_omitted_cells(results, Table(texts, best, notes, summary.filter(numbers)))
    return table._replace(notes=[*table.notes, *map(one_line, verdict(results, metric))])


def task_table(results: Results, metric: str) -> Table:
    """Returns a table with one row per task and one column per method that has scores."""
    means = task_means(results, metric)
    means.loc["mean over tasks"] = [fmean(means[method]) for method in means]
    texts = means.map(lambda value: score_text(value, metric))
    # A method may have the name "task" too.
    texts.insert(0, "task", means.index, allow_duplicates=True)
    best = {
        (row, column + 1)
        for row, values in enumerate(means.to_numpy())
        for column in best_of(values, metric)
    }
    notes = [f"{METRICS[metric].label}, mean over each method's runs"]
    notes += _title_notes(results, list(means))
    numbers = means.add_suffix(f"_{metric}", axis="columns").reset_index()
    return _with_omitted_cells(results, Table(texts, best, notes, numbers))


def best_of(values: Any, metric: str) -> list[int]:
    """Returns the index of the best value of a metric, as a list.

    It is empty if the best value, as it is shown, is not the only one.
    """
    decimals = METRICS[metric].decimals
    merits = pd.Series(values, dtype=float).reset_index(drop=True).round(decimals)
    if METRICS[metric].lower_is_better:
        merits = -merits
    best = merits.index[merits == merits.max()].tolist()
    return best if len(best) == 1 else []


def _best_rows(summary: pd.DataFrame, name: str) -> list[int]:
    means = summary[f"{name}_mean"]
    if name in METRICS:
        return best_of(means, name)
    # Transfer is in points of Rouge-L; less forgetting is better.
    return best_of(-means if name == "forgetting" else means, "rouge_l")


def _spread_texts(summary: pd.DataFrame, name: str) -> list[str]:
    """Returns "mean ± standard deviation" of every method; the mean only of a single run."""
    unit = "rouge_l" if name in Transfer.model_fields else name  # transfer is in points of Rouge-L
    texts = []
    for mean, deviation in zip(summary[f"{name}_mean"], summary[f"{name}_std"], strict=True):
        text = score_text(mean, unit)
        if not pd.isna(deviation):
            text += f" ± {score_text(deviation, unit)}"
        texts.append(text)
    return texts


def _difference_texts(summary: pd.DataFrame, metric: str, prefix: str = "") -> list[str]:
    """Returns "mean [low, high]" of every method's difference to the reference."""
    texts = []
    for row in summary.to_dict("records"):
        mean, low, high = (
            score_text(row[f"{prefix}difference_{end}"], metric, "+")
            for end in ("mean", "low", "high")
        )
        text = mean
        if mean != UNKNOWN:
            text += f" [{low}, {high}]"
        # Not decided (NA) without pairs of runs.
        if row[f"{prefix}level"] is True:
            text += " ≈"
        texts.append(text)
    return texts


def _difference_notes(
    results: Results, summary: pd.DataFrame, score: str, metric: str
) -> list[str]:
    reference = results.reference
    if reference not in results.scored_methods:
        return [f"vs {reference}: no differences, because {reference} has no scores"]
    notes = [
        f"vs {reference}: paired difference in {score} over the runs that both have,"
        " and its 95 % bootstrap interval over runs and instances"
    ]
    levels = {"level": metric, "nll_level": "nll"}
    margins = [
        f"±{METRICS[name].margin:g} ({METRICS[name].label})"
        for column, name in levels.items()
        if column in summary and True in summary[column].fillna(False).tolist()
    ]
    if margins:
        notes.append(f"≈: equivalent, the 90 % interval lies within {', '.join(margins)}")
    compared = summary.query("method != @reference").fillna({"difference_runs": 0})
    columns = compared[["method", "runs", "difference_runs"]]
    for method, runs, shared in columns.itertuples(index=False):
        if shared < runs:
            notes.append(
                f"{method} vs {reference}: over the {shared} of its {runs} runs that both have"
            )
    if 1 in compared["difference_runs"].tolist():
        notes.append("an interval over one run covers instances only, not other seeds")
    return notes


def _shown_name(results: Results, method: str) -> str:
    """Returns the given name, with what it is if it is another form's name, as of earlier results.

    Until format 6, ``badit`` had the options of ``cluster-gates``.
    """
    title = results.titles.get(method, method)
    if method in NAMES and title != method:
        return f"{method} (= {title})"
    return method


def _title_notes(results: Results, methods: Sequence[str]) -> list[str]:
    """Says what BADIT's methods are, where the names in the table do not."""
    titles = []
    for method in methods:
        title = results.titles.get(method, method)
        if title != method and title.startswith(NAMES):
            titles.append(f"{method} = {title}")
    return [f"by their options: {'; '.join(titles)}"] if titles else []


def _with_omitted_cells(results: Results, table: Table) -> Table:
    """Adds notes on methods without scores and on missing and failed cells.

    The latter become the last rows of the numbers.
    """
    notes = [*table.notes]
    unscored = [name for name in results.methods if name not in results.scored_methods]
    if unscored:
        notes.append(f"no finished run: {', '.join(unscored)}")

    omitted = results.cells.query("status != 'done'")
    omitted = omitted[["method", *_PLACE, "status", "error"]].astype(object)
    missing = Counter(omitted.query("status == 'missing'")["method"])
    if missing:
        counts = [f"{count} of {method}" for method, count in missing.items()]
        notes.append(f"missing runs: {', '.join(counts)}")
    failed = omitted.query("status == 'failed'").to_dict("records")
    notes += map(_failure_note, failed)
    # In CSV, a reader also sees the cells that the means leave out.
    numbers = pd.concat([table.numbers.astype(object), omitted])
    return table._replace(notes=[*map(one_line, notes)], numbers=numbers)


def _failure_note(cell: dict[str, Any]) -> str:
    coordinates = [name for name in _PLACE if pd.notna(cell[name])]
    place = [f"{name.replace('_', ' ')} {cell[name]}" for name in coordinates]
    note = f"failed: {', '.join([cell['method'], *place])}"
    if pd.isna(cell["error"]) or not cell["error"]:
        return note
    return f"{note} ({' '.join(cell['error'].split()):.100})"


def _lines(
    table: Table, escape: Callable[[str], str] = str, bold: Callable[[str], str] = str
) -> list[list[str]]:
    """Returns the header and the rows of the table as escaped texts."""
    rows = [table.texts.columns, *table.texts.to_numpy()]
    lines = [[escape(one_line(text)) for text in row] for row in rows]
    for row, column in table.best:
        lines[row + 1][column] = bold(lines[row + 1][column])
    return lines


def _text(table: Table) -> str:
    header, *rows = _lines(table)
    return "\n".join([text_table(header, rows), "", *table.notes])


def _markdown(table: Table) -> str:
    header, *rows = _lines(table, _escape_markdown, lambda text: f"**{text}**")
    alignment = ["---"] + ["---:"] * (len(header) - 1)
    lines = [f"| {' | '.join(row)} |" for row in (header, alignment, *rows)]
    return "\n".join([*lines, "", *(f"- {_escape_markdown(note)}" for note in table.notes)])


def _latex(table: Table) -> str:
    translation = str.maketrans(_LATEX)
    rows = _lines(
        table, lambda text: text.translate(translation), lambda text: rf"\textbf{{{text}}}"
    )
    # After \\ of the row above, LaTeX would read [ as an optional argument, and * as a part of the
    # command.
    header, *lines = [re.sub(r"^[\[*]", r"{\g<0>}", " & ".join(row)) + r" \\" for row in rows]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"
    end = [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in table.notes)]
    return "\n".join([begin, r"\toprule", header, r"\midrule", *lines, *end])


def _csv(table: Table) -> str:
    return table.numbers.to_csv(index=False).removesuffix("\n")


#: Formats of a comparison's table. In CSV, each cell that is not in the table has an extra row with
#: its status.
FORMATS: dict[str, Callable[[Table], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
}
