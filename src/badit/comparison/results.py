"""The results of a comparison: results.json as data frames, and their summary by method.

Failed and missing cells, and those of learning rates that were not chosen, are in the frame of
cells only.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AliasPath, Field

from badit.metrics.answers import METRICS
from badit.metrics.statistics import DECIMALS, FORMS, Difference, Form, paired_bootstrap
from badit.presets import method_name, saved_section
from badit.runs.folder import RESULTS
from badit.runs.scores import LARGEST, Checked, InstanceScores, Scores, Transfer
from badit.support.console import one_line, waiting
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import read_json, refuse_links, refuse_other_format, write_text

FORMAT = 1  # version of the file format, increased by every change that older releases misread
SINGLE_TASK = ", one model per task"  # suffix of a method's name for its single-task runs

_RUN = ["method", "seed", "order"]
_COSTS = ["trainable_parameters", "seconds", "peak_memory_gib"]
_CELL = [*_RUN, "learning_rate", "status", "error", "selected", *_COSTS]


def _cost(name: str) -> Any:
    """Returns a field that is read from ``environment.training`` of a cell."""
    path = AliasPath("environment", "training", name)
    return Field(None, ge=0, le=LARGEST, validation_alias=path)


class _Cell(Checked):
    method: str
    seed: Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | None
    order: str | None = None
    learning_rate: float | None = None
    status: Literal["done", "failed", "missing"]
    error: str | None = None
    selected: bool = True
    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    trainable_parameters: int | None = _cost("trainable_parameters")
    seconds: float | None = _cost("seconds")
    peak_memory_gib: float | None = _cost("peak_memory_gib")
    scores: Scores | None = None
    instances: dict[str, InstanceScores] | None = None
    continual: dict[Form, Transfer] | None = None


class _File(Checked):
    protocol: Literal["mixed", "sequential"]
    reference: str
    methods: Annotated[list[str], Field(min_length=1)]
    cells: list[_Cell]


@dataclass(frozen=True, eq=False)
class Results:
    """The results of a comparison as data frames. Unknown values are missing (``isna``).

    Attributes:
        protocol: ``mixed``, or ``sequential`` if the tasks are trained one after another.
        reference: the baseline method of the differences.
        methods: all methods, in the order of the table. The recipe of the comparison names them.
        titles: what each method is, from its saved options, for methods whose options are saved;
            see :func:`badit.presets.method_name`.
        cells: one row per cell: method, seed, order (of the tasks), learning_rate, status (done,
            failed or missing), error, selected (True if its learning rate was chosen),
            trainable_parameters, seconds and peak_memory_gib.
        scores: the scores of the final models, for cells that are done and selected: method, seed,
            order, task, metric, score (0 to 100; NLL in nats), n (number of instances).
        instances: as ``scores``, per instance, for cells that store them: method, seed, order,
            task, metric, instance (its index within the task), score.
        continual: for the same cells of a sequential comparison: method, seed, order, form,
            forgetting, backward_transfer, forward_transfer, see
            :func:`badit.metrics.statistics.continual_scores`.
    """

    protocol: str
    reference: str
    methods: list[str]
    titles: dict[str, str]
    cells: pd.DataFrame
    scores: pd.DataFrame
    instances: pd.DataFrame
    continual: pd.DataFrame

    def __repr__(self) -> str:
        finished = (self.cells["status"] == "done").sum()
        cells = f"{finished} of {len(self.cells)} cells are done"
        return f"Results({self.protocol}: {', '.join(self.methods)}; {cells})"

    def _repr_html_(self) -> str:
        """The summary as HTML for notebooks, without columns that have no values."""
        table = summarise(self).dropna(axis="columns", how="all").round(3)
        return f"<p>{escape(repr(self))}</p>{table.to_html(index=False)}"

    @property
    def metric(self) -> str:
        """The main score: that of preferences, if the data has them, or Rouge-L."""
        return "preference" if "preference" in set(self.scores["metric"]) else "rouge_l"

    @property
    def scored_methods(self) -> list[str]:
        """The methods that have scores, in the order of the table."""
        return [method for method in self.methods if method in self.scores["method"].array]


def load_results(path: str | os.PathLike[str]) -> Results:
    """Reads a results file, or the results.json in the folder of a comparison.

    BaditError if the file is missing or damaged, a field has an invalid value, or cells are
    inconsistent.
    """
    file = Path(path)
    if file.is_dir():
        refuse_links(file)
        file = file / RESULTS
        if not file.is_file():
            problem = f"has no {RESULTS}, so it is not a comparison"
            raise BaditError(f"{file.parent}: {problem}; run: badit compare RECIPE")

    _, contents = _read(file)
    # The schema checks each field; these are checks between fields.
    refuse_unknown(f"{file}: reference", contents.reference, contents.methods)

    # One row per score, so that every statistic is a group of rows.
    final = _final_cells(file, contents)
    scores = [
        (*run, task, metric, score, means.instances)
        for run, cell in final.items()
        for task, means in cell.scores.tasks.items()
        for metric, score in means
        if metric in METRICS and score is not None
    ]
    instances = [
        (*run, task, metric, index, score)
        for run, cell in final.items()
        for task, of_task in (cell.instances or {}).items()
        for metric, scores_of_task in of_task
        for index, score in enumerate(scores_of_task or ())
    ]
    continual = [
        (*run, form, *dict(transfer).values())
        for run, cell in final.items()
        for form, transfer in (cell.continual or {}).items()
    ]
    return Results(
        protocol=contents.protocol,
        reference=contents.reference,
        methods=list(dict.fromkeys(contents.methods)),
        titles=_titles(contents),
        cells=_frame(map(dict, contents.cells), _CELL),
        scores=_frame(scores, [*_RUN, "task", "metric", "score", "n"]),
        instances=_frame(instances, [*_RUN, "task", "metric", "instance", "score"]),
        continual=_frame(continual, [*_RUN, "form", *Transfer.model_fields]),
    )


def _read(file: Path) -> tuple[dict[str, Any], _File]:
    """Returns the content of a results file, as it is and in its schema."""
    content = read_json(file)
    refuse_other_format(content, file, FORMAT)
    with explained(file):
        return content, _File.model_validate(content)


def _titles(contents: _File) -> dict[str, str]:
    """Returns the name of each method's options; several names if its cells differ in them."""
    titles: dict[str, dict[str, None]] = {}
    for cell in contents.cells:
        section = (cell.config or {}).get("method")
        if isinstance(section, Mapping):
            title = one_line(method_name(saved_section(section)))
            titles.setdefault(cell.method, {})[title] = None
    return {method: " / ".join(names) for method, names in titles.items()}


