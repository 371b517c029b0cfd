"""The walk along the ladder of learning rates: what it finds, and how many trainings that takes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.comparison.search import climb

LADDER = [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3]


def walk(losses: list[float], start: int) -> tuple[int, list[int], dict[float, float]]:
    """The rung found, the rungs in the order of their trainings, and the losses by rate."""
    ladder = LADDER[: len(losses)]
    tried: list[int] = []

    def loss_of(rate: float) -> float:
        tried.append(ladder.index(rate))
        return losses[tried[-1]]

    rate, measured = climb(ladder, ladder[start], loss_of)
    return ladder.index(rate), tried, measured


@st.composite
def valleys(draw: st.DrawFn) -> tuple[list[float], int, int]:
    """Losses that fall strictly to one rung and rise strictly after it; that rung; a start."""
    size = draw(st.integers(1, len(LADDER)))
    best = draw(st.integers(0, size - 1))
    steps = draw(st.lists(st.floats(1e-3, 10), min_size=size, max_size=size))
    losses = [sum(steps[min(rung, best) : max(rung, best)]) for rung in range(size)]
    return losses, best, draw(st.integers(0, size - 1))


@given(valleys())
def test_in_a_single_valley_it_finds_the_lowest_rung_and_tries_no_rung_in_vain(
    valley: tuple[list[float], int, int],
) -> None:
    losses, best, start = valley
    found, tried, measured = walk(losses, start)
    assert found == best
    above = start if best < start else best + 1  # where the rung below the start is better, none above it is tried
    on_the_way = range(max(min(start, best) - 1, 0), min(above + 1, len(losses)))
    assert sorted(tried) == list(on_the_way), "each once: the way from start to best and the rungs beside it"
    assert measured == {LADDER[rung]: losses[rung] for rung in tried}


def test_a_right_start_costs_three_trainings() -> None:
    assert walk([5, 4, 3, 4, 5], 2) == (2, [2, 1, 3], {LADDER[1]: 4, LADDER[2]: 3, LADDER[3]: 4})


def test_so_does_one_that_is_a_rung_too_high() -> None:
    assert walk([5, 4, 3, 4, 5], 3) == (2, [3, 2, 1], {LADDER[3]: 4, LADDER[2]: 3, LADDER[1]: 4})


@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, math.inf, math.nan, -math.inf]), min_size=1, max_size=len(LADDER)),
    st.data(),
)
def test_on_any_losses_it_ends_no_worse_than_both_neighbours(losses: list[float], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(losses) - 1))
    found, tried, measured = walk(losses, start)
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    assert len(tried) == len(set(tried)) == len(measured)
    assert finite[found] == min(finite[rung] for rung in tried)
    assert {found - 1, found + 1} & set(range(len(losses))) <= set(tried)
    assert not any(math.isnan(loss) for loss in measured.values())


@pytest.mark.parametrize("worst", [math.inf, math.nan, -math.inf])
def test_what_diverged_is_worst(worst: float) -> None:
    assert walk([3, 2, worst], 1)[0] == 1
    assert walk([3, 2, worst], 2)[0] == 1


@pytest.mark.parametrize("start", [0, 1, 2])
def test_where_all_fail_the_start_stays(start: int) -> None:
    found, tried, measured = walk([math.inf, math.nan, math.inf], start)
    assert found == start
    assert len(tried) == (3 if start == 1 else 2)
    assert set(measured.values()) == {math.inf}


def test_equal_losses_go_to_the_rate_tried_first() -> None:
    assert walk([1, 1, 1], 1)[0] == 1
    assert walk([1, 2, 1], 1)[0] == 0
