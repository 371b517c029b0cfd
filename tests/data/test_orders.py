"""Orders of a sequence of tasks: SAPT's two, the seeded ones, lists, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.data import ordered
from badit.data.tasks import Task
from badit.errors import BaditError

# SAPT's 15 SuperNI tasks, as their folders are called.
SUPERNI = (
    "task002_quoref_answer_generation",
    "task073_commonsenseqa_answer_generation",
    "task1290_xsum_summarization",
    "task1510_evalution_relation_extraction",
    "task1572_samsum_summary",
    "task1590_diplomacy_text_generation",
    "task1687_sentiment140_classification",
    "task1729_personachat_generate_next",
    "task181_outcome_extraction",
    "task363_sst2_polarity_classification",
    "task511_reddit_tifu_long_text_summarization",
    "task591_sciq_answer_generation",
    "task639_multi_woz_user_utterance_generation",
    "task748_glucose_reverse_cause_event_detection",
    "task875_emotion_classification",
)
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


def tasks_named(names: Sequence[str]) -> list[Task]:
    return [Task(name=name, definition="Answer.") for name in names]


def order_of(names: Sequence[str], order: str | Sequence[str]) -> list[str]:
    return [task.name for task in ordered(tasks_named(names), order)]


def numbers(names: Sequence[str]) -> list[int]:
    return [int(name.split("_")[0].removeprefix("task")) for name in names]


@pytest.mark.parametrize("order", PUBLISHED)
def test_the_published_orders(order: str) -> None:
    assert numbers(order_of(SUPERNI, order)) == PUBLISHED[order]


@pytest.mark.parametrize("order", ["sapt-1", "sapt-2"])
@given(kept=st.sets(st.sampled_from(SUPERNI), min_size=1))
def test_a_subset_keeps_sapts_order(order: str, kept: set[str]) -> None:
    expected = [number for number in PUBLISHED[order] if number in set(numbers(sorted(kept)))]
    assert numbers(order_of(sorted(kept), order)) == expected


@given(names=st.permutations(SUPERNI), order=st.sampled_from(list(PUBLISHED)))
def test_the_order_of_loading_makes_no_difference(names: list[str], order: str) -> None:
    assert numbers(order_of(names, order)) == PUBLISHED[order]


@given(names=st.sets(st.text("abcdef_12", min_size=1), min_size=1, max_size=8), seed=st.integers(0, 10**6))
def test_a_seeded_order_is_a_permutation_and_always_the_same(names: set[str], seed: int) -> None:
    first = order_of(list(names), f"seeded-{seed}")
    assert sorted(first) == sorted(names)
    assert order_of(first, f"seeded-{seed}") == first


def test_a_list_gives_the_order_itself() -> None:
    tasks = tasks_named(["a", "b", "c"])
    assert ordered(tasks, ["c", "a", "b"]) == [tasks[2], tasks[0], tasks[1]]


def test_a_list_may_give_numbers() -> None:
    names = [name for name in SUPERNI if name.startswith(("task002", "task363", "task591"))]
    assert numbers(order_of(names, ["591", "task002", "363"])) == [591, 2, 363]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("sapt-3", r"data\.order: unknown order 'sapt-3' \(did you mean 'sapt-2'\?\); known: sapt-1, sapt-2, seeded-N"),
        ("seeded-", r"unknown order 'seeded-' \(did you mean 'seeded-0'\?\)"),
        ("seeded-x", "unknown order 'seeded-x'"),
        ("seeded--1", "unknown order 'seeded--1'"),
        ("", "unknown order ''"),
        ("sapt-1", r"does not say where task cities comes; add it, or leave it out of data\.tasks"),
        (["cities"], "does not say where task rivers comes"),
        (["cities", "rivers", "cities"], r"data\.order: 'cities' is named twice; name it once"),
        (["cities", "rivets"], r"data\.order: unknown task 'rivets' \(did you mean 'rivers'\?\)"),
        ([], r"data\.order: the list is empty"),
    ],
)
def test_what_says_not_where_each_task_comes_is_refused(order: str | list[str], message: str) -> None:
    with pytest.raises(BaditError, match=message) as caught:
        order_of(["cities", "rivers"], order)
    assert "\n" not in str(caught.value)


def test_two_tasks_of_one_number_have_no_place_in_sapts_orders() -> None:
    with pytest.raises(BaditError, match="does not say where task task363_"):
        order_of(["task363_one", "task363_other"], "sapt-1")