def _final_cells(file: Path, contents: _File) -> dict[tuple[Any, ...], Any]:
    """Returns the finished cells with a chosen learning rate, by run; BaditError if they differ."""
    final = {}
    expected_sizes = {}
    for number, cell in enumerate(contents.cells):
        place = f"{file}: cells.{number}"
        refuse_unknown(f"{place}.method", cell.method, contents.methods)
        if cell.status != "done" or not cell.selected:
            continue
        run = (cell.method, cell.seed, cell.order)
        # Pairs of runs are found by method, seed and order.
        if run in final:
            problem = "has the method, seed and order of another cell; select only one of them"
            raise BaditError(f"{place}: {problem}")
        final[run] = cell

        sizes = {}
        if cell.scores is not None:
            sizes = {task: means.instances for task, means in cell.scores.tasks.items()}
        # Means over tasks and paired differences need the same instances in every run.
        expected_sizes = expected_sizes or sizes
        if not sizes or sizes != expected_sizes:
            problem = "must have the tasks and numbers of instances of the other cells"
            raise BaditError(f"{place}.scores.tasks: {problem}")

        for metric in METRICS:
            lengths = {}
            for task, scores in (cell.instances or {}).items():
                lengths[task] = len(getattr(scores, metric) or ())
            # Stored results may have no scores of instances, or none in this metric.
            if any(lengths.values()) and lengths != sizes:
                problem = f"needs one {metric} score for each instance of scores.tasks"
                raise BaditError(f"{place}.instances: {problem}")
    return final


