"""Scores of a sequence of tasks, from the matrix of all scores a[i][j]: on task j after training on task i, of T.

    AP          mean_j a[T][j]
    forgetting  mean_{j<T} (max_{j<=i<T} a[i][j] - a[T][j])
    BWT         mean_{j<T} (a[T][j] - a[j][j])
    FWT         mean_j (a[j][j] - s[j]),  s[j] the score of a model trained on task j alone

AP and BWT are from Lopez-Paz & Ranzato (2017, arXiv:1706.08840), forgetting from Chaudhry et al. (2018,
arXiv:1801.10112). Code that was released with recent papers, SAPT's among them, computes two of them otherwise, and the
numbers in those papers are in that form:

    forgetting  the maximum runs over all i < T, so that it takes in scores from before task j was trained
    BWT         the same sum divided by T
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple, get_args

from badit.errors import BaditError, nearest

Form = Literal["standard", "released"]
FORMS: tuple[Form, ...] = get_args(Form)


class ContinualScores(NamedTuple):
    """The four scores, in the units of the score matrix. `forward_transfer` is None without single-task scores."""

    average_performance: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float | None


def continual_scores(
    scores: Sequence[Sequence[float]], single_task: Sequence[float] | None = None, *, form: Form = "standard"
) -> ContinualScores:
    """Average performance, forgetting, backward and forward transfer of a sequence of T tasks.

    Args:
        scores: T x T; row i holds every task's score after training on task i, both in the order of training. Entries
            above the diagonal (tasks still to come) may be NaN: the standard form does not read them, and the released
            form counts those that were not measured as 0, as that code does.
        single_task: T; each task's score when trained on alone.
        form: `standard`, or `released` for comparison with published tables.

    Returns:
        The scores; forgetting and backward transfer are 0 for a single task, which has nothing to forget.

    Raises:
        BaditError: a matrix that is not square, a missing score, or an unknown form.
    """
    if form not in FORMS:
        raise BaditError(f"form: '{form}' is none of {', '.join(FORMS)}{nearest(form, FORMS)}")
    _check(scores, single_task)
    tasks = range(len(scores))
    final = scores[-1]
    earlier = tasks[:-1]

    gains = [final[j] - scores[j][j] for j in earlier]
    if form == "standard":
        best = [max(scores[i][j] for i in earlier[j:]) for j in earlier]
        backward_divisor = len(earlier)
    else:
        best = [max(0.0 if math.isnan(scores[i][j]) else scores[i][j] for i in earlier) for j in earlier]
        backward_divisor = len(tasks)

    return ContinualScores(
        average_performance=fmean(final),
        forgetting=fmean(best[j] - final[j] for j in earlier) if earlier else 0.0,
        backward_transfer=math.fsum(gains) / backward_divisor if earlier else 0.0,
        forward_transfer=None if single_task is None else fmean(scores[j][j] - single_task[j] for j in tasks),
    )


def _check(scores: Sequence[Sequence[float]], single_task: Sequence[float] | None) -> None:
    size = len(scores)
    if not size:
        raise BaditError("scores: the matrix is empty")
    for i, row in enumerate(scores):
        if len(row) != size:
            raise BaditError(f"scores: row {i} has {len(row)} entries for {size} tasks; the matrix must be square")
        for j in range(i + 1):
            if not math.isfinite(row[j]):
                raise BaditError(f"scores: row {i} lacks the score of task {j}, which was trained by then")
    if single_task is not None and (len(single_task) != size or not all(map(math.isfinite, single_task))):
        raise BaditError(f"single_task: {size} finite scores are needed, one for each task")
