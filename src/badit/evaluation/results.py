"""The results of a comparison: methods x seeds (x task orders), from results.json to one summary a method.

A comparison may be partial. Cells that failed or are still missing, and learning rates that lost the sweep, count for
nothing in the summaries.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from badit.errors import BaditError, first_problem, nearest
from badit.files import read_json, refuse_other_format, shown
from badit.statistics import Difference, Form, Spread, paired_bootstrap, spread

Metric = Literal["rouge_l", "exact_match"]

# The version of a results file's form: a change that older releases would read wrongly raises it.
FORMAT = 1
# The file in a comparison's folder.
RESULTS = "results.json"
# What follows a method's name where it has trained on each task alone.
SINGLE_TASK = ", one model a task"


class _Part(BaseModel):
    # A results file also keeps what the tables do not need, such as every run's recipe and environment.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


# A mean of scores of 100 may be off by rounding.
_ROUNDING = 1e-6
Score = Annotated[float, Field(ge=-_ROUNDING, le=100 + _ROUNDING)]
Points = Annotated[float, Field(ge=-100 - _ROUNDING, le=100 + _ROUNDING)]
# What no run comes near, so that sums and means stay finite.
_MOST = 1e15


class TaskScores(_Part):
    rouge_l: Score
    exact_match: Score
    instances: Annotated[int, Field(ge=1, le=_MOST)]


class Transfer(_Part):
    forgetting: Points
    backward_transfer: Points
    forward_transfer: Points | None = None


class Scores(_Part):
    """A run's scores, from 0 to 100: means over tasks, in which every task counts the same, and each task's own.

    Of a sequence of tasks they are the final model's; `order` then names the tasks, `matrix` has every task's Rouge-L
    (columns) after each of them (rows), None where it was not measured, and `continual` is what follows from that.
    """

    rouge_l: Score
    exact_match: Score
    tasks: Annotated[dict[str, TaskScores], Field(min_length=1)]
    rouge_l_instances: Score | None = Field(None, description="the mean over all instances")
    exact_match_instances: Score | None = Field(None, description="the mean over all instances")
    order: list[str] | None = None
    matrix: list[list[Score | None]] | None = None
    continual: dict[Form, Transfer] | None = None

    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each task: its name, its scores and its number of instances."""
        return [{"task": name, **scores.model_dump()} for name, scores in self.tasks.items()]


class InstanceScores(_Part):
    rouge_l: list[Score]
    exact_match: list[Score]


class Training(_Part):
    trainable_parameters: Annotated[int, Field(ge=0, le=_MOST)] | None = None
    seconds: Annotated[float, Field(ge=0, le=_MOST)] | None = None
    peak_memory_gib: Annotated[float, Field(ge=0, le=_MOST)] | None = None


class Environment(_Part):
    training: Training = Training()


class Cell(_Part):
    """One method with one seed, task order and learning rate. Scores are those of the final model, from 0 to 100.

    `seed` is None for a method that does not train, `order` for one that knows no order of tasks.
    """

    method: str
    seed: int | None
    order: str | None = None
    learning_rate: float | None = None
    status: Literal["done", "failed", "missing"]
    error: str | None = None
    selected: bool = True
    environment: Environment | None = None
    scores: Scores | None = None
    instances: dict[str, InstanceScores] | None = None
    continual: dict[Form, Transfer] | None = None

    @property
    def run(self) -> tuple[int | None, str | None]:
        """What tells the cells of a method apart."""
        return self.seed, self.order

    @property
    def counts(self) -> bool:
        return self.status == "done" and self.selected

    def pairs_with(self, other: Cell) -> bool:
        """Same seed and order; a score that does not depend on them is the same for all of the other method's."""
        return all(one is None or two is None or one == two for one, two in zip(self.run, other.run, strict=True))


