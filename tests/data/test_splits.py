from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.data import hold_out, limit, mixture
from badit.errors import BaditError
from data.examples import make_task

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=5)


def make_tasks(sizes):
    return [make_task(f"task-{i}", train=size) for i, size in enumerate(sizes)]


@given(SIZES, st.integers(0, 20), st.integers(0, 3))
def test_holding_out_moves_at_most_a_quarter(sizes, per_task, seed):
    for before, after in zip(tasks := make_tasks(sizes), hold_out(tasks, per_task, seed), strict=True):
        assert len(after.validation) == min(per_task, len(before.train) // 4)
        assert sorted(i.id for i in after.train + after.validation) == sorted(i.id for i in before.train)
        assert after.test == before.test
        order = list(before.train)
        assert [order.index(i) for i in after.train] == sorted(order.index(i) for i in after.train)


@given(SIZES, st.integers(0, 3), st.randoms())
def test_a_tasks_draws_do_not_depend_on_the_others(sizes, seed, rng):
    tasks = make_tasks(sizes)
    shuffled = rng.sample(tasks, len(tasks))
    for choose in (lambda some: hold_out(some, 3, seed), lambda some: limit(some, 4, 2, seed)):
        together = {task.name: task for task in choose(shuffled)}
        assert all(choose([task]) == [together[task.name]] for task in tasks)


def test_seed_and_name_change_the_draw():
    chosen = {
        tuple(i.id for i in hold_out([make_task(name, train=100)], 10, seed)[0].validation)
        for name in ("a", "b")
        for seed in (0, 1)
    }
    assert len(chosen) == 4


def test_the_draw_is_the_same_on_every_machine():
    (task,) = hold_out([make_task(train=40)], 5, seed=0)
    assert [i.id for i in task.validation] == ["a2", "a11", "a20", "a26", "a36"]


def test_a_validation_set_that_is_there_stays():
    task = make_task(train=40)
    task = task.model_copy(update={"validation": task.test})
    assert hold_out([task], 5, seed=0) == [task]


@given(st.integers(0, 12), st.integers(0, 6), st.integers(0, 3))
def test_limits(train, test, seed):
    task = make_task()
    (limited,) = limit([task], train, test, seed)
    (larger,) = limit([task], train + 1, None, seed)
    assert len(limited.train) == min(train, 8)
    assert set(limited.train) <= set(larger.train)
    assert limited.test == task.test[:test]
    assert larger.test == task.test


def test_no_limit_leaves_the_task():
    assert limit([make_task()], None, None, seed=0) == [make_task()]


def test_negative_counts_are_refused():
    for use in (
        lambda: hold_out([], -1, 0),
        lambda: limit([], -1, None, 0),
        lambda: limit([], None, -1, 0),
    ):
        with pytest.raises(BaditError, match="must be 0 or more"):
            use()


@given(SIZES, st.integers(0, 3))
def test_the_proportional_mixture_has_each_instance_once(sizes, seed):
    tasks = make_tasks(sizes)
    epoch = mixture(tasks, "proportional", seed)
    assert Counter(epoch) == Counter((task.name, i) for task in tasks for i in task.train)
    assert epoch == mixture(tasks, "proportional", seed)


@given(SIZES, st.integers(0, 3))
def test_the_balanced_mixture_gives_every_task_its_share(sizes, seed):
    tasks = [task for task in make_tasks(sizes) if task.train]
    epoch = mixture(make_tasks(sizes), "balanced", seed)
    per_task = Counter(name for name, _ in epoch)
    assert len(set(per_task.values())) <= 1
    assert len(per_task) == len(tasks)
    assert abs(len(epoch) - sum(sizes)) <= len(tasks) / 2
    for task in tasks:
        uses = Counter(i.id for name, i in epoch if name == task.name)
        counts = [uses[i.id] for i in task.train]
        assert max(counts) - min(counts) <= 1


def test_the_mixture_is_shuffled_by_the_seed():
    tasks = make_tasks([20, 20])
    epochs = [mixture(tasks, "proportional", seed) for seed in (0, 1)]
    assert epochs[0] != epochs[1]
    assert [name for name, _ in epochs[0]] != ["task-0"] * 20 + ["task-1"] * 20


def test_an_unknown_sampling_is_refused():
    with pytest.raises(BaditError, match="did you mean 'balanced'"):
        mixture([], "balance", 0)  # pyright: ignore[reportArgumentType]
