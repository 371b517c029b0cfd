import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.errors import BaditError
from badit.statistics import continual_scores

SCORE = st.floats(0, 100)
MATRICES = st.integers(2, 5).flatmap(
    lambda T: st.lists(st.lists(SCORE, min_size=T, max_size=T), min_size=T, max_size=T)
)
NAN = math.nan


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
