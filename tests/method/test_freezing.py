"""Fixed gates make a plain LoRA, exactly; a smaller rank makes the closest one."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from badit.method import compress, frozen_factors

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**16)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(deadline=None)
@given(SEEDS, SIZES, SIZES, SIZES, st.integers(1, 3), st.sampled_from([0.0, 0.25, 1.0]), st.floats(0.1, 10))
def test_the_product_is_the_mixture(
    seed: int, out: int, inner: int, rows: int, runs: int, share: float, scaling: float
) -> None:
    components = rows * runs
    A, B, gates, A0, B0 = draw(
        seed, (rows, inner), (out, components), (components,), (components, inner), (out, components)
    )
    initial = (A0, B0) if share else None
    a, b = frozen_factors(A, B, scaling * gates, initial, scaling * share)
    assert a.shape == (rows + (components if share else 0), inner)
    assert b.shape == (out, len(a))
    expected = reference.frozen_weight(A, B, *(initial or (None, None)), gates, scaling, share)
    np.testing.assert_allclose(b @ a, expected, atol=1e-9)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 7), st.integers(1, 7), SIZES, st.integers(1, 9))
def test_compressing_takes_the_leading_triples_and_says_what_it_lost(
    seed: int, out: int, inner: int, rank: int, smaller: int
) -> None:
    a, b = draw(seed, (rank, inner), (out, rank))
    found = compress(a, b, smaller)
    assert found.a_PI.shape == (smaller, inner)
    assert found.b_OP.shape == (out, smaller)
    product, expected = reference.float64(b @ a), reference.closest_of_rank(b @ a, smaller)
    np.testing.assert_allclose(found.b_OP.double() @ found.a_PI.double(), expected, atol=1e-5)
    np.testing.assert_allclose(found.lost, np.linalg.norm(product - expected), atol=1e-9)
    np.testing.assert_allclose(found.norm, np.linalg.norm(product), atol=1e-9)


def test_nothing_compresses_to_nothing() -> None:
    found = compress(torch.zeros(4, 5), torch.zeros(3, 4), 2)
    assert (found.lost, found.norm) == (0.0, 0.0)
    assert not found.a_PI.any()
    assert not found.b_OP.any()
