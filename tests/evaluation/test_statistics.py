"""The paired bootstrap and the continual-learning scores, compared with naive implementations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.metrics.statistics import FORMS, continual_scores, paired_bootstrap
from refusals import refuses

RNG = np.random.default_rng(7)
TASKS = {
    "b": RNG.normal(1, 5, (3, 8)),
    "a": RNG.normal(0, 9, (3, 5)),
    "c": RNG.normal(2, 3, (3, 12)),
}
MATRICES = st.integers(2, 5).flatmap(
    lambda T: st.lists(st.lists(st.floats(0, 100), min_size=T, max_size=T), min_size=T, max_size=T)
)
NAN = np.nan


def naive_bootstrap(tasks, resamples, rng):
    """Returns the mean over tasks of the mean over seeds and instances, and its interval."""

    def mean(seeds, instances):
        means = [
            np.mean([table[s][i] for s in seeds for i in instances[task]])
            for task, table in tasks.items()
        ]
        return sum(means) / len(means)

    runs = range(len(next(iter(tasks.values()))))
    estimates = []
    for _ in range(resamples):
        seeds = [rng.integers(len(runs)) for _ in runs]
        estimates.append(
            mean(
                seeds, {task: rng.integers(len(t[0]), size=len(t[0])) for task, t in tasks.items()}
            )
        )
    every = mean(runs, {task: range(len(table[0])) for task, table in tasks.items()})
    return every, *np.quantile(estimates, [0.025, 0.975])


@pytest.mark.parametrize("runs", [3, 1])
def test_mean_and_interval_match_the_naive_bootstrap(runs):
    tasks = {name: table[:runs] for name, table in TASKS.items()}
    result = paired_bootstrap(tasks)
    mean, low, high = naive_bootstrap(tasks, 3000, np.random.default_rng(1))
    assert result.mean == pytest.approx(mean, abs=1e-12)
    assert [result.low, result.high] == pytest.approx([low, high], abs=0.08 * (high - low))
    assert result.low < result.mean < result.high
    assert result.runs == runs


def test_all_runs_share_resampled_instances_and_all_tasks_resampled_runs():
    # Opposite differences cancel in every resample only if both halves are drawn together.
    row_S1 = np.array([[4.0], [-1.0], [7.0]])
    tasks = paired_bootstrap({"a": row_S1, "b": -row_S1})
    assert (tasks.low, tasks.high) == (0, 0)
    equal = paired_bootstrap(
        {name: np.repeat(table[:1], 3, axis=0) for name, table in TASKS.items()}
    )
    single = paired_bootstrap({name: table[:1] for name, table in TASKS.items()})
    assert [equal.low, equal.high] == pytest.approx([single.low, single.high], abs=0.5), (
        "equal runs add nothing"
    )


def test_share_not_positive_counts_resamples_without_an_advantage():
    same = paired_bootstrap({"a": np.zeros((3, 30)), "b": np.zeros((3, 4))})
    assert (same.mean, same.low, same.high, same.share_not_positive) == (0, 0, 0, 1)
    thirds = {i: np.array([[x / 3 + 1e-14]]) for i, x in enumerate((100, 100, -200))}
    assert paired_bootstrap(thirds).share_not_positive == 1, "a rounding error is not an advantage"
    assert paired_bootstrap({"a": np.full((3, 5), 2.0)}).share_not_positive == 0
    # Of four equally likely pairs of instances, one has a negative sum and two have the sum 0.
    assert paired_bootstrap({"a": np.array([[1.0, -1.0]])}).share_not_positive == pytest.approx(
        0.75, abs=0.02
    )


def test_result_does_not_depend_on_task_order_or_chunk_size(monkeypatch):
    original = paired_bootstrap(TASKS)
    assert paired_bootstrap(dict(reversed(TASKS.items()))) == original
    monkeypatch.setattr("badit.metrics.statistics._CHUNK", 400)
    assert paired_bootstrap(TASKS) == original


def naive_scores(a, released):
    """Plain formulas; the released form has scores from before a task and divides BWT by T."""
    T = len(a)
    best = [max(a[i][j] for i in range(0 if released else j, T - 1)) for j in range(T - 1)]
    forgetting = sum(best[j] - a[T - 1][j] for j in range(T - 1)) / (T - 1)
    backward = sum(a[T - 1][j] - a[j][j] for j in range(T - 1)) / (T if released else T - 1)
    return sum(a[-1]) / T, forgetting, backward, None


@pytest.mark.parametrize("form", FORMS)
@given(matrix=MATRICES)
def test_continual_scores_match_the_formulas(form, matrix):
    assert continual_scores(matrix, form=form) == pytest.approx(
        naive_scores(matrix, form == "released"), abs=1e-9
    )
    # Without scores from before a task was trained, both forms agree on forgetting.
    measured = [
        [score if j <= i else NAN for j, score in enumerate(row)] for i, row in enumerate(matrix)
    ]
    assert continual_scores(measured, form=form).forgetting == pytest.approx(
        naive_scores(matrix, False)[1], abs=1e-9
    )


def test_continual_scores_of_a_worked_example():
    matrix = [[80.0, 90.0, NAN], [60.0, 70.0, NAN], [50.0, 75.0, 40.0]]
    standard = continual_scores(matrix, [70.0, 70.0, 70.0])
    assert standard == pytest.approx(
        (55, ((80 - 50) + (70 - 75)) / 2, ((50 - 80) + (75 - 70)) / 2, (10 + 0 - 30) / 3)
    )
    for form in FORMS:
        assert continual_scores([[30.0]], [25.0], form=form) == (30.0, 0.0, 0.0, 5.0), (
            "a single task: no forgetting"
        )


def test_incomplete_scores_and_unknown_forms_are_refused():
    for matrix in ([], [[1.0], [1.0, 2.0]], [[1.0, NAN], [NAN, 2.0]]):
        refuses(
            "a square matrix, with finite scores on and below the diagonal",
            continual_scores,
            matrix,
        )
    refuses("2 finite scores", continual_scores, [[1.0, NAN], [1.0, 2.0]], [1.0])
    refuses("did you mean 'released'", continual_scores, [[1.0]], form="realeased")