class Results(_Part):
    """A results file. Differences are taken to the method `reference`; `methods` gives the order of the table."""

    protocol: Literal["mixed", "sequential"]
    reference: str
    methods: Annotated[list[str], Field(min_length=1)]
    cells: list[Cell]

    def scored(self, method: str) -> list[tuple[Cell, Scores]]:
        """The method's cells that count, one a run, each with its scores."""
        cells = [cell for cell in self.cells if cell.method == method and cell.counts]
        return [(cell, cell.scores) for cell in cells if cell.scores]

    def omitted(self) -> list[Cell]:
        """The cells that failed or have not been run."""
        return [cell for cell in self.cells if cell.status != "done"]


@dataclass(frozen=True)
class MethodSummary:
    """A method over its `runs` (seeds, or seeds x task orders); None stands for what is not known.

    `rouge_l` and `exact_match` are means over tasks; after a sequence of tasks that is the average performance.
    `task_rank` is the mean over tasks of the rank on each. `seconds` is the median, `peak_memory_gib` the maximum.
    """

    method: str
    runs: int
    learning_rate: str | None
    trainable_parameters: int | None
    rouge_l: Spread | None
    exact_match: Spread | None
    forgetting: Spread | None
    backward_transfer: Spread | None
    forward_transfer: Spread | None
    difference: Difference | None
    rank: float | None
    task_rank: float | None
    seconds: float | None
    peak_memory_gib: float | None


def load_results(path: str | os.PathLike[str]) -> Results:
    """Reads a results file, or the results.json of a comparison's folder.

    Raises:
        BaditError: it is missing or damaged, a field has a wrong value, or cells contradict each other.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RESULTS
    content = read_json(path)
    refuse_other_format(content, path, FORMAT)
    try:
        results = Results.model_validate(content)
    except ValidationError as error:
        location, message = first_problem(error)
        raise BaditError(f"{shown(path)}: {'.'.join(map(str, location))}: {message}") from None
    try:
        _check(results)
    except BaditError as error:
        raise BaditError(f"{shown(path)}: {error}") from None
    return results


def read_scores(path: Path) -> dict[str, Any]:
    """What a run's scores.json holds, all of it, with the scores checked.

    Raises:
        BaditError: it is missing or damaged.
    """
    content = read_json(path)
    try:
        Scores.model_validate(content)
    except ValidationError as error:
        location, message = first_problem(error)
        raise BaditError(f"{shown(path)}: {'.'.join(map(str, location))}: {message}; score the run anew") from None
    return content


def load_scores(path: Path) -> Scores:
    """A run's scores.json.

    Raises:
        BaditError: it is missing or damaged.
    """
    return Scores.model_validate(read_scores(path))


def summarise(results: Results, *, metric: Metric = "rouge_l", form: Form = "standard") -> list[MethodSummary]:
    """One summary a method, in the order of the table.

    Args:
        results: a comparison.
        metric: what ranks and differences are taken in.
        form: the definition of forgetting and transfer, see `badit.statistics`.
    """
    scored = [method for method in results.methods if results.scored(method)]
    means = task_means(results, metric)
    columns = {task: [by_method[method] for method in scored] for task, by_method in means.items()}
    rank = dict(zip(scored, ranks([fmean(column) for column in zip(*columns.values(), strict=True)]), strict=True))
    task_rank = dict(zip(scored, mean_ranks(columns), strict=True)) if scored else {}
    return [
        _summary(results, method, metric, form, rank.get(method), task_rank.get(method)) for method in results.methods
    ]


def task_means(results: Results, metric: Metric) -> dict[str, dict[str, float]]:
    """task -> method -> mean score over the method's runs, for the methods that have scores."""
    scores = {method: [each for _, each in results.scored(method)] for method in results.methods}
    scores = {method: runs for method, runs in scores.items() if runs}
    tasks = next(iter(scores.values()))[0].tasks if scores else ()
    return {
        task: {method: fmean(getattr(run.tasks[task], metric) for run in runs) for method, runs in scores.items()}
        for task in tasks
    }


