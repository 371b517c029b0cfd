"""The paired bootstrap against a naive twin, its coverage, and the small statistics beside it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badit.errors import BaditError
from badit.statistics import Spread, mean_ranks, paired_bootstrap, ranks, spread

RNG = np.random.default_rng(7)
TASKS = {"b": RNG.normal(1, 5, (3, 8)), "a": RNG.normal(0, 9, (3, 5)), "c": RNG.normal(2, 3, (3, 12))}
SCORES = st.lists(st.sampled_from([0.0, 10.0, 33.3, 50.0, 100.0]), min_size=1, max_size=7)


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


def test_every_task_counts_the_same() -> None:
    tasks = {"large": np.full((2, 90), 10.0), "small": np.full((2, 1), 0.0)}
    assert paired_bootstrap(tasks, resamples=10).mean == 5.0


def test_instances_are_drawn_once_for_all_runs_and_runs_once_for_all_tasks() -> None:
    # Opposite differences cancel in every resample only if both halves are drawn together.
    column = np.array([[5.0, -3.0, 8.0]])
    runs = paired_bootstrap({"a": np.concatenate([column, -column])}, resample_seeds=False)
    assert (runs.low, runs.high) == (0, 0)
    row = np.array([[4.0], [-1.0], [7.0]])
    tasks = paired_bootstrap({"a": row, "b": -row})
    assert (tasks.low, tasks.high) == (0, 0)


def test_methods_with_the_same_scores_have_an_interval_of_zero() -> None:
    result = paired_bootstrap({"a": np.zeros((3, 30)), "b": np.zeros((3, 4))})
    assert (result.mean, result.low, result.high, result.share_not_positive) == (0, 0, 0, 1)


def test_the_share_counts_resamples_without_an_advantage() -> None:
    assert paired_bootstrap({"a": np.full((3, 5), 2.0)}).share_not_positive == 0
    # Of four equally likely pairs of instances, one has a negative sum and two have the sum 0.
    even = paired_bootstrap({"a": np.array([[1.0, -1.0]])})
    assert even.share_not_positive == pytest.approx(0.75, abs=0.02)


def test_the_order_of_tasks_does_not_matter_and_that_of_instances_and_runs_only_to_the_random_draws() -> None:
    original = paired_bootstrap(TASKS)
    assert paired_bootstrap(dict(reversed(TASKS.items()))) == original
    for shuffled in ({k: t[:, ::-1] for k, t in TASKS.items()}, {k: t[[2, 0, 1]] for k, t in TASKS.items()}):
        other = paired_bootstrap(shuffled)
        assert other.mean == pytest.approx(original.mean)
        assert [other.low, other.high] == pytest.approx([original.low, original.high], abs=0.15)


def test_the_seed_decides_the_draws() -> None:
    assert paired_bootstrap(TASKS, seed=3) == paired_bootstrap(TASKS, seed=3)
    assert paired_bootstrap(TASKS, seed=3) != paired_bootstrap(TASKS, seed=4)


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
    ("tasks", "message"),
    [
        ({}, "no tasks"),
        ({"a": np.zeros((0, 3))}, "a needs finite numbers"),
        ({"a": np.zeros((2, 0))}, "a needs finite numbers"),
        ({"a": np.zeros(4)}, "a needs finite numbers"),
        ({"a": np.array([[1.0, np.nan]])}, "a needs finite numbers"),
        ({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}, "b has 3 runs, other tasks 2"),
    ],
)
def test_bad_differences_are_refused(tasks: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(BaditError, match=message):
        paired_bootstrap(tasks)


def test_spread() -> None:
    assert spread([4.0]) == Spread(4.0, None)
    result = spread([1.0, 2.0, 6.0])
    assert result.mean == 3.0
    assert result.std == pytest.approx(((4 + 1 + 9) / 2) ** 0.5)


def naive_ranks(scores):
    """One more than the number of better scores, moved to the middle of the tie."""
    return [
        1 + sum(other > score for other in scores) + (sum(other == score for other in scores) - 1) / 2
        for score in scores
    ]


@given(SCORES)
@settings(deadline=None)
def test_ranks_are_the_naive_ones(scores: list[float]) -> None:
    assert ranks(scores) == naive_ranks(scores)
    assert sum(ranks(scores)) == len(scores) * (len(scores) + 1) / 2


def test_rounding_breaks_no_tie() -> None:
    assert ranks([0.1 + 0.2, 0.3, 0.0]) == [1.5, 1.5, 3.0]
    thirds = np.array([[100 / 3], [100 / 3], [-200 / 3]])
    assert paired_bootstrap({"a": thirds + 1e-14}, resample_seeds=False).share_not_positive == 1


def test_mean_ranks_average_over_tasks() -> None:
    assert mean_ranks({"a": [50.0, 60.0, 10.0], "b": [1.0, 1.0, 0.0]}) == [1.75, 1.25, 3.0]
