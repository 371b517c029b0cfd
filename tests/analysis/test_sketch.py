"""Sketches: what they are as a matrix, that they add up, and how far their inner products are off."""

from __future__ import annotations

import math

import pytest
import torch
from badit.analysis.sketch import SketchedSums
from hypothesis import given, settings
from hypothesis import strategies as st


def sums(length: int, count: int, size: int, seed: int = 0) -> SketchedSums:
    return SketchedSums(length, count, size, torch.Generator().manual_seed(seed))


def matrix(length: int, size: int, seed: int) -> torch.Tensor:
    """S (N, M), a row for each coordinate, from the sketches of the unit vectors."""
    sketch = sums(length, length, size, seed)
    for i, unit in enumerate(torch.eye(length)):
        sketch.add(i, unit)
    return sketch.sums_RM


def inner(vectors: list[torch.Tensor], size: int, seed: int) -> torch.Tensor:
    sketch = sums(len(vectors[0]), len(vectors), size, seed)
    for i, vector in enumerate(vectors):
        sketch.add(i, vector)
    return sketch.gram()


lengths = st.integers(1, 60)
sizes = st.integers(1, 24)
seeds = st.integers(0, 1000)


@settings(deadline=None, max_examples=40)
@given(lengths, sizes, seeds)
def test_a_sketch_is_a_signed_choice_of_bucket_for_each_coordinate(length: int, size: int, seed: int) -> None:
    matrix_NM = matrix(length, size, seed)
    assert matrix_NM.shape == (length, min(length, size))
    assert ((matrix_NM != 0).sum(dim=1) == 1).all()
    assert (matrix_NM.abs().sum(dim=1) == 1).all()
    for run_NM in matrix_NM.split(size):
        assert (run_NM != 0).sum(dim=0).max() <= 1, "within a run nothing meets"
    vector = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    sketch = sums(length, 2, size, seed)
    sketch.add(1, vector)
    torch.testing.assert_close(sketch.sums_RM[1], vector @ matrix_NM)
    assert not sketch.sums_RM[0].any()


@settings(deadline=None, max_examples=40)
@given(lengths, sizes, seeds)
def test_sketches_add_up(length: int, size: int, seed: int) -> None:
    a, b = torch.randn(2, length, generator=torch.Generator().manual_seed(seed))
    sketch = sums(length, 2, size, seed)
    sketch.add(0, a)
    sketch.add(0, b)
    sketch.add(1, a + b)
    torch.testing.assert_close(sketch.sums_RM[0], sketch.sums_RM[1])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 5), seeds)
def test_short_vectors_are_exact(length: int, more: int, seed: int) -> None:
    a, b = torch.randn(2, length, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([a, b]).double()
    torch.testing.assert_close(inner([a, b], length + more, seed), expected @ expected.T)


def structured(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two gradients of a weight (60, 32): noise with a common part, or all in one column, one row or equal numbers."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 60, 32, generator=generator)
    b = 0.5 * a + b
    if kind == "column":  # 32 divides the size below: a fold without shifts would give it two buckets of 64
        a[:, 5] *= 50
        b[:, 5] *= 50
    if kind == "row":
        a[7] *= 50
        b[7] *= 50
    if kind == "constant":
        a, b = a + 20, b - 20
    return a.flatten(), b.flatten()


@pytest.mark.parametrize("kind", ["noise", "column", "row", "constant"])
def test_inner_products_are_unbiased_with_the_stated_variance(kind: str) -> None:
    a, b = structured(kind)
    size, repeats = 64, 250
    estimates = torch.stack([inner([a, b], size, seed)[0, 1] for seed in range(repeats)])
    exact = float(a.double() @ b.double())
    bound = (float(a @ a) * float(b @ b) + exact**2) / size
    assert abs(float(estimates.mean()) - exact) < 4 * math.sqrt(bound / repeats)
    assert 0 < float(estimates.var()) < 1.3 * bound


def test_the_seed_settles_the_sketch_and_parameters_of_one_generator_differ() -> None:
    assert torch.equal(matrix(50, 8, 1), matrix(50, 8, 1))
    assert not torch.equal(matrix(50, 8, 1), matrix(50, 8, 2))
    generator = torch.Generator().manual_seed(0)
    first, second = (SketchedSums(50, 1, 8, generator) for _ in range(2))
    vector = torch.arange(50.0)
    first.add(0, vector)
    second.add(0, vector)
    assert not torch.equal(first.sums_RM, second.sums_RM)


@pytest.mark.parametrize("length", [6, 50])
def test_half_precision_is_added_up_in_float32(length: int) -> None:
    vector = torch.randn(length).bfloat16()
    sketch, exact = sums(length, 1, 8), sums(length, 1, 8)
    for _ in range(300):  # in bfloat16 the sum would stop to grow at 256 times the number
        sketch.add(0, vector)
    exact.add(0, 300 * vector.float())
    torch.testing.assert_close(sketch.sums_RM, exact.sums_RM, rtol=1e-4, atol=1e-3)
