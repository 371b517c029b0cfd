"""Statistics of a comparison: paired differences between methods, and continual-learning scores.

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

#: Scores that agree to this many decimals are equal: means of equal scores differ by rounding
#: errors.
DECIMALS = 9

_RESAMPLES = 10_000
_CHUNK = 200  # number of resamples computed at a time, to limit memory


class Difference(NamedTuple):
    """Mean paired difference between two methods over ``runs`` pairs of runs, with its intervals.

    ``low`` and ``high`` are the 2.5 % and 97.5 % quantiles of the resampled differences,
    ``inner_low`` and ``inner_high`` the 5 % and 95 % quantiles. Two methods are equivalent at 5 %
    (two one-sided tests) if the latter lie within a margin chosen beforehand.
    ``share_not_positive`` is the share of resampled differences that are <= 0.
    """

    mean: float
    low: float
    high: float
    share_not_positive: float
    inner_low: float
    inner_high: float
    runs: int


def paired_bootstrap(differences_by_task: Mapping[str, np.ndarray]) -> Difference:
    """Returns the mean difference between two methods, with percentile bootstrap intervals.

    The methods are paired by run and instance. The difference is the mean over tasks of the mean
    over runs and instances. Each resample draws instances with replacement within each task (the
    same for every run) and runs with replacement (the same for every task). This is the pigeonhole
    bootstrap (Owen 2007, doi:10.1214/07-AOAS122), stratified by task.

    The intervals cover new test instances of these tasks and new runs, not other tasks, training
    data, learning rates or base models. The variance between S runs is estimated at (S - 1) / S of
    its unbiased value, so intervals of three runs that differ much are too narrow, and for a single
    run they cover new instances only. The noise of single scores counts three times (Owen 2007), so
    intervals are too wide where it dominates, as in Rouge-L. Runs are treated as exchangeable,
    which those of a sequential comparison that share a seed or a task order are only approximately.

    ``differences_by_task`` has (S, N) per task: score of the method minus score of the reference. N
    may differ between tasks. All tasks need the same runs in the same order. The order of the tasks
    has no effect.
    """
    tasks_SN = [differences_by_task[task] for task in sorted(differences_by_task)]
    runs = len(tasks_SN[0])
    # A fixed seed: the same scores always give the same intervals.
    rng = np.random.default_rng(0)

    # The same resampled runs for every task.
    drawn_runs_RS = rng.integers(runs, size=(_RESAMPLES, runs))
    estimates_R = np.mean(
        [_resampled_means(task_SN, drawn_runs_RS, rng) for task_SN in tasks_SN], axis=0
    )
    quantiles = np.quantile(estimates_R, [0.025, 0.05, 0.95, 0.975])
    low, inner_low, inner_high, high = map(float, quantiles)
    return Difference(
        mean=float(np.mean([task_SN.mean() for task_SN in tasks_SN])),
        low=low,
        high=high,
        # Rounded, so that a resample of equal scores counts as not positive.
        share_not_positive=float((np.round(estimates_R, DECIMALS) <= 0).mean()),
        inner_low=inner_low,
        inner_high=inner_high,
        runs=runs,
    )


def _resampled_means(
    task_SN: np.ndarray, drawn_runs_RS: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns a task's mean difference in every resample (R)."""
    instances = task_SN.shape[1]
    chunks_SR = []
    # All runs get the same drawn instances, so these are averaged first, for every run.
    for _ in range(_RESAMPLES // _CHUNK):
        drawn_RN = rng.integers(instances, size=(_CHUNK, instances))
        chunks_SR.append(task_SN[:, drawn_RN].mean(axis=2))
    means_RS = np.concatenate(chunks_SR, axis=1).T
    return np.take_along_axis(means_RS, drawn_runs_RS, axis=1).mean(axis=1)


class ContinualScores(NamedTuple):
    """Continual-learning scores, in the units of the score matrix.

    ``forward_transfer`` needs single-task scores and is None without them.
    """

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
    """Returns average performance, forgetting and transfer of a sequence of T tasks.

    The formulas are in docs/benchmark.md. Average performance and transfer are from Lopez-Paz &
    Ranzato (2017, arXiv:1706.08840), forgetting from Chaudhry et al. (2018, arXiv:1801.10112).

    Args:
        scores: T x T; row i holds the scores of all tasks after training on task i. Rows and
            columns are in training order. Entries above the diagonal (tasks not yet trained) may
            be NaN. The standard form does not use them; the released form counts NaN as 0, as the
            released code does.
        single_task: T scores, each of a model trained on that task only.
        form: `standard`, or `released` for comparison with published tables. As in the released
            code of recent papers, such as SAPT, the maximum in forgetting then includes scores
            from before the task was trained, and backward transfer is divided by T instead of
            T - 1.

    Returns:
        The scores. Forgetting and backward transfer are 0 for a single task.

    Raises:
        BaditError: the matrix is not square, a score is missing, or the form is unknown.
    """
    refuse_unknown("form", form, FORMS)
    _refuse_incomplete(scores, single_task)
    tasks = range(len(scores))
    final = scores[-1]
    average = fmean(final)
    forward_transfer = None
    if single_task is not None:
        # FWT = 1/T Σ_j (a_jj − single_j).
        forward_transfer = fmean(scores[j][j] - single_task[j] for j in tasks)

    earlier_tasks = tasks[:-1]
    if not earlier_tasks:
        return ContinualScores(average, 0.0, 0.0, forward_transfer)

    released = form == "released"
    best = []
    for j in earlier_tasks:
        since = 0 if released else j
        column = [scores[i][j] for i in earlier_tasks[since:]]
        # Only the released form can meet NaN here, above the diagonal.
        best.append(max(0.0 if math.isnan(score) else score for score in column))
    # F = 1/(T − 1) Σ_{j<T} (max_i a_ij − a_Tj).
    forgetting = fmean(best[j] - final[j] for j in earlier_tasks)
    # BWT = 1/(T − 1) Σ_{j<T} (a_Tj − a_jj), in the released form 1/T.
    backward = math.fsum(final[j] - scores[j][j] for j in earlier_tasks)
    counted_tasks = tasks if released else earlier_tasks
    return ContinualScores(average, forgetting, backward / len(counted_tasks), forward_transfer)


def _refuse_incomplete(
    scores: Sequence[Sequence[float]], single_task: Sequence[float] | None
) -> None:
    count = len(scores)
    is_square = count > 0 and all(len(row) == count for row in scores)
    # Entries above the diagonal are of tasks not yet trained.
    measured = (score for i, row in enumerate(scores) for score in row[: i + 1])
    if not is_square or not all(map(math.isfinite, measured)):
        raise BaditError(
            "scores: must be a square matrix, with finite scores on and below the diagonal"
        )
    if single_task is None:
        return
    if len(single_task) != count or not all(map(math.isfinite, single_task)):
        raise BaditError(f"single_task: needs {count} finite scores, one for each task")


def both_forms(
    matrix: Sequence[Sequence[float | None]], single_task: Sequence[float] | None = None
) -> dict[Form, dict[str, float | None]]:
    """Returns :func:`continual_scores` in both forms; None in the matrix is not measured."""
    scores = [[math.nan if score is None else score for score in row] for row in matrix]
    return {form: continual_scores(scores, single_task, form=form)._asdict() for form in FORMS}
