"""Keys, codes and groups against ``reference``, and their properties."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import softmax

import reference
from badit.method.abilities import (
    centred_gram,
    cluster_cosines,
    code_overlap,
    grouped_codes,
    key_scores,
    labels_by_use,
    matched_codes,
    mean_overlap,
    permuted,
    prompt_keys,
    target_overlap,
    vocabulary_moments,
    with_norm_of,
)
from badit.method.routing import random_codes

_SEED = st.integers(0, 2**32 - 1)


def _randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(_SEED, st.integers(1, 40))
def test_keys_equal_the_reference(seed, pieces):
    embeddings = _randn(seed, 40, 6) * torch.arange(1, 7) + 3
    means = embeddings[:15].reshape(5, 3, 6).mean(dim=1)
    keys = prompt_keys(means, *vocabulary_moments(embeddings.split(pieces)))
    expected = [reference.prompt_key(mean, embeddings) for mean in means]
    np.testing.assert_allclose(keys, expected, atol=2e-5)


@given(_SEED)
def test_scores_choose_the_centroid_with_the_largest_cosine(seed):
    moments = vocabulary_moments([_randn(seed, 50, 6)])
    centroids = torch.nn.functional.normalize(_randn(seed + 1, 4, 6), dim=1)
    means = _randn(seed + 2, 20, 6) * 0.3
    directions, offsets = key_scores(centroids, *moments)
    cosines = prompt_keys(means, *moments) @ centroids.T
    chosen = (means @ directions.T + offsets).argmax(dim=1)
    # Equal up to rounding, if two centroids are equally near.
    assert (cosines[range(20), chosen] > cosines.amax(dim=1) - 1e-5).all()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_vocabulary_without_variance_gives_finite_keys(rows):
    embeddings = torch.ones(rows, 3)
    keys = prompt_keys(embeddings, *vocabulary_moments([embeddings]))
    assert keys.isfinite().all()


def _gram(first, second):
    halves = torch.stack([first, second])
    return torch.einsum("hcp,gdp->hcgd", halves, halves)


@given(_SEED, st.integers(2, 6))
def test_cosines_and_targets_equal_the_reference(seed, clusters):
    common = _randn(seed, 12)
    signal = _randn(seed + 1, clusters, 12)
    first = signal + common + 0.5 * _randn(seed + 2, clusters, 12)
    second = signal + common + 0.5 * _randn(seed + 3, clusters, 12)
    cosines, reliability = cluster_cosines(_gram(first, second))
    naive_cosines, naive_reliability = reference.cluster_cosines(first, second)
    np.testing.assert_allclose(cosines, naive_cosines, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(reliability, naive_reliability, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        target_overlap(cosines), reference.target_overlap(cosines.numpy()), rtol=1e-6
    )


@given(_SEED)
def test_a_common_component_does_not_change_the_cosines(seed):
    first, second = _randn(seed, 2, 5, 12)
    common = 3 * _randn(seed + 1, 12)
    cosines, _ = cluster_cosines(_gram(first, second))
    with_common, _ = cluster_cosines(_gram(first + common, second + common))
    np.testing.assert_allclose(cosines, with_common, rtol=1e-3, atol=1e-3)


def test_gradients_of_zero_have_cosines_and_reliabilities_of_zero():
    cosines, reliability = cluster_cosines(torch.zeros(2, 3, 2, 3))
    assert not cosines.any()
    assert not reliability.any()
    np.testing.assert_array_equal(target_overlap(cosines), np.eye(3))


def test_independent_noise_has_no_reliability():
    reliabilities = [
        cluster_cosines(_gram(_randn(seed, 8, 4096), _randn(seed + 1, 8, 4096)))[1]
        for seed in range(0, 20, 2)
    ]
    assert torch.stack(reliabilities).abs().mean() < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_matched_codes_reach_a_minimum_of_the_distance(seed):
    first, second = _randn(seed, 2, 5, 8)
    target = target_overlap(cluster_cosines(_gram(first + second, first - second))[0].float())
    start = _randn(seed + 1, 2, 5, 4)
    codes = matched_codes(target, start)
    np.testing.assert_allclose(codes.sum(dim=-1), 1.0, rtol=1e-5)
    for layer in range(2):
        found = reference.code_distance(codes[layer], target)
        descent = minimize(
            lambda logits: reference.code_distance(softmax(logits.reshape(5, 4), axis=1), target),
            start[layer].double().flatten(),
        )
        assert found < 1.1 * descent.fun + 0.01


def test_matched_codes_reach_a_target_that_codes_can_have():
    codes = torch.eye(4).repeat_interleave(2, dim=0)  # clusters 0 and 1 use expert 0, and so on
    matched = matched_codes(code_overlap(codes), _randn(0, 3, 8, 4))
    for layer in matched:
        assert (code_overlap(layer) - code_overlap(codes)).abs().max() < 0.1


@given(_SEED, st.sampled_from([(2, 3), (3, 2), (4, 1)]))
def test_labels_by_use_are_balanced_and_optimal(seed, sizes):
    experts, size = sizes
    codes = random_codes(4, experts)
    energy = _randn(seed, 4, experts * size).square() + 1e-3
    labels = labels_by_use(codes, energy)
    assert sorted(labels.tolist()) == sorted([*range(experts)] * size)
    use = reference.use_of_components(codes, energy)
    total = use[range(len(labels)), labels].sum()
    slots = np.repeat(use, size, axis=1)
    rows, columns = linear_sum_assignment(-slots)
    assert total == pytest.approx(slots[rows, columns].sum(), rel=1e-5)


def test_labels_find_planted_groups_of_components():
    codes = torch.eye(3)  # cluster k uses expert k
    planted = torch.tensor([2, 0, 1, 1, 2, 0])
    energy = 0.1 + torch.nn.functional.one_hot(planted, 3).T.float()
    assert labels_by_use(codes, energy).tolist() == planted.tolist()


@given(_SEED, st.integers(2, 5))
def test_the_centred_gram_equals_the_reference(seed, clusters):
    gradients = _randn(seed, clusters, 6, 7) + 2 * _randn(seed + 1, 6, 7)
    products = torch.einsum("cip,cjp->ij", gradients, gradients)
    sums = gradients.sum(dim=0) @ gradients.sum(dim=0).T
    gram = centred_gram(products, sums, clusters)
    np.testing.assert_allclose(gram, reference.centred_gram(gradients), atol=1e-3)


def test_components_with_equal_gradients_in_all_clusters_have_a_gram_of_zero():
    gradients = _randn(0, 1, 4, 7).expand(3, 4, 7).clone()
    gradients[:, 3] = _randn(1, 3, 7)
    products = torch.einsum("cip,cjp->ij", gradients, gradients)
    gram = centred_gram(products, gradients.sum(dim=0) @ gradients.sum(dim=0).T, 3)
    assert not gram[:3].any()
    assert gram[3, 3] == pytest.approx(1.0)


@given(_SEED, st.floats(0.4, 0.9))
def test_grouped_codes_have_the_mean_overlap_and_the_order_of_the_reference(seed, overlap):
    energy = _randn(seed, 6, 8).square() + 0.01
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    codes = grouped_codes(energy, labels, overlap)
    np.testing.assert_allclose(codes.sum(dim=1), 1.0, rtol=1e-5)
    relative = reference.relative_energy(energy, labels)
    sharpest = torch.nn.functional.one_hot(torch.from_numpy(relative.argmax(axis=1)), 4).float()
    least = mean_overlap(code_overlap(sharpest))
    if overlap > least + 0.02:
        assert float(mean_overlap(code_overlap(codes))) == pytest.approx(overlap, abs=0.01)
    for row, code in zip(relative, codes.double().numpy(), strict=True):
        for k, other in itertools.combinations(range(4), 2):
            assert (row[k] - row[other]) * (code[k] - code[other]) >= 0


def test_codes_of_equal_norm_keep_their_direction():
    codes = random_codes(16, 8).square()
    random = random_codes(16, 8)
    scaled = with_norm_of(codes, random)
    np.testing.assert_allclose(scaled.norm(dim=1), random.norm(dim=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(code_overlap(scaled), code_overlap(codes), atol=1e-5)


def test_the_placebo_only_permutes_rows():
    codes = random_codes(16, 8)
    placebo = permuted(codes)
    assert not torch.equal(placebo, codes)
    assert sorted(map(tuple, placebo.tolist())) == sorted(map(tuple, codes.tolist()))
