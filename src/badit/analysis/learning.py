"""What tasks lose or gain by being learnt together, and what they keep while others are learnt after them."""

from __future__ import annotations

import os
from statistics import fmean

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from badit.analysis.tables import TidyTable, Value
from badit.errors import BaditError, first_problem
from badit.evaluation.results import SINGLE_TASK, Results, Scores, load_results
from badit.files import read_json
from badit.runs import RunFolder


class _Sequence(BaseModel):
    """What a sequence's scores have besides those of its last state."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    order: list[str]
    matrix: list[list[float | None]]

    @model_validator(mode="after")
    def _square(self) -> _Sequence:
        if {len(self.matrix), *map(len, self.matrix)} != {len(self.order)}:
            raise ValueError("matrix must have a row and a column for every task of order")
        return self


def task_gap(path: str | os.PathLike[str]) -> TidyTable:
    """Every method's score on every task, trained on that task alone and on all of them.

    Args:
        path: a comparison's folder or its results.json.

    Raises:
        BaditError: it is missing or damaged.
    """
    results = load_results(path)
    rows: list[list[Value]] = []
    for method in results.methods:
        pairs = _pairs(results, method)
        for task in pairs[0][0].tasks if pairs else ():
            alone = fmean(single.tasks[task].rouge_l for single, _ in pairs)
            together = fmean(multi.tasks[task].rouge_l for _, multi in pairs)
            rows.append([method, task, alone, together, alone - together])
    how = "all tasks mixed" if results.protocol == "mixed" else "all tasks one after another, scored after the last"
    return TidyTable(
        name="task_gap",
        about=(
            f"What a model for one task has ahead of a model for all of them: Rouge-L of each method trained on every "
            f"task alone (single) and on {how} (multi), means over the seeds that have both."
        ),
        columns={
            "method": "the method's name in the comparison",
            "task": "the task's name",
            "single": "Rouge-L of the model trained on this task alone, 0 to 100",
            "multi": "Rouge-L of the model trained on all tasks, 0 to 100",
            "gap": "single minus multi, in points: above 0, the task lost by being trained with the others",
        },
        rows=rows,
    )


def transfer(run: RunFolder) -> TidyTable:
    """The score matrix of a sequential run.

    Raises:
        BaditError: the run is no sequence of tasks, or it has not been scored.
    """
    try:
        scores = _Sequence.model_validate(read_json(run.scores))
    except ValidationError as error:
        location, message = first_problem(error)
        where = ": ".join([str(run.scores), *map(str, location)])
        raise BaditError(f"{where}: {message}; only a run that learns its tasks in an order has a matrix") from None
    return TidyTable(
        name="transfer",
        about="Rouge-L on every task after each stage of a run that learns its tasks one after another.",
        columns={
            "stage": "how many tasks had been learnt",
            "trained_task": "the task learnt last",
            "task": "the task scored",
            "rouge_l": "its Rouge-L, 0 to 100; null where a task still to come was not scored",
        },
        rows=[
            [stage, trained, task, score]
            for stage, (trained, row) in enumerate(zip(scores.order, scores.matrix, strict=True), start=1)
            for task, score in zip(scores.order, row, strict=True)
        ],
    )


def _pairs(results: Results, method: str) -> list[tuple[Scores, Scores]]:
    """Single-task and multi-task scores of the same seed, for every run of the method that has both."""
    singles, multis = results.scored(method + SINGLE_TASK), results.scored(method)
    return [(single, multi) for one, single in singles for two, multi in multis if one.pairs_with(two)]
