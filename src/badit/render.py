"""Tables for the terminal, for papers and for other programs: a comparison's results, and a run's scores."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from badit.errors import BaditError, nearest, one_line
from badit.metrics import METRICS
from badit.results import Results, load_results, summarise, task_means

UNKNOWN = "–"
# Of a cell that is not in the table; they are the last columns of the CSV form.
_OMITTED = ["method", "seed", "order", "learning_rate", "status", "error"]

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_|<>\[\]])")
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
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
)


@dataclass(frozen=True)
class Table:
    """A comparison's table.

    Attributes:
        columns: each with its title and its values as text; the first one names the row.
        best: (row, column) of what is made bold.
        notes: lines below the table.
        numbers: a row for each row of the table in full precision, which is what the CSV form has.
        omitted: the comparison's cells that the table does not cover.
    """

    columns: Sequence[tuple[str, Sequence[str]]]
    best: Set[tuple[int, int]]
    notes: Sequence[str]
    numbers: pd.DataFrame
    omitted: pd.DataFrame

    def lines(self, escape: Callable[[str], str] = str, bold: Callable[[str], str] = str) -> list[list[str]]:
        """The header and the rows as text."""
        lines = zip(*([title, *texts] for title, texts in self.columns), strict=True)
        escaped = [[escape(one_line(text)) for text in line] for line in lines]
        return [
            [bold(text) if (i - 1, j) in self.best else text for j, text in enumerate(line)]
            for i, line in enumerate(escaped)
        ]

    def footer(self) -> list[str]:
        """The notes and the omitted cells, one line each."""
        cells = [f"not in the table: {_described(cell)}" for cell in self.omitted.to_dict("records")]
        return [one_line(line) for line in (*self.notes, *cells)]


def render(
    path: str | os.PathLike[str],
    *,
    form: str = "text",
    metric: str = "rouge_l",
    by_task: bool = False,
    released: bool = False,
) -> str:
    """The table of a results file, or of the folder that holds it.

    Args:
        path: a results.json, or a comparison's folder.
        form: ``text``, ``markdown``, ``latex`` (a booktabs tabular) or ``csv`` (in full precision).
        metric: of ranks and differences, and of the scores by task.
        by_task: a row per task and a column per method, instead of a row per method.
        released: forgetting and transfer as SAPT's released code computes them, for sequential comparisons.

    Raises:
        BaditError: the file is missing or broken, or an option is unknown or does not go with its protocol.
    """
    for option, value, known in (("--format", form, FORMATS), ("--metric", metric, METRICS)):
        if value not in known:
            raise BaditError(f"{option}: {value!r:.60} is none of {', '.join(known)}{nearest(value, known)}")
    results = load_results(path)
    sequence = results.protocol == "sequential" and not by_task
    if released and not sequence:
        raise BaditError("--released: only for the table of a sequential comparison; leave it out")
    if metric != "rouge_l" and sequence:
        raise BaditError("--metric: forgetting and transfer are measured in Rouge-L; leave it out, or add --by-task")
    table = _task_table(results, metric) if by_task else method_table(results, metric, released)
    return FORMATS[form](table)


def method_table(results: Results, metric: str = "rouge_l", released: bool = False) -> Table:
    """A row for each method that has been scored."""
    label = METRICS[metric].label
    patterns = {"rank": ("rank", "{:g}")}
    if results.protocol == "sequential":
        runs, score = "runs", "AP"
        spreads = {"rouge_l": "AP", "forgetting": "forgetting", "backward_transfer": "BWT", "forward_transfer": "FWT"}
        notes = [
            "runs: seeds × task orders; AP: mean Rouge-L over tasks after the last one; rank: by AP, 1 is best",
            f"forgetting, BWT, FWT: {'as in released code' if released else 'standard form'}",
        ]
    else:
        runs, score = "seeds", label
        known = set(results.scores["metric"])
        spreads = {name: metric.label for name, metric in METRICS.items() if name in known}
        patterns |= {"task_rank": ("task rank", "{:.1f}"), "seconds": ("time (s)", "{:,.0f}")}
        patterns |= {"peak_memory_gib": ("GiB", "{:.1f}")}
        notes = [
            f"rank: by {label}, 1 is best; task rank: mean over tasks of the rank on each",
            "time: median, GiB: maximum over seeds",
        ]
    summary = summarise(results, metric, "released" if released else "standard")
    summary = summary.loc[summary["runs"] > 0]
    columns = [
        ("method", _texts(summary["method"])),
        ("parameters", _texts(summary["trainable_parameters"], "{:,}".format)),
        ("lr", _texts(summary["learning_rate"])),
        (runs, _texts(summary["runs"])),
    ]
    best = set()
    for name, title in spreads.items():
        means, stds = (summary[f"{name}_{part}"] for part in ("mean", "std"))
        lower_is_better = name == "forgetting" or (name in METRICS and METRICS[name].lower_is_better)
        best |= {(i, len(columns)) for i in _highest(-means if lower_is_better else means)}
        show = _number(METRICS[name].decimals if name in METRICS else 1)
        columns.append((title, [_spread(mean, std, show) for mean, std in zip(means, stds, strict=True)]))
    difference = [summary[f"difference_{part}"] for part in ("mean", "low", "high")]
    signed = _number(METRICS[metric].decimals, "+")
    intervals = [
        _interval(mean, low, high, level, signed)
        for mean, low, high, level in zip(*difference, summary["level"], strict=True)
    ]
    columns.append((f"vs {results.reference} [95 %]", intervals))
    columns += [(title, _texts(summary[name], pattern.format)) for name, (title, pattern) in patterns.items()]
    numbers = ["method", "trainable_parameters", "learning_rate", "runs"]
    numbers += [f"{name}_{part}" for name in spreads for part in ("mean", "std")]
    numbers += [name for name in summary if name.startswith("difference_")] + ["level", *patterns]
    notes = [*_difference_notes(results, summary, score, metric), *notes, *_unscored(results)]
    return Table(columns, best, notes, summary[numbers], _omitted(results))


def _task_table(results: Results, metric: str) -> Table:
    """A row for each task, a column for each method that has been scored."""
    means = task_means(results, metric)
    means.loc["mean over tasks"] = [fmean(means[method]) for method in means]
    show = _number(METRICS[metric].decimals)
    columns = [("task", _texts(means.index)), *((method, _texts(means[method], show)) for method in means)]
    sign = -1 if METRICS[metric].lower_is_better else 1
    best = {(i, j + 1) for i, row in enumerate(sign * means.to_numpy()) for j in _highest(row)}
    notes = [f"{METRICS[metric].label}, mean over each method's runs", *_unscored(results)]
    numbers = means.add_suffix(f"_{metric}", axis="columns").reset_index()
    return Table(columns, best, notes, numbers, _omitted(results))


def _texts(values: Iterable[Any], show: Callable[[Any], str] = str) -> list[str]:
    return [UNKNOWN if pd.isna(value) else show(value) for value in values]


def _number(decimals: int, sign: str = "-") -> Callable[[float], str]:
    # z: what rounds to zero has no sign.
    return lambda value: f"{value:{sign}z.{decimals}f}".replace("-", "−")


def _spread(mean: float, std: float, show: Callable[[float], str]) -> str:
    return UNKNOWN if pd.isna(mean) else show(mean) + ("" if pd.isna(std) else f" ± {show(std)}")


def _interval(mean: float, low: float, high: float, level: Any, show: Callable[[float], str]) -> str:
    text = UNKNOWN if pd.isna(mean) else f"{show(mean)} [{show(low)}, {show(high)}]"
    return f"{text} ≈" if not pd.isna(level) and level else text


def _highest(values: Any) -> list[int]:
    """Where the highest value is; in several places if it is shared, up to rounding."""
    known = {i: value for i, value in enumerate(values) if not pd.isna(value)}
    return [i for i, value in known.items() if value >= max(known.values()) - 1e-9]


def _unscored(results: Results) -> list[str]:
    names = [name for name in results.methods if name not in results.scored_methods]
    return [f"no finished run: {', '.join(names)}"] if names else []


def _omitted(results: Results) -> pd.DataFrame:
    return results.cells.loc[results.cells["status"] != "done", _OMITTED]


def _difference_notes(results: Results, summary: pd.DataFrame, score: str, metric: str) -> list[str]:
    reference = results.reference
    if reference not in results.scored_methods:
        return [f"vs {reference}: no differences, as {reference} has no scores"]
    notes = [f"vs {reference}: paired difference in {score} and its 95 % bootstrap interval over runs and instances"]
    if any(level is True for level in summary["level"].tolist()):
        notes.append(f"≈: level, the 90 % interval lies within ±{METRICS[metric].margin:g}")
    paired = summary.loc[summary["difference_runs"].notna()].to_dict("records")
    notes += [
        f"{row['method']} vs {reference}: over the {row['difference_runs']} of its {row['runs']} runs that both have"
        for row in paired
        if row["difference_runs"] < row["runs"]
    ]
    if any(row["difference_runs"] == 1 for row in paired):
        notes.append("an interval over one run is over instances alone and says nothing of other seeds")
    return notes


def _described(cell: Mapping[str, Any]) -> str:
    """``lora, seed 0, learning rate 0.002: failed (out of memory)``."""
    known = {name: cell[name] for name in ("seed", "order", "learning_rate") if not pd.isna(cell[name])}
    place = ", ".join([cell["method"], *(f"{name.replace('_', ' ')} {value}" for name, value in known.items())])
    reason = "" if pd.isna(cell["error"]) else " ".join(cell["error"].split())
    return f"{place}: {cell['status']}" + (f" ({reason:.100})" if reason else "")


def _text(table: Table) -> str:
    header, *rows = table.lines()
    return "\n".join([text_table(header, rows, right=set(range(1, len(header)))), "", *table.footer()])


def _markdown(table: Table) -> str:
    def escape(value: str) -> str:
        return _MARKDOWN_SPECIAL.sub(r"\\\1", value)

    header, *rows = table.lines(escape, lambda value: f"**{value}**")
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---", *("---:" for _ in header[1:])], *rows)]
    return "\n".join([*lines, "", *(f"- {escape(line)}" for line in table.footer())])


def _latex(table: Table) -> str:
    """A booktabs tabular; the lines below the table become comments."""
    lines = table.lines(lambda value: value.translate(_LATEX), lambda value: rf"\textbf{{{value}}}")
    header, *rows = [" & ".join(line) + r" \\" for line in lines]
    begin, end = rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\end{tabular}"
    notes = [f"% {note}" for note in table.footer()]
    return "\n".join([begin, r"\toprule", header, r"\midrule", *rows, r"\bottomrule", end, *notes])


def _csv(table: Table) -> str:
    """In full precision; a cell that was left out is a row of its own, with its status."""
    frame = pd.concat([table.numbers.astype(object), table.omitted.astype(object)])
    return frame.to_csv(index=False).removesuffix("\n")


#: The forms of a comparison's table.
FORMATS: dict[str, Callable[[Table], str]] = {"text": _text, "markdown": _markdown, "latex": _latex, "csv": _csv}


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Set[int] = frozenset()) -> str:
    """Aligned columns under a header and a rule; the columns in ``right`` are right-aligned."""
    header, *rows = [[*map(one_line, line)] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def score_table(scores: Mapping[str, pd.DataFrame]) -> str:
    """A column for every metric of each entry of ``scores``, a row for each task, and the means below.

    Args:
        scores: by name, frames of the same tasks as :func:`badit.results.scores_frame` makes them.
    """
    columns, shown = {}, []
    for name, frame in scores.items():
        for metric, rows in frame.groupby("metric", sort=False):
            shown.append(str(metric))
            columns[f"{name} {METRICS[str(metric)].label}"] = dict(zip(rows["task"], rows["score"], strict=True))
    table = pd.DataFrame(columns)
    table.loc["mean over tasks"] = [fmean(table[name]) for name in table]
    shows = [_number(METRICS[metric].decimals) for metric in shown]
    rows = [
        [str(task), *(show(x) for show, x in zip(shows, scores, strict=True))] for task, *scores in table.itertuples()
    ]
    return text_table(["task", *table], rows, right=set(range(1, len(columns) + 1)))
