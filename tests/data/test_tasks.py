"""Tasks' names, splits, mixtures and orders."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from badit.data import Task, hold_out, limit, mixture, ordered
from badit.errors import BaditError
from data.examples import make_task

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=5)
# Literal, since results are published under these names: they must not move with Python or with the code.
PUBLISHED = {
    "sapt-1": [1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875],
    "sapt-2": [748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875],
    "seeded-0": [1590, 748, 363, 1729, 511, 1572, 73, 2, 181, 1290, 1687, 639, 1510, 591, 875],
    "seeded-1": [511, 363, 639, 2, 1687, 1729, 1290, 1510, 181, 1572, 591, 748, 1590, 73, 875],
    "seeded-2": [748, 1729, 1290, 73, 1510, 1572, 2, 363, 591, 875, 639, 511, 181, 1687, 1590],
    "seeded-3": [1572, 591, 511, 1729, 2, 1290, 73, 748, 363, 1687, 875, 181, 1510, 1590, 639],
    "seeded-4": [748, 181, 363, 1729, 1687, 2, 1290, 591, 1510, 1590, 73, 639, 511, 875, 1572],
}
CITIES = ["cities", "rivers"]
SUPERNI = [f"task{number:03}_of_superni" for number in PUBLISHED["sapt-1"]]


def make_tasks(sizes: Sequence[int]) -> list[Task]:
    return [make_task(f"task-{i}", train=size) for i, size in enumerate(sizes)]


def order_of(names: Sequence[str], order: str | Sequence[str]) -> list[str]:
    return [task.name for task in ordered([Task(name=name, definition="Answer.") for name in names], order)]


def numbers(names: Sequence[str]) -> list[int]:
    return [int(name.split("_")[0].removeprefix("task")) for name in names]


@pytest.mark.parametrize(
    "name", ["", " ", ".hidden", "a/b", "a\\b", "a\nb", "a\x7fb", "a\u2028b", "x" * 121, "語" * 81]
)
def test_names_that_cannot_be_file_names_are_refused(name):
    with pytest.raises(ValidationError, match="file name"):
        Task(name=name, definition="d")
    for fine in ("x" * 120, "語" * 80, "task 1 (new)", "a..b"):
        assert Task(name=fine, definition="d").name == fine


@given(SIZES, st.integers(0, 20), st.integers(0, 3))
def test_holding_out_moves_at_most_a_quarter_and_no_draw_depends_on_other_tasks(sizes, per_task, seed):
    tasks = make_tasks(sizes)
    for before, after in zip(tasks, hold_out(tasks, per_task, seed), strict=True):
        assert len(after.validation) == min(per_task, len(before.train) // 4)
        assert sorted(i.id for i in after.train + after.validation) == sorted(i.id for i in before.train)
        assert after.test == before.test
        order = list(before.train)
        assert [order.index(i) for i in after.train] == sorted(order.index(i) for i in after.train)
    for choose in (lambda some: hold_out(some, 3, seed), lambda some: limit(some, 4, 2, seed)):
        assert choose(tasks[::-1]) == [choose([task])[0] for task in tasks[::-1]]


def test_the_draw_depends_on_seed_and_name_and_is_the_same_on_every_machine():
    (task,) = hold_out([make_task(train=40)], 5, seed=0)
    assert [i.id for i in task.validation] == ["a2", "a11", "a20", "a26", "a36"]
    draws = [hold_out([make_task(name, train=100)], 10, seed)[0] for name in ("a", "b") for seed in (0, 1)]
    assert len({tuple(i.id for i in draw.validation) for draw in draws}) == 4
    assert hold_out([task], 3, seed=1) == [task], "a validation set that is there stays"


@given(st.integers(0, 12), st.integers(0, 6), st.integers(0, 3))
def test_limits(train, test, seed):
    task = make_task()
    (limited,) = limit([task], train, test, seed)
    (larger,) = limit([task], train + 1, None, seed)
    assert len(limited.train) == min(train, 8)
    assert set(limited.train) <= set(larger.train)
    assert (limited.test, larger.test) == (task.test[:test], task.test)
    assert limit([task], None, None, seed) == [task]


@given(SIZES, st.integers(0, 3))
def test_the_mixture_has_every_instance_once_shuffled_by_the_seed(sizes, seed):
    tasks = make_tasks(sizes)
    order = mixture(tasks, seed)
    assert sorted(order) == list(range(sum(sizes)))
    assert order == mixture(tasks, seed)
    assert order != mixture(tasks, seed + 1) or sum(sizes) < 10


@given(names=st.permutations(SUPERNI), count=st.integers(1, 15), order=st.sampled_from(list(PUBLISHED)))
def test_the_published_orders_whatever_the_order_of_loading(names, count, order):
    loaded = names[:count] if order.startswith("sapt") else names
    assert numbers(order_of(loaded, order)) == [number for number in PUBLISHED[order] if number in numbers(loaded)]


def test_a_list_of_names_or_numbers_gives_the_order_itself():
    assert order_of(["a", "b", "c"], ["c", "a", "b"]) == ["c", "a", "b"]
    names = [name for name in SUPERNI if name.startswith(("task002", "task363", "task591"))]
    assert numbers(order_of(names, ["591", "task002", "363"])) == [591, 2, 363]


@pytest.mark.parametrize(
    ("names", "order", "message"),
    [
        (
            CITIES,
            "sapt-3",
            r"data\.order: unknown order 'sapt-3' \(did you mean 'sapt-2'\?\); known: sapt-1, sapt-2, s",
        ),
        (CITIES, "seeded--1", "unknown order 'seeded--1'"),
        (CITIES, "sapt-1", r"has no place for task cities; add it, or leave it out of data\.tasks"),
        (CITIES, ["cities"], "has no place for task rivers"),
        (CITIES, ["cities", "rivers", "cities"], r"data\.order: 'cities' is named twice; name it once"),
        (["task363_one", "task363_other"], "sapt-1", "no place for task task363_"),
    ],
)
def test_an_order_without_a_place_for_every_task_is_refused(names, order, message):
    with pytest.raises(BaditError, match=message):
        order_of(names, order)