def _summary(
    results: Results, method: str, metric: Metric, form: Form, rank: float | None, task_rank: float | None
) -> MethodSummary:
    cells = [cell for cell, _ in results.scored(method)]
    scores = [each for _, each in results.scored(method)]
    transfers = [cell.continual[form] for cell in cells if cell.continual and form in cell.continual]
    trainings = [cell.environment.training for cell in cells if cell.environment]
    rates = dict.fromkeys(str(cell.learning_rate) for cell in cells if cell.learning_rate is not None)
    return MethodSummary(
        method=method,
        runs=len(cells),
        learning_rate=" / ".join(rates) or None,
        trainable_parameters=max(_known(each.trainable_parameters for each in trainings), default=None),
        rouge_l=_spread(each.rouge_l for each in scores),
        exact_match=_spread(each.exact_match for each in scores),
        forgetting=_spread(each.forgetting for each in transfers),
        backward_transfer=_spread(each.backward_transfer for each in transfers),
        forward_transfer=_spread(each.forward_transfer for each in transfers),
        difference=_difference(results, method, metric),
        rank=rank,
        task_rank=task_rank,
        seconds=median(seconds) if (seconds := _known(each.seconds for each in trainings)) else None,
        peak_memory_gib=max(_known(each.peak_memory_gib for each in trainings), default=None),
    )


def _difference(results: Results, method: str, metric: Metric) -> Difference | None:
    """Over the runs that both methods have; None for the reference itself and where there are none."""
    ours, theirs = (
        [(cell, cell.instances) for cell, _ in results.scored(name) if cell.instances]
        for name in (method, results.reference)
    )
    pairs = [(mine, its) for one, mine in ours for two, its in theirs if one.pairs_with(two)]
    if method == results.reference or not pairs:
        return None
    return paired_bootstrap(
        {
            task: np.array(
                [np.subtract(getattr(mine[task], metric), getattr(its[task], metric)) for mine, its in pairs]
            )
            for task in pairs[0][0]
        }
    )


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = _known(values)
    return spread(known) if known else None


def _check(results: Results) -> None:
    """What the fields must satisfy together.

    Raises:
        BaditError: the first contradiction.
    """
    named = {"reference": results.reference} | {
        f"cells.{i}.method": cell.method for i, cell in enumerate(results.cells)
    }
    for place, name in named.items():
        if name not in results.methods:
            raise BaditError(f"{place}: {name!r:.60} is none of the methods{nearest(name, results.methods)}")
    runs: dict[object, int] = {}
    sizes: dict[str, int] = {}
    for i, cell in enumerate(results.cells):
        if cell.counts:
            first = runs.setdefault((cell.method, cell.run), i)
            if first != i:
                raise BaditError(f"cells.{i}: repeats method, seed and order of cells.{first}; select one of the two")
            sizes = _checked_sizes(cell, f"cells.{i}", sizes)


def _checked_sizes(cell: Cell, place: str, sizes: dict[str, int]) -> dict[str, int]:
    """The number of instances of each task, which must be that of the cells before (`sizes`, empty at first)."""
    if cell.scores is None:
        raise BaditError(f"{place}.scores: is missing, though the cell is done and selected; run the comparison again")
    own = {task: entry.instances for task, entry in cell.scores.tasks.items()}
    if sizes and own != sizes:
        raise BaditError(
            f"{place}.scores.tasks: other tasks or instances than in the cells before; score all on the same"
        )
    if cell.instances is not None:
        for metric in get_args(Metric):
            if {task: len(getattr(each, metric)) for task, each in cell.instances.items()} != own:
                raise BaditError(f"{place}.instances: needs one {metric} for each instance of scores.tasks")
    return own


def ranks(scores: Any) -> list[float]:
    from scipy.stats import rankdata

    return rankdata(-np.round(scores, 9)).tolist()


def mean_ranks(scores_by_task: Any) -> list[float]:
    return np.mean([ranks(scores) for scores in scores_by_task.values()], axis=0).tolist()
