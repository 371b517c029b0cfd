"""Statistics of a comparison: the paired difference between two methods, and continual-learning scores.

Shape suffixes: S runs (seeds, or seeds x task orders), N test instances of a task, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple, get_args

import numpy as np

from badit.support.errors import BaditError, refuse_unknown

Form = Literal["standard", "released"]
FORMS: tuple[Form, ...] = get_args(Form)

_RESAMPLES = 10_000
_CHUNK = 200  # number of resamples computed at a time, to limit memory
#: Scores that agree to this many decimals are equal, because means of equal scores may differ by rounding errors.
DECIMALS = 9


class Difference(NamedTuple):
    """Mean paired difference between two methods over ``runs`` pairs of runs, with its bootstrap intervals.

    ``low`` and ``high`` are the 2.5 % and 97.5 % quantiles of the resampled differences, ``inner_low`` and
    ``inner_high`` the 5 % and 95 % quantiles. Two methods are equivalent at 5 % (two one-sided tests) if the latter
    lie within a margin chosen beforehand. ``share_not_positive`` is the share of resampled differences that are <= 0.
    """

    mean: float
    low: float
    high: float
    share_not_positive: float
    inner_low: float
    inner_high: float
    runs: int


def paired_bootstrap(differences_by_task: Mapping[str, np.ndarray]) -> Difference:
    """Returns the mean difference between two methods, paired by run and instance, with percentile bootstrap intervals.

    The difference is the mean over tasks of the mean over runs and instances. Each resample draws instances with
    replacement within each task (the same for every run) and runs with replacement (the same for every task). This is
    the pigeonhole bootstrap (Owen 2007, doi:10.1214/07-AOAS122), stratified by task.

    The intervals cover new test instances of these tasks and new runs, not other tasks, training data, learning rates
    or base models. The variance between S runs is estimated at (S - 1) / S of its unbiased value, so intervals of three
    runs that differ much are too narrow, and for a single run they cover new instances only. The noise of single scores
    counts three times (Owen 2007), so intervals are too wide where it dominates, as in Rouge-L. Runs are treated as
    exchangeable, which those of a sequential comparison that share a seed or a task order are only approximately.

    ``differences_by_task`` has (S, N) per task: score of the method minus score of the reference. N may differ between
    tasks. All tasks need the same runs in the same order. The order of the tasks has no effect.
    """
    tasks_SN = [task_SN for _, task_SN in sorted(differences_by_task.items())]
    rng = np.random.default_rng(0)
    runs = len(tasks_SN[0])
    drawn_RS = rng.integers(runs, size=(_RESAMPLES, runs))
    estimates = []
    for task_SN in tasks_SN:
        instances = task_SN.shape[1]
        drawn = (
            rng.integers(instances, size=(_CHUNK, instances)) for _ in range(_RESAMPLES // _CHUNK)
        )
        means_RS = np.concatenate(
            [task_SN[:, drawn_RN].mean(axis=2) for drawn_RN in drawn], axis=1
        ).T
        estimates.append(np.take_along_axis(means_RS, drawn_RS, axis=1).mean(axis=1))
    estimates_R = np.mean(estimates, axis=0)
    low, inner_low, inner_high, high = map(
        float, np.quantile(estimates_R, [0.025, 0.05, 0.95, 0.975])
    )
    mean = float(np.mean([task_SN.mean() for task_SN in tasks_SN]))
    share_not_positive = float((np.round(estimates_R, DECIMALS) <= 0).mean())
    return Difference(mean, low, high, share_not_positive, inner_low, inner_high, runs)


class ContinualScores(NamedTuple):
    """Continual-learning scores, in the units of the score matrix. `forward_transfer` needs single-task scores."""

    average_performance: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float | None


def continual_scores(
    scores: Sequence[Sequence[float]],
    single_task: Sequence[float] | None = None,
    *,
    form: Form = "standard",
) -> ContinualScores:
    """Returns average performance, forgetting, backward and forward transfer of a sequence of T tasks.

    The formulas are in docs/benchmark.md. Average performance and transfer are from Lopez-Paz & Ranzato (2017,
    arXiv:1706.08840), forgetting from Chaudhry et al. (2018, arXiv:1801.10112).

    Args:
        scores: T x T; row i holds the scores of all tasks after training on task i. Rows and columns are in training
            order. Entries above the diagonal (tasks not yet trained) may be NaN. The standard form does not use them;
            the released form counts NaN as 0, as the released code does.
        single_task: T scores, each of a model trained on that task only.
        form: `standard`, or `released` for comparison with published tables. As in the released code of recent papers,
            such as SAPT, the maximum in forgetting then includes scores from before the task was trained, and backward
            transfer is divided by T instead of T - 1.

    Returns:
        The scores. Forgetting and backward transfer are 0 for a single task.

    Raises:
        BaditError: the matrix is not square, a score is missing, or the form is unknown.
    """
    refuse_unknown("form", form, FORMS)
    tasks, earlier = range(len(scores)), range(len(scores) - 1)
    measured = [score for i, row in enumerate(scores) for score in row[: i + 1]]
    if (
        not tasks
        or any(len(row) != len(tasks) for row in scores)
        or not all(map(math.isfinite, measured))
    ):
        raise BaditError(
            "scores: must be a square matrix, with finite scores on and below the diagonal"
        )
    if single_task is not None and (
        len(single_task) != len(tasks) or not all(map(math.isfinite, single_task))
    ):
        raise BaditError(f"single_task: needs {len(tasks)} finite scores, one for each task")
    forward = None if single_task is None else fmean(scores[j][j] - single_task[j] for j in tasks)
    if not earlier:
        return ContinualScores(fmean(scores[-1]), 0.0, 0.0, forward)
    released = form == "released"
    known = [[0.0 if math.isnan(score) else score for score in row] for row in scores]
    best = [max(known[i][j] for i in earlier[0 if released else j :]) for j in earlier]
    forgetting = fmean(best[j] - scores[-1][j] for j in earlier)
    backward = math.fsum(scores[-1][j] - scores[j][j] for j in earlier)
    return ContinualScores(
        fmean(scores[-1]), forgetting, backward / len(tasks if released else earlier), forward
    )


def both_forms(
    matrix: Sequence[Sequence[float | None]], single_task: Sequence[float] | None = None
) -> dict[Form, dict[str, float | None]]:
    """Returns :func:`continual_scores` in both forms, from a matrix with None for scores that were not measured."""
    scores = [[math.nan if score is None else score for score in row] for row in matrix]
    return {form: continual_scores(scores, single_task, form=form)._asdict() for form in FORMS}
