"""The paired bootstrap against a naive twin, its coverage, and the continual-learning scores against their formulas."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.errors import BaditError
from badit.statistics import continual_scores, paired_bootstrap

RNG = np.random.default_rng(7)
TASKS = {"b": RNG.normal(1, 5, (3, 8)), "a": RNG.normal(0, 9, (3, 5)), "c": RNG.normal(2, 3, (3, 12))}
MATRICES = st.integers(2, 5).flatmap(
    lambda T: st.lists(st.lists(st.floats(0, 100), min_size=T, max_size=T), min_size=T, max_size=T)
)
NAN = math.nan


def naive_mean(tasks, seeds=None, instances=None):
    """The mean over tasks of the mean over seeds and instances; of the drawn ones where some were drawn."""
    total = 0.0
    for task, table in tasks.items():
        rows = range(len(table)) if seeds is None else seeds
        columns = range(len(table[0])) if instances is None else instances[task]
        values = [float(table[row][column]) for row in rows for column in columns]
        total += sum(values) / len(values)
    return total / len(tasks)


def naive_interval(tasks, resample_seeds, resamples, rng):
    runs = len(next(iter(tasks.values())))
    estimates = []
    for _ in range(resamples):
        seeds = [rng.integers(runs) for _ in range(runs)] if resample_seeds else list(range(runs))
        instances = {task: [rng.integers(len(t[0])) for _ in t[0]] for task, t in tasks.items()}
        estimates.append(naive_mean(tasks, seeds, instances))
    estimates.sort()
    return estimates[int(0.025 * resamples)], estimates[int(0.975 * resamples)]


@pytest.mark.parametrize("resample_seeds", [True, False])
def test_mean_and_interval_are_the_naive_ones(resample_seeds: bool) -> None:
    result = paired_bootstrap(TASKS, resample_seeds=resample_seeds)
    assert result.mean == pytest.approx(naive_mean(TASKS), abs=1e-12)
    low, high = naive_interval(TASKS, resample_seeds, 3000, np.random.default_rng(1))
    width = high - low
    assert result.low == pytest.approx(low, abs=0.08 * width)
    assert result.high == pytest.approx(high, abs=0.08 * width)
    assert result.low < result.mean < result.high
    assert result.runs == 3
    tasks = {"large": np.full((2, 90), 10.0), "small": np.full((2, 1), 0.0)}
    assert paired_bootstrap(tasks, resamples=10).mean == 5.0, "every task counts the same"


def test_instances_are_drawn_once_for_all_runs_and_runs_once_for_all_tasks() -> None:
    # Opposite differences cancel in every resample only if both halves are drawn together.
    column = np.array([[5.0, -3.0, 8.0]])
    runs = paired_bootstrap({"a": np.concatenate([column, -column])}, resample_seeds=False)
    assert (runs.low, runs.high) == (0, 0)
    row = np.array([[4.0], [-1.0], [7.0]])
    tasks = paired_bootstrap({"a": row, "b": -row})
    assert (tasks.low, tasks.high) == (0, 0)


def test_the_share_counts_resamples_without_an_advantage() -> None:
    same = paired_bootstrap({"a": np.zeros((3, 30)), "b": np.zeros((3, 4))})
    assert (same.mean, same.low, same.high, same.share_not_positive) == (0, 0, 0, 1)
    thirds = np.array([[100 / 3], [100 / 3], [-200 / 3]])  # rounding makes no advantage
    assert paired_bootstrap({"a": thirds + 1e-14}, resample_seeds=False).share_not_positive == 1
    assert paired_bootstrap({"a": np.full((3, 5), 2.0)}).share_not_positive == 0
    # Of four equally likely pairs of instances, one has a negative sum and two have the sum 0.
    even = paired_bootstrap({"a": np.array([[1.0, -1.0]])})
    assert even.share_not_positive == pytest.approx(0.75, abs=0.02)


def test_the_order_of_tasks_does_not_matter_and_that_of_instances_and_runs_only_to_the_random_draws() -> None:
    original = paired_bootstrap(TASKS)
    assert paired_bootstrap(TASKS, seed=3) != original
    assert paired_bootstrap(dict(reversed(TASKS.items()))) == original
    for shuffled in ({k: t[:, ::-1] for k, t in TASKS.items()}, {k: t[[2, 0, 1]] for k, t in TASKS.items()}):
        other = paired_bootstrap(shuffled)
        assert other.mean == pytest.approx(original.mean)
        assert [other.low, other.high] == pytest.approx([original.low, original.high], abs=0.15)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paired_bootstrap(TASKS, resamples=500)
    monkeypatch.setattr("badit.statistics._CHUNK", 400)
    assert paired_bootstrap(TASKS, resamples=500) == whole


def coverage(runs: int, run_effect: float, *, resample_seeds: bool) -> float:
    """How often the interval holds the true difference of 1 over simulated comparisons."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        run_S1 = rng.normal(0, run_effect, (runs, 1))
        tasks = {}
        for task in "abc":
            shared_N = rng.normal(0, 6, 25)
            tasks[task] = 1 + run_S1 + shared_N + rng.normal(0, 3, (runs, 25))
        result = paired_bootstrap(tasks, resample_seeds=resample_seeds, resamples=400, seed=i)
        hits += result.low <= 1 <= result.high
    return hits / 200


