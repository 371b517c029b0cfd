"""Coverage, spread and confusion of keys, and directions that no frozen expert reads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

import reference
from badit.method.extension import (
    add_to_image,
    add_to_sketch,
    complement_basis,
    confused_shares,
    frozen_basis,
    is_covered,
    key_spread,
    likeness,
    mixing_shares,
    sketch_rows,
    top_directions,
)

_SEED = st.integers(0, 2**32 - 1)


def _randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _directions(batches, frozen, rank):
    """Returns A from batches of inputs and output gradients, as the tuner does."""
    (x, gradient), *_ = batches
    out_features, in_features = gradient.shape[1], x.shape[1]
    rows = sketch_rows(rank, out_features, in_features)
    probe = _randn(7, rows, out_features)
    sketch = torch.zeros(rows, in_features)
    for x, gradient in batches:
        add_to_sketch(sketch, probe, x, gradient)
    basis = complement_basis(sketch, frozen_basis(frozen), rank)
    if basis is None:
        return None
    image = torch.zeros(out_features, len(basis))
    for x, gradient in batches:
        add_to_image(image, basis.float(), x, gradient)
    return top_directions(image, basis, rank)


@pytest.mark.parametrize("frozen_rows", [0, 1, 6])
@given(_SEED, st.integers(1, 4))
def test_directions_are_those_of_the_whole_gradient(frozen_rows, seed, rank):
    # 5 + 3 positions: the gradient's rank is at most 8, so the sketch of rank + 8 rows has it all.
    batches = [
        (_randn(seed, 5, 24), _randn(seed + 1, 5, 20)),
        (_randn(seed + 2, 3, 24), _randn(seed + 3, 3, 20)),
    ]
    frozen = _randn(seed + 4, frozen_rows, 24)
    directions = _directions(batches, frozen, rank)
    gradient = sum(gradient.T @ x for x, gradient in batches)
    expected = reference.new_directions(gradient, frozen, rank)
    np.testing.assert_allclose((directions.T @ directions).numpy(), expected, atol=1e-3)


@given(_SEED, st.integers(1, 6), st.integers(0, 20), st.floats(1e-6, 1e3))
def test_directions_are_orthonormal_and_orthogonal_to_the_frozen_ones(seed, rank, rows, size):
    batches = [(_randn(seed, 40, 24), size * _randn(seed + 1, 40, 20))]
    frozen = _randn(seed + 2, rows, 24) * _randn(seed + 3, rows, 1).exp()
    directions = _directions(batches, frozen, rank)
    if 24 - rows < rank:
        assert directions is None
        return
    torch.testing.assert_close(directions @ directions.T, torch.eye(rank).double())
    if rows:
        unit = torch.nn.functional.normalize(frozen.double(), dim=1)
        assert (unit @ directions.T).abs().max() < 1e-6


def test_a_gradient_inside_the_frozen_space_leaves_no_directions():
    frozen = _randn(0, 6, 24)
    x = _randn(1, 9, 6) @ frozen
    assert _directions([(x, _randn(2, 9, 20))], frozen, 2) is None


def test_a_gradient_of_zeros_or_of_small_rank_gives_directions_in_the_complement():
    frozen = _randn(0, 6, 24)
    for gradient in (torch.zeros(9, 20), _randn(1, 9, 1) @ torch.ones(1, 20)):
        directions = _directions([(torch.ones(9, 24), gradient)], frozen, 4)
        torch.testing.assert_close(directions @ directions.T, torch.eye(4).double())
        assert (frozen.double() @ directions.T).abs().max() < 1e-5


@given(_SEED)
def test_spread_equals_the_reference(seed):
    keys = _randn(seed, 21, 30)
    clusters = torch.arange(21) % 3  # seven prompts each: eight components have all the variance
    means, spread = key_spread(keys, clusters, 4)
    for cluster in range(3):
        mean, covariance = reference.key_moments(keys[clusters == cluster])
        np.testing.assert_allclose(means[cluster], mean, atol=1e-6)
        np.testing.assert_allclose(spread[cluster].T @ spread[cluster], covariance, atol=1e-5)
    assert not means[3].any()  # a cluster without prompts
    assert not spread[3].any()


@given(_SEED)
def test_spread_has_the_largest_components(seed):
    keys = _randn(seed, 40, 12) * torch.arange(1, 13)
    _, spread = key_spread(keys, torch.zeros(40, dtype=torch.long), 1)
    _, covariance = reference.key_moments(keys)
    largest = np.linalg.eigvalsh(covariance)[::-1][:8]
    np.testing.assert_allclose(spread[0].square().sum(dim=1), largest, rtol=1e-4)


@given(_SEED)
def test_confused_shares_equal_the_reference(seed):
    keys = _randn(seed, 14, 20)
    clusters = torch.arange(14) % 2
    own, others = _randn(seed + 2, 2, 20), _randn(seed + 3, 3, 20)
    shares = confused_shares(*key_spread(keys, clusters, 2), own, others)
    for c in range(2):
        for d in range(3):
            expected = reference.confused_share(keys[clusters == c], own[c], others[d])
            assert shares[c, d].item() == pytest.approx(expected, abs=1e-5)


def test_without_variance_a_share_is_0_or_1():
    own, others = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    means, zeros = torch.tensor([[0.2, 0.8]]), torch.zeros(1, 8, 2)
    assert confused_shares(means, zeros, own, others).tolist() == [[1.0, 0.0]]
    assert confused_shares(own, zeros, own, others).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_likeness_equals_the_reference(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    # At most eight features vary, as many as there are principal components.
    sources = torch.eye(12)[:2] * 3
    keys = [
        normalize(source + 0.3 * torch.randn(20, 12, generator=generator) * (torch.arange(12) < 7))
        for source in sources
    ]
    centroids = normalize(torch.stack([of_cluster.mean(dim=0) for of_cluster in keys]))
    cluster = torch.arange(2).repeat_interleave(20)
    means, spread = key_spread(torch.cat(keys), cluster, 2)
    others = normalize(torch.cat(keys) + shift * torch.randn(40, 12, generator=generator))
    found = likeness(others, means, spread, centroids)
    share, distance = reference.likeness(others, keys, centroids)
    assert found.unlike_share == share
    assert found.shift == pytest.approx(distance, abs=1e-6)
    assert share <= 0.05 if shift == 0 else share > 0
    assert distance < 1e-6 if shift == 0 else distance > 0.01


def test_equal_prompts_are_like_those_of_the_training():
    key = torch.eye(4)[:1]
    means, spread = key_spread(key.expand(5, 4), torch.zeros(5, dtype=torch.long), 1)
    assert likeness(key, means, spread, key) == (0, 0)
    assert likeness(torch.eye(4)[1:], means, spread, key).unlike_share == 1


@pytest.mark.parametrize(("close", "is_enough"), [(7, False), (8, True), (10, True)])
def test_a_task_is_covered_if_a_share_of_its_prompts_is(close, is_enough):
    cosines = torch.full((10, 3), 0.5)
    cosines[:close, 1] = 0.95
    assert is_covered(cosines, 0.93, 0.8) == is_enough
    assert not is_covered(cosines, 0.95, 0.8)  # not above the threshold
    assert not is_covered(cosines[:0], 0.0, 0.8)


@given(_SEED, st.integers(2, 6), st.sampled_from([0.001, 0.01, 0.1, 2.0]))
def test_mixing_shares_equal_the_reference(seed, tasks, temperature):
    cosines = 0.3 * _randn(seed, 5, tasks)
    index, share = mixing_shares(cosines, temperature)
    found = torch.zeros(5, tasks).scatter(1, index, share)
    expected = torch.tensor(reference.mixing_shares(cosines, temperature), dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(index[:, 0], cosines.argmax(dim=1))


def test_mixing_of_equally_near_tasks_and_with_extreme_temperatures():
    index, share = mixing_shares(torch.tensor([[0.5, 0.5, 0.2]]), 1e-300)
    assert index.tolist() == [[0, 1]]
    assert share.tolist() == [[0.5, 0.5]]
    _, share = mixing_shares(torch.tensor([[0.5, 0.4]]), 1e-300)
    assert share.tolist() == [[1.0, 0.0]]
    _, share = mixing_shares(torch.tensor([[0.5, 0.4]]), 1e300)
    assert share.tolist() == [[0.5, 0.5]]
