"""The results of a comparison: reads results.json into data frames and summarises them by method.

Failed and missing cells, and those of learning rates that were not chosen, are in the frame of cells only.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AliasPath, Field

from badit.metrics.answers import METRICS
from badit.metrics.statistics import DECIMALS, FORMS, Difference, Form, paired_bootstrap
from badit.runs.scores import LARGEST, Checked, InstanceScores, Scores, Transfer
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import read_json, refuse_links, refuse_other_format

FORMAT = 1  # version of the file format, increased by every change that older releases would read incorrectly
RESULTS = "results.json"  # in the folder of a comparison
SINGLE_TASK = ", one model per task"  # suffix of a method's name for its single-task runs


def _amount(name: str) -> Any:
    """Returns a field that is read from ``environment.training`` of a cell."""
    return Field(
        None, ge=0, le=LARGEST, validation_alias=AliasPath("environment", "training", name)
    )


class _Cell(Checked):
    method: str
    seed: Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | None
    order: str | None = None
    learning_rate: float | None = None
    status: Literal["done", "failed", "missing"]
    error: str | None = None
    selected: bool = True
    environment: dict[str, Any] | None = None
    trainable_parameters: int | None = _amount("trainable_parameters")
    seconds: float | None = _amount("seconds")
    peak_memory_gib: float | None = _amount("peak_memory_gib")
    scores: Scores | None = None
    instances: dict[str, InstanceScores] | None = None  # pyright: ignore[reportInvalidTypeForm]
    continual: dict[Form, Transfer] | None = None


class _File(Checked):
    protocol: Literal["mixed", "sequential"]
    reference: str
    methods: Annotated[list[str], Field(min_length=1)]
    cells: list[_Cell]


_RUN = ["method", "seed", "order"]
_CELL = [
    *_RUN,
    "learning_rate",
    "status",
    "error",
    "selected",
    "trainable_parameters",
    "seconds",
    "peak_memory_gib",
]


@dataclass(frozen=True, eq=False)
class Results:
    """The results of a comparison as data frames. Unknown values are missing (``isna``).

    Attributes:
        protocol: ``mixed``, or ``sequential`` if the tasks are trained one after another.
        reference: the baseline method of the differences.
        methods: all methods, in the order of the table.
        cells: one row per cell: method, seed, order (of the tasks), learning_rate, status (done, failed or missing),
            error, selected (True if its learning rate was chosen), trainable_parameters, seconds and peak_memory_gib.
        scores: the scores of the final models, for cells that are done and selected: method, seed, order, task,
            metric, score (0 to 100; NLL in nats), n (number of instances).
        instances: as ``scores``, per instance, for cells that store them: method, seed, order, task, metric, instance
            (its index within the task), score.
        continual: for the same cells of a sequential comparison: method, seed, order, form, forgetting,
            backward_transfer, forward_transfer, see :func:`badit.metrics.statistics.continual_scores`.
    """

    protocol: str
    reference: str
    methods: list[str]
    cells: pd.DataFrame
    scores: pd.DataFrame
    instances: pd.DataFrame
    continual: pd.DataFrame

    def __repr__(self) -> str:
        done = self.cells["status"].tolist().count("done")
        return f"Results({self.protocol}: {', '.join(self.methods)}; {done} of {len(self.cells)} cells are done)"

    def _repr_html_(self) -> str:
        """The summary as HTML for notebooks, without columns that have no values."""
        table = summarise(self).dropna(axis="columns", how="all").round(3)
        return f"<p>{escape(repr(self))}</p>{table.to_html(index=False)}"

    @property
    def scored_methods(self) -> list[str]:
        """The methods that have scores, in the order of the table."""
        return [method for method in self.methods if method in self.scores["method"].array]


def load_results(path: str | os.PathLike[str]) -> Results:
    """Reads a results file, or the results.json in the folder of a comparison.

    BaditError if the file is missing or damaged, a field has an invalid value, or cells are inconsistent.
    """
    path = Path(path)
    if path.is_dir():
        refuse_links(path)
        path = path / RESULTS
        if not path.is_file():
            raise BaditError(
                f"{path.parent}: has no {RESULTS}, so it is not a comparison; run: badit compare RECIPE"
            )
    content = read_json(path)
    refuse_other_format(content, path, FORMAT)
    with explained(path):
        file = _File.model_validate(content)
    refuse_unknown(f"{path}: reference", file.reference, file.methods)
    scores, instances, continual = [], [], []
    runs, sizes = set[tuple[str, int | None, str | None]](), dict[str, int]()
    for number, cell in enumerate(file.cells):
        place, run = f"{path}: cells.{number}", (cell.method, cell.seed, cell.order)
        refuse_unknown(f"{place}.method", cell.method, file.methods)
        if cell.status != "done" or not cell.selected:
            continue
        if run in runs:
            raise BaditError(
                f"{place}: has the method, seed and order of another cell; select only one of them"
            )
        runs.add(run)
        tasks = cell.scores.tasks if cell.scores else {}
        own = {task: entry.instances for task, entry in tasks.items()}
        sizes = sizes or own
        if not own or own != sizes:
            raise BaditError(
                f"{place}.scores.tasks: must have the tasks and numbers of instances of the other cells"
            )
        for task, entry in tasks.items():
            known = entry.model_dump(exclude={"instances"}, exclude_none=True)
            scores += [(*run, task, metric, score, own[task]) for metric, score in known.items()]
        by_task = {
            task: entry.model_dump(exclude_none=True)
            for task, entry in (cell.instances or {}).items()
        }
        for metric in METRICS:
            kept = {task: len(lists[metric]) for task, lists in by_task.items() if metric in lists}
            if kept and kept != own:
                raise BaditError(
                    f"{place}.instances: needs one {metric} score for each instance of scores.tasks"
                )
        for task, lists in by_task.items():
            for metric, values in lists.items():
                instances += [
                    (*run, task, metric, index, score) for index, score in enumerate(values)
                ]
        continual += [
            (*run, form, *dict(transfer).values())
            for form, transfer in (cell.continual or {}).items()
        ]
    return Results(
        protocol=file.protocol,
        reference=file.reference,
        methods=list(dict.fromkeys(file.methods)),
        cells=_frame(map(dict, file.cells), _CELL).astype(
            {"error": object, "trainable_parameters": "Int64"}
        ),
        scores=_frame(scores, [*_RUN, "task", "metric", "score", "n"]),
        instances=_frame(instances, [*_RUN, "task", "metric", "instance", "score"]),
        continual=_frame(continual, [*_RUN, "form", *Transfer.model_fields]),
    )


def summarise(results: Results, metric: str = "rouge_l", form: Form = "standard") -> pd.DataFrame:
    """Returns a summary with one row per method, in the order of the table.

    Args:
        results: the results of a comparison.
        metric: the metric of ranks and differences.
        form: the definition of forgetting and transfer, see :func:`badit.metrics.statistics.continual_scores`.

    Returns:
        ``method``; ``runs`` (seeds, or seeds x task orders); ``learning_rate`` (text); ``trainable_parameters``;
        ``NAME_mean`` and ``NAME_std`` (over runs, divisor n - 1, missing for a single run), where NAME is a metric
        (averaged over tasks), ``forgetting``, ``backward_transfer`` or ``forward_transfer``; ``difference_NAME`` to the
        reference, where NAME is a field of :class:`badit.metrics.statistics.Difference`; ``level``, True if the method is
        equivalent to the reference within the metric's margin; ``rank`` by mean score; ``task_rank``, the mean of the
        ranks on the single tasks; ``seconds``, the median; ``peak_memory_gib``, the maximum.
    """
    refuse_unknown("form", form, FORMS)
    by_task = task_means(results, metric)
    ascending = METRICS[metric].lower_is_better
    rank = by_task.apply(fmean).astype(float).round(DECIMALS).rank(ascending=ascending)
    task_rank = by_task.round(DECIMALS).rank(axis="columns", ascending=ascending).mean()
    by_run = (
        results.scores.groupby([*_RUN, "metric"], sort=False, dropna=False)["score"]
        .agg(fmean)
        .reset_index()
    )
    transfers = results.continual.loc[results.continual["form"] == form]
    rows = []
    done = results.cells.loc[(results.cells["status"] == "done") & results.cells["selected"]]
    for method in results.methods:
        cells = done.loc[done["method"] == method]
        rates = dict.fromkeys(map(str, cells["learning_rate"].dropna()))
        row: dict[str, Any] = {
            "method": method,
            "runs": len(cells),
            "learning_rate": " / ".join(rates) or None,
        }
        row["trainable_parameters"] = cells["trainable_parameters"].max()
        of_method = by_run.loc[by_run["method"] == method]
        values = {name: of_method.loc[of_method["metric"] == name, "score"] for name in METRICS}
        values |= {
            name: transfers.loc[transfers["method"] == method, name]
            for name in Transfer.model_fields
        }
        for name, scores in values.items():
            known = scores.dropna().tolist()
            row[f"{name}_mean"] = fmean(known) if known else None
            row[f"{name}_std"] = stdev(known) if len(known) > 1 else None
        pairs = {} if method == results.reference else paired_differences(results, method, metric)
        mine: dict[str, Any] = (
            paired_bootstrap(pairs)._asdict() if pairs else dict.fromkeys(Difference._fields)
        )
        row |= {f"difference_{name}": value for name, value in mine.items()}
        row["level"] = (
            max(abs(mine["inner_low"]), abs(mine["inner_high"])) < METRICS[metric].margin
            if pairs
            else None
        )
        row |= {"rank": rank.get(method), "task_rank": task_rank.get(method)}
        row |= {
            "seconds": cells["seconds"].median(),
            "peak_memory_gib": cells["peak_memory_gib"].max(),
        }
        rows.append(row)
    types: dict[str, Any] = {"method": object, "learning_rate": object, "runs": int}
    types |= {"trainable_parameters": "Int64", "difference_runs": "Int64", "level": "boolean"}
    return pd.DataFrame(rows).astype({name: types.get(name, float) for name in rows[0]})


def task_means(results: Results, metric: str = "rouge_l") -> pd.DataFrame:
    """Returns the mean scores over runs, with one row per task and one column per method that has scores."""
    scores = results.scores.loc[results.scores["metric"] == metric]
    if results.scored_methods and scores.empty:
        raise BaditError(f"metric: the results have no scores in {metric}; choose another metric")
    means = scores.pivot_table("score", "task", "method", fmean, sort=False)
    return means.reindex(columns=results.scored_methods)


def paired(frame: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """Joins the ``scores`` or ``instances`` of two methods, with runs paired by seed and order.

    A run without a seed (or order) is paired with the runs of every seed (or order) of the other method. The other
    method's columns are named ``seed_other``, ``order_other`` and ``score_other``.
    """
    shared = [column for column in ("task", "metric", "instance", "n") if column in frame]
    ours, theirs = (frame.loc[frame["method"] == name] for name in (method, other))
    pairs = ours.merge(theirs.drop(columns="method"), on=shared, suffixes=("", "_other"))
    for column in ("seed", "order"):
        one, two = pairs[column], pairs[f"{column}_other"]
        pairs = pairs.loc[((one == two) | one.isna() | two.isna()).astype(bool)]
    return pairs


def paired_differences(results: Results, method: str, metric: str) -> dict[str, np.ndarray]:
    """Returns the paired differences (S runs, N instances) of a method to the reference, per task; {} without pairs."""
    pairs = paired(
        results.instances.loc[results.instances["metric"] == metric], method, results.reference
    )
    runs = pairs.groupby(
        ["seed", "order", "seed_other", "order_other"], sort=False, dropna=False
    ).ngroup()
    pairs = pairs.assign(run=runs, difference=pairs["score"] - pairs["score_other"])
    return {
        str(task): rows.pivot(index="run", columns="instance", values="difference").to_numpy()
        for task, rows in pairs.groupby("task")
    }


def _frame(rows: Iterable[Any], columns: list[str]) -> pd.DataFrame:
    numbers = dict.fromkeys(
        {"score", "learning_rate", "seconds", "peak_memory_gib", *Transfer.model_fields}, float
    )
    types = {"method": object, "seed": "Int64", "order": object, **numbers}
    return pd.DataFrame(rows, columns=columns).astype(
        {name: types[name] for name in columns if name in types}
    )