def test_the_interval_covers_the_true_difference() -> None:
    assert 0.90 <= coverage(10, 0.5, resample_seeds=True) <= 0.99
    assert 0.88 <= coverage(3, 0.0, resample_seeds=False) <= 0.99


def test_where_runs_differ_the_instances_alone_cover_too_little_and_three_runs_are_few() -> None:
    fixed = coverage(3, 3.0, resample_seeds=False)
    three = coverage(3, 3.0, resample_seeds=True)
    ten = coverage(10, 3.0, resample_seeds=True)
    assert fixed < three < ten
    assert fixed < 0.75
    assert three < 0.92
    assert ten > 0.85


def test_a_comparison_of_usual_size_takes_less_than_a_second() -> None:
    tasks = {f"task{i}": RNG.normal(size=(3, 30)) for i in range(15)}
    started = time.process_time()
    paired_bootstrap(tasks)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "tasks",
    [
        {},
        {"a": np.zeros((0, 3))},
        {"a": np.zeros((2, 0))},
        {"a": np.zeros(4)},
        {"a": np.array([[1.0, np.nan]])},
        {"a": np.zeros((2, 3)), "b": np.zeros((3, 3))},
    ],
)
def test_bad_differences_are_refused(tasks: dict[str, np.ndarray]) -> None:
    with pytest.raises(BaditError, match="every task needs finite numbers of the shape"):
        paired_bootstrap(tasks)


def naive_standard(a):
    """The published formulas with their own indices, which count from 1."""
    T = len(a)

    def at(i, j):
        return a[i - 1][j - 1]

    performance = sum(at(T, j) for j in range(1, T + 1)) / T
    forgetting = sum(max(at(i, j) for i in range(j, T)) - at(T, j) for j in range(1, T)) / (T - 1)
    backward = sum(at(T, j) - at(j, j) for j in range(1, T)) / (T - 1)
    return performance, forgetting, backward


def naive_released(a):
    T = len(a)
    forgetting = 0.0
    for j in range(T - 1):
        column = [row[j] for row in a]
        forgetting += (max(column[:-1]) - column[-1]) / (T - 1)
    backward = sum(a[T - 1][j] - a[j][j] for j in range(T)) / T
    return sum(a[-1]) / T, forgetting, backward


@pytest.mark.parametrize(("form", "naive"), [("standard", naive_standard), ("released", naive_released)])
@given(matrix=MATRICES)
def test_equals_the_plain_formulas(form, naive, matrix):
    scores = continual_scores(matrix, form=form)
    found = (scores.average_performance, scores.forgetting, scores.backward_transfer)
    assert found == pytest.approx(naive(matrix), abs=1e-9)
    assert scores.forward_transfer is None


@given(MATRICES)
def test_the_forms_differ_by_scores_from_before_training_and_by_the_divisor(matrix):
    standard, released = continual_scores(matrix), continual_scores(matrix, form="released")
    T = len(matrix)
    assert released.forgetting >= standard.forgetting - 1e-9
    assert released.backward_transfer * T == pytest.approx(standard.backward_transfer * (T - 1), abs=1e-9)

    measured = [[score if j <= i else NAN for j, score in enumerate(row)] for i, row in enumerate(matrix)]
    assert continual_scores(measured) == standard  # what came before training is not read
    assert continual_scores(measured, form="released").forgetting == pytest.approx(standard.forgetting)


def test_a_worked_example():
    matrix = [[80.0, 90.0, NAN], [60.0, 70.0, NAN], [50.0, 75.0, 40.0]]
    standard = continual_scores(matrix, [70.0, 70.0, 70.0])
    assert standard.average_performance == pytest.approx(55)
    assert standard.forgetting == pytest.approx(((80 - 50) + (70 - 75)) / 2)
    assert standard.backward_transfer == pytest.approx(((50 - 80) + (75 - 70)) / 2)
    assert standard.forward_transfer == pytest.approx((10 + 0 - 30) / 3)
    released = continual_scores(matrix, form="released")
    assert released.forgetting == pytest.approx(((80 - 50) + (90 - 75)) / 2)
    assert released.backward_transfer == pytest.approx(-25 / 3)


@pytest.mark.parametrize("form", ["standard", "released"])
def test_one_task_has_nothing_to_forget(form):
    scores = continual_scores([[30.0]], [25.0], form=form)
    assert (scores.average_performance, scores.forgetting, scores.backward_transfer) == (30.0, 0.0, 0.0)
    assert scores.forward_transfer == 5.0


@pytest.mark.parametrize(
    ("matrix", "single_task", "form", "message"),
    [
        ([], None, "standard", "empty"),
        ([[1.0], [1.0, 2.0]], None, "standard", "row 0 has 1 entries for 2 tasks"),
        ([[1.0, NAN], [NAN, 2.0]], None, "standard", "row 1 lacks the score of task 0"),
        ([[1.0, NAN], [1.0, 2.0]], [1.0], "standard", "2 finite scores"),
        ([[1.0, NAN], [1.0, 2.0]], [1.0, NAN], "standard", "2 finite scores"),
        ([[1.0]], None, "realeased", "did you mean 'released'"),
    ],
)
def test_refuses_what_is_incomplete(matrix, single_task, form, message):
    with pytest.raises(BaditError, match=message):
        continual_scores(matrix, single_task, form=form)