def _frame(rows: Any, columns: list[str]) -> pd.DataFrame:
    numbers = {"score", "learning_rate", "seconds", "peak_memory_gib", *Transfer.model_fields}
    types: dict[str, Any] = dict.fromkeys(numbers, float)
    types |= {"seed": "Int64", "trainable_parameters": "Int64"}
    types |= dict.fromkeys(["method", "order", "error"], object)
    # Declared types, because those of empty columns and of missing integers would be guessed.
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({name: types[name] for name in columns if name in types})


def write_results(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a results file with one line per cell, so that a difference names its cell."""
    as_json = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    fields = []
    for key, value in content.items():
        text = as_json(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(as_json, value)) + "\n]"
        fields.append(f"{as_json(key)}: {text}")
    write_text(file, "{\n" + ",\n".join(fields) + "\n}\n")


def finished_cells(folder: Path) -> list[dict[str, Any]]:
    """Returns the finished cells in a comparison's results.json, as in the file; [] without a file.

    A comparison continues from them where the folders of its runs are gone.
    """
    file = folder / RESULTS
    if not file.is_file():
        return []
    content, _ = _read(file)
    return [cell for cell in content["cells"] if cell["status"] == "done"]


def summarise(results: Results, metric: str | None = None, form: Form = "standard") -> pd.DataFrame:
    """Returns a summary with one row per method, in the order of the table.

    Args:
        results: the results of a comparison.
        metric: the metric of ranks and differences (default: ``results.metric``).
        form: the definition of forgetting and transfer, see
            :func:`badit.metrics.statistics.continual_scores`.

    Returns:
        ``method``; ``runs`` (seeds, or seeds x task orders); ``learning_rate`` (text);
        ``trainable_parameters``; ``NAME_mean`` and ``NAME_std`` (over runs, divisor n - 1, missing
        for a single run), where NAME is a metric (averaged over tasks), ``forgetting``,
        ``backward_transfer`` or ``forward_transfer``; ``difference_NAME`` to the reference, where
        NAME is a field of :class:`badit.metrics.statistics.Difference`; ``level``, True if the
        method is equivalent to the reference within the metric's margin; ``rank`` by mean score;
        ``task_rank``, the mean of the ranks on the single tasks; ``seconds``, the median;
        ``peak_memory_gib``, the maximum.
    """
    refuse_unknown("form", form, FORMS)
    metric = metric or results.metric
    cells = results.cells.query("status == 'done' and selected").groupby("method")
    means = task_means(results, metric)
    ascending = METRICS[metric].lower_is_better
    of_reference = differences(results, metric)
    # Equal scores that differ by rounding errors share a rank.
    task_ranks = means.round(DECIMALS).rank(axis="columns", ascending=ascending)
    columns = {
        "runs": cells.size(),
        "learning_rate": cells["learning_rate"].agg(_listed),
        "trainable_parameters": cells["trainable_parameters"].max(),
        **_spreads(results, form),
        **of_reference.drop(columns="level").add_prefix("difference_"),
        "level": of_reference["level"],
        "rank": means.mean().round(DECIMALS).rank(ascending=ascending),
        "task_rank": task_ranks.mean(),
        "seconds": cells["seconds"].median(),
        "peak_memory_gib": cells["peak_memory_gib"].max(),
    }
    # The index adds the methods without a finished run.
    summary = pd.DataFrame(columns, index=pd.Index(results.methods, name="method", dtype=object))
    # Nullable types: a method may have no finished run, or no pair of runs with the reference.
    types: dict[str, Any] = dict.fromkeys(columns, float)
    types |= {"learning_rate": object, "level": "boolean"}
    types |= dict.fromkeys(["trainable_parameters", "difference_runs"], "Int64")
    summary = summary.astype(types)
    summary["runs"] = summary["runs"].fillna(0).astype(int)
    return summary.reset_index()


def _listed(learning_rates: pd.Series) -> str | None:
    return " / ".join(dict.fromkeys(map(str, learning_rates.dropna()))) or None


def _spreads(results: Results, form: Form) -> dict[str, pd.Series]:
    """Returns the mean and the standard deviation over runs of each metric, by method."""
    # A missing seed or order is a run too. fmean sums exactly, so the order of rows has no effect.
    groups = results.scores.groupby([*_RUN, "metric"], sort=False, dropna=False)
    by_run = groups["score"].agg(fmean).reset_index().set_index("method")
    transfers = results.continual.query("form == @form").set_index("method")
    columns = {}
    for name in (*METRICS, *Transfer.model_fields):
        if name in METRICS:
            values = by_run.query("metric == @name")["score"]
        else:
            values = transfers[name].dropna()
        by_method = values.groupby("method")
        columns[f"{name}_mean"] = by_method.agg(fmean)
        columns[f"{name}_std"] = by_method.agg(_deviation)
    return columns


def _deviation(values: pd.Series) -> float | None:
    if len(values) > 1:
        return stdev(values)
    return None


@lru_cache(maxsize=4)  # the bootstrap of many methods takes seconds
def differences(results: Results, metric: str) -> pd.DataFrame:
    """Returns each method's paired difference to the reference, without methods that have none.

    The columns are those of :class:`badit.metrics.statistics.Difference` and ``level``, whether
    the two are equivalent within the metric's margin.
    """
    rows = {}
    are_extreme = {}
    for method in waiting(results.methods, f"Differences in {METRICS[metric].label}", "method"):
        if method == results.reference:
            continue
        # Results without scores of instances have no differences.
        if pairs := paired_differences(results, method, metric):
            rows[method] = paired_bootstrap(pairs)
            are_extreme[method] = _are_extreme(results, method, metric)
    frame = pd.DataFrame(rows.values(), index=list(rows), columns=Difference._fields)
    # Two one-sided tests at 5 %.
    margin = METRICS[metric].margin
    is_within = (frame["inner_low"] > -margin) & (frame["inner_high"] < margin)
    return frame.assign(level=is_within & ~pd.Series(are_extreme, frame.index, dtype=bool))


def _are_extreme(results: Results, method: str, metric: str) -> bool:
    """Returns whether every score of a method and of the reference is 0, or every one the maximum.

    Such scores are equal because the metric cannot distinguish the methods.
    """
    of_metric = results.instances.query("metric == @metric")
    scores = of_metric.loc[of_metric["method"].isin([method, results.reference]), "score"]
    extremes = [0.0] if METRICS[metric].lower_is_better else [0.0, METRICS[metric].maximum]
    return any((scores == extreme).all() for extreme in extremes)


def task_means(results: Results, metric: str = "rouge_l") -> pd.DataFrame:
    """Returns the mean scores over runs: a row per task, a column per method that has scores."""
    scores = results.scores.query("metric == @metric")
    if results.scored_methods and scores.empty:
        raise BaditError(f"metric: the results have no scores in {metric}; choose another metric")
    means = scores.pivot_table("score", "task", "method", fmean, sort=False)
    return means.reindex(columns=results.scored_methods)


def paired(frame: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """Joins the ``scores`` or ``instances`` of two methods, with runs paired by seed and order.

    A run without a seed (or order) is paired with the runs of every seed (or order) of the other
    method. The other method's columns are named ``seed_other``, ``order_other``, ``score_other``.
    """
    # Frames of scores have no column for instances.
    shared = [column for column in ("task", "metric", "instance", "n") if column in frame]
    of_method = frame.query("method == @method")
    of_other = frame.query("method == @other").drop(columns="method")
    pairs = of_method.merge(of_other, on=shared, suffixes=("", "_other"))
    for column in ("seed", "order"):
        ours = pairs[column]
        theirs = pairs[f"{column}_other"]
        is_pair = (ours == theirs) | ours.isna() | theirs.isna()
        pairs = pairs.loc[is_pair.astype(bool)]
    return pairs


def paired_differences(results: Results, method: str, metric: str) -> dict[str, np.ndarray]:
    """Returns the differences (S runs, N instances) to the reference, per task; {} if no pairs."""
    of_metric = results.instances.query("metric == @metric")
    pairs = paired(of_metric, method, results.reference)
    runs = ["seed", "order", "seed_other", "order_other"]
    # A run can be paired with several runs of the reference, each a run of its own here.
    pairs["run"] = pairs.groupby(runs, sort=False, dropna=False).ngroup()
    pairs["difference"] = pairs["score"] - pairs["score_other"]
    differences = {}
    for task, of_task in pairs.groupby("task"):
        table_SN = of_task.pivot(index="run", columns="instance", values="difference")
        differences[str(task)] = table_SN.to_numpy()
    return differences
