"""Tables of a comparison's results and of a run's scores, as text, Markdown, LaTeX or CSV."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd

from badit.errors import one_line
from badit.metrics import METRICS
from badit.results import Results, summarise, task_means

UNKNOWN = "–"
# Columns of cells that are not in the table. The CSV form has these cells as its last rows.
_OMITTED = ["method", "seed", "order", "learning_rate", "status", "error"]

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_|<>\[\]])")
_LATEX_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
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


def number(value: Any, form: str = ".1f", sign: str = "-") -> str:
    """Formats a number: -1234.5 as "−1,234.5". A rounded zero has no minus sign; a missing number is a dash."""
    return UNKNOWN if pd.isna(value) else f"{value:{sign}z,{form}}".replace("-", "−")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def method_table(results: Results, metric: str = "rouge_l", released: bool = False) -> Table:
    """Returns a table with one row per method that has scores."""
    label, form = METRICS[metric].label, f".{METRICS[metric].decimals}f"
    last = {"rank": ("rank", "g")}
    if results.protocol == "sequential":
        runs, score = "runs", "AP"
        spreads = {"rouge_l": "AP", "forgetting": "forgetting", "backward_transfer": "BWT", "forward_transfer": "FWT"}
        notes = [
            "runs: seeds × task orders; AP: mean Rouge-L over tasks after the last task; rank: by AP, 1 is best",
            f"forgetting, BWT, FWT: {'as in released code' if released else 'standard form'}",
        ]
    else:
        runs, score = "seeds", label
        known = set(results.scores["metric"])
        spreads = {name: metric.label for name, metric in METRICS.items() if name in known}
        last |= {"task_rank": ("task rank", ".1f"), "seconds": ("time (s)", ".0f"), "peak_memory_gib": ("GiB", ".1f")}
        notes = [
            f"rank: by {label}, 1 is best; task rank: mean of the ranks on the single tasks",
            "time: median over seeds; GiB: peak memory, maximum over seeds",
        ]
    summary = summarise(results, metric, "released" if released else "standard")
    summary = summary.loc[summary["runs"] > 0]
    columns: dict[str, Iterable[Any]] = {
        "method": summary["method"],
        "parameters": [number(count, ".0f") for count in summary["trainable_parameters"]],
        "lr": summary["learning_rate"].fillna(UNKNOWN),
        runs: map(str, summary["runs"]),
    }
    best = set()
    for name, title in spreads.items():
        means, stds = (summary[f"{name}_{part}"] for part in ("mean", "std"))
        about = METRICS.get(name, METRICS["rouge_l"])  # transfer is in points of Rouge-L
        lower_is_better = name == "forgetting" or about.lower_is_better
        best |= {(i, len(columns)) for i in _highest(-means if lower_is_better else means)}
        own = f".{about.decimals}f"
        pairs = zip(means, stds, strict=True)
        columns[title] = [number(mean, own) + ("" if pd.isna(std) else f" ± {number(std, own)}") for mean, std in pairs]
    columns[f"vs {results.reference} [95 %]"] = differences = []
    for row in summary.to_dict("records"):
        mean, low, high = (number(row[f"difference_{part}"], form, "+") for part in ("mean", "low", "high"))
        differences.append(mean if mean == UNKNOWN else f"{mean} [{low}, {high}]{' ≈' if row['level'] is True else ''}")
    columns |= {title: [number(x, of) for x in summary[name]] for name, (title, of) in last.items()}
    numbers = ["method", "trainable_parameters", "learning_rate", "runs"]
    numbers += [f"{name}_{part}" for name in spreads for part in ("mean", "std")]
    numbers += [name for name in summary if name.startswith("difference_")] + ["level", *last]
    notes = [*_difference_notes(results, summary, score, metric), *notes]
    return _table(results, columns.items(), best, notes, summary[numbers])


def task_table(results: Results, metric: str) -> Table:
    """Returns a table with one row per task and one column per method that has scores."""
    means = task_means(results, metric)
    means.loc["mean over tasks"] = [fmean(means[method]) for method in means]
    form = f".{METRICS[metric].decimals}f"
    columns = [("task", means.index), *((method, [number(x, form) for x in means[method]]) for method in means)]
    sign = -1 if METRICS[metric].lower_is_better else 1
    best = {(i, j + 1) for i, row in enumerate(sign * means.to_numpy()) for j in _highest(row)}
    notes = [f"{METRICS[metric].label}, mean over each method's runs"]
    return _table(results, columns, best, notes, means.add_suffix(f"_{metric}", axis="columns").reset_index())


def _table(
    results: Results,
    columns: Iterable[tuple[str, Iterable[Any]]],
    best: Set[tuple[int, int]],
    notes: Sequence[str],
    numbers: pd.DataFrame,
) -> Table:
    """Builds a table, with notes on methods without scores and on missing and failed cells."""
    titles, texts = zip(*columns, strict=True)
    unscored = [name for name in results.methods if name not in results.scored_methods]
    notes = [*notes, f"no finished run: {', '.join(unscored)}"] if unscored else [*notes]
    omitted = results.cells.loc[results.cells["status"] != "done", _OMITTED].astype(object)
    if missing := Counter(omitted.loc[omitted["status"] == "missing", "method"]):
        notes.append(f"missing runs: {', '.join(f'{count} of {method}' for method, count in missing.items())}")
    for cell in omitted.where(omitted.notna(), None).loc[omitted["status"] == "failed"].to_dict("records"):
        where = [f"{name.replace('_', ' ')} {cell[name]}" for name in _OMITTED[1:4] if cell[name] is not None]
        reason = f" ({' '.join(cell['error'].split()):.100})" if cell["error"] else ""
        notes.append(f"failed: {', '.join([cell['method'], *where])}{reason}")
    rows = pd.DataFrame(zip(*texts, strict=True), columns=titles, dtype=object)
    return Table(rows, best, [*map(one_line, notes)], pd.concat([numbers.astype(object), omitted]))


def _highest(values: Any) -> list[int]:
    """Returns the indices of the highest value: several if values are equal up to rounding."""
    known = {i: value for i, value in enumerate(values) if not pd.isna(value)}
    return [i for i, value in known.items() if value >= max(known.values()) - 1e-9]


def _difference_notes(results: Results, summary: pd.DataFrame, score: str, metric: str) -> list[str]:
    reference = results.reference
    if reference not in results.scored_methods:
        return [f"vs {reference}: no differences, because {reference} has no scores"]
    notes = [f"vs {reference}: paired difference in {score} and its 95 % bootstrap interval over runs and instances"]
    if any(level is True for level in summary["level"].tolist()):
        notes.append(f"≈: equivalent, the 90 % interval lies within ±{METRICS[metric].margin:g}")
    paired = summary.loc[summary["difference_runs"].notna()].to_dict("records")
    notes += [
        f"{row['method']} vs {reference}: over the {row['difference_runs']} of its {row['runs']} runs that both have"
        for row in paired
        if row["difference_runs"] < row["runs"]
    ]
    if any(row["difference_runs"] == 1 for row in paired):
        notes.append("an interval over one run covers instances only, not other seeds")
    return notes


def _lines(table: Table, escape: Callable[[str], str] = str, bold: Callable[[str], str] = str) -> list[list[str]]:
    lines = [[escape(one_line(text)) for text in row] for row in (table.texts.columns, *table.texts.to_numpy())]
    for row, column in table.best:
        lines[row + 1][column] = bold(lines[row + 1][column])
    return lines


def _text(table: Table) -> str:
    header, *rows = _lines(table)
    return "\n".join([text_table(header, rows), "", *table.notes])


def _markdown(table: Table) -> str:
    def escape(value: str) -> str:
        return _MARKDOWN_SPECIAL.sub(r"\\\1", value)

    header, *rows = _lines(table, escape, lambda value: f"**{value}**")
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---", *("---:" for _ in header[1:])], *rows)]
    return "\n".join([*lines, "", *(f"- {escape(note)}" for note in table.notes)])


def _latex(table: Table) -> str:
    lines = _lines(table, lambda value: value.translate(str.maketrans(_LATEX)), lambda value: rf"\textbf{{{value}}}")
    header, *rows = [" & ".join(line) + r" \\" for line in lines]
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


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Set[int] | None = None) -> str:
    """Returns a table with aligned columns; those in ``right`` (default: all but the first) are right-aligned."""
    columns = []
    for i, cells in enumerate(zip(header, *rows, strict=True)):
        texts = [*map(one_line, cells)]
        width = max(map(len, texts))
        align = str.rjust if (i in right if right is not None else i) else str.ljust
        columns.append([align(text, width) for text in (texts[0], "─" * width, *texts[1:])])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def exported_rank(exported: Any) -> str:
    """Describes the rank and the approximation error of a :class:`badit.export.Export`."""
    if not exported.errors:
        return f"{exported.rank}, equal to the fixed mixture"
    worst = max(exported.errors, key=exported.errors.__getitem__)
    return (
        f"{exported.rank} of {exported.exact_rank}: relative error {exported.total_error:.2g} overall (Frobenius norm)"
        f", at most {exported.errors[worst]:.2g} per module ({worst})"
    )


def cost_table(scores: dict[str, Any]) -> str:
    """Returns a table of Rouge-L per task, of a run with routing and of its export with fixed gates."""
    entries = scores["tasks"] | ({"mean over tasks": scores["mean"]} if len(scores["tasks"]) > 1 else {})
    forms = {"routed": ".1f", "frozen": ".1f", "difference": "+.1f"}
    rows = [[name, *(f"{entry[key]:{form}}" for key, form in forms.items())] for name, entry in entries.items()]
    return text_table(["task", "Rouge-L routed", "frozen", "difference"], rows)


def score_table(scores: pd.DataFrame) -> str:
    """Returns :func:`badit.results.scores_frame` as text: tasks and their mean in rows, metrics in columns."""
    columns = {}
    for key, rows in scores.groupby("metric", sort=False):
        values = dict(zip(rows["task"], rows["score"], strict=True))
        values["mean over tasks"] = fmean(values.values())
        metric = METRICS[str(key)]
        columns[metric.label] = {task: number(x, f".{metric.decimals}f") for task, x in values.items()}
    table = pd.DataFrame(columns)
    return text_table(["task", *table], [[str(task), *texts] for task, *texts in table.itertuples()])
