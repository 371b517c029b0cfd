"""Regrouping of the components with the smallest changes, against ``reference``."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from badit.method.grouping import grouping_objective
from badit.method.late_grouping import change_norms, regroup_smallest
from method.test_grouping import unit_gradients

_SEED = st.integers(0, 2**32 - 1)
_SHARES = st.sampled_from([0.01, 0.05, 0.2, 0.5, 1.0])


@given(_SEED, st.sampled_from([1.0, 1e-2, 1e-5, 0.0]), st.sampled_from([1e-6, 1.0, 1e6]))
def test_norms_of_changes_equal_those_of_the_matrices(seed, size, scale):
    rng = np.random.default_rng(seed)
    initial = scale * rng.standard_normal((6, 9)), scale * rng.standard_normal((5, 6))
    factors = [start + size * scale * rng.standard_normal(start.shape) for start in initial]
    factors[0][0], factors[1][:, 1] = initial[0][0], initial[1][:, 1]
    norms = change_norms(*map(torch.tensor, (*factors, *initial)))
    expected = reference.change_norms(*factors, *initial)
    # The twin subtracts two matrices, so it loses the digits of small changes.
    np.testing.assert_allclose(norms, expected, rtol=1e-6, atol=1e-14 * scale**2)


def test_a_change_of_float32_factors_keeps_its_digits():
    initial = torch.randn(4, 50), torch.randn(60, 4)
    factors = initial[0] + 1e-4 * torch.randn(4, 50), initial[1]
    norms = change_norms(*factors, *initial)
    np.testing.assert_allclose(norms, reference.change_norms(*factors, *initial), rtol=1e-9)


@given(
    st.sampled_from(["random", "few dimensions", "zero", "all equal", "orthogonal"]),
    st.integers(1, 4),
    st.integers(1, 4),
    _SHARES,
    _SEED,
)
def test_only_the_smallest_changes_move_and_the_objective_never_decreases(
    kind, num_experts, size, share, seed
):
    rng = np.random.default_rng(seed)
    gradients = unit_gradients(kind, num_experts * size, seed)
    gram = gradients @ gradients.T
    labels = rng.permutation(np.repeat(np.arange(num_experts), size))
    norms = rng.integers(0, 4, len(labels)).astype(float)
    before = labels.copy()
    new = regroup_smallest(gram, labels, norms, share)
    assert (labels == before).all(), "the argument does not change"
    free = np.argsort(norms, kind="stable")[: round(share * len(norms))]
    fixed = np.setdiff1d(np.arange(len(labels)), free)
    assert (new[fixed] == labels[fixed]).all()
    assert sorted(new) == sorted(labels)
    objective = grouping_objective(gram, labels)
    assert grouping_objective(gram, new) >= objective
    if (new != labels).any():
        assert grouping_objective(gram, new) > objective


@given(st.integers(2, 4), st.integers(1, 3), _SHARES, _SEED)
def test_exchanges_equal_the_reference(num_experts, size, share, seed):
    gradients = unit_gradients("random", num_experts * size, seed)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_experts), size))
    norms = rng.random(len(labels))
    new = regroup_smallest(gradients @ gradients.T, labels, norms, share)
    expected = reference.exchanged_smallest(gradients, labels, norms, share)
    # Of equally good exchanges, rounding decides.
    np.testing.assert_allclose(
        reference.objective(gradients, new), reference.objective(gradients, expected), rtol=1e-6
    )
