"""Routing: gates, prompt means and moments against ``reference``, and their properties."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import reference
from badit.method import (
    batch_moments,
    expert_gates,
    prompt_mean,
    segment_means,
    standardised,
    updated_moments,
)
from badit.method.routing import cluster_gates, prompt_centroids, random_codes

_SEED = st.integers(0, 2**32 - 1)
_LOGIT = st.floats(-10, 10, width=32)
_LOGITS = st.integers(1, 12).flatmap(
    lambda k: st.lists(st.lists(_LOGIT, min_size=k, max_size=k), min_size=1, max_size=3)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [*range(1, 65), 97, 128])
def test_zero_logits_give_gates_of_exactly_one(num_experts, dtype):
    gates = expert_gates(torch.zeros(2, num_experts, dtype=dtype))
    assert gates.dtype == dtype
    assert (gates == 1.0).all()


@given(_LOGITS, st.none() | st.integers(1, 12), st.sampled_from(["mean_one", "softmax"]))
@example([[0.0, 1.0, 0.0, 0.0], [0.0] * 4], 2, "mean_one")  # on ties, the lower index is kept
def test_gates_equal_the_reference_and_have_the_documented_sum(rows, top_k, kind):
    logits = torch.tensor(rows)
    num_experts = logits.shape[-1]
    gates = expert_gates(logits, kind=kind, top_k=top_k)
    assert ((gates != 0).sum(dim=-1) == min(top_k or num_experts, num_experts)).all()
    np.testing.assert_allclose(
        gates.sum(dim=-1), num_experts if kind == "mean_one" else 1.0, rtol=1e-6
    )
    np.testing.assert_allclose(gates, reference.expert_gates(rows, kind, top_k), rtol=1e-5)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), _SEED)
def test_prompt_and_segment_means_equal_the_reference(batch, positions, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, positions, 3, generator=generator)
    mask = torch.rand(batch, positions, generator=generator) < 0.6
    segments = torch.randint(count, (batch, positions), generator=generator)
    x[~mask] = float("nan")
    naive = reference.prompt_mean(x, mask), reference.segment_means(x, mask, segments, count)
    x.requires_grad_()
    means = prompt_mean(x, mask), segment_means(x, mask, segments, count)
    for mean, expected in zip(means, naive, strict=True):
        assert mean.dtype == x.dtype
        np.testing.assert_allclose(mean.detach(), expected, rtol=1e-5, atol=1e-6)
    (means[0].sum() + means[1].sum()).backward()
    assert not x.grad[~mask].any()
    # Training finds the same clusters as inference.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prompt_mean(x, mask), means[0])
    ones = torch.ones(1, 300 + seed % 700, 3)  # more than bfloat16 can count
    of_one = segment_means(
        ones.bfloat16(), ones[..., 0] > 0, torch.zeros(ones.shape[:2], dtype=torch.long), 1
    )
    assert torch.equal(of_one, torch.ones(1, 3).bfloat16())


@given(st.integers(1, 70), _SEED, st.floats(0, 100))
def test_running_moments_equal_the_reference_for_any_offset(count, seed, common):
    generator = torch.Generator().manual_seed(seed)
    batches = [common + torch.randn(1 + n % 4, 5, generator=generator) for n in range(count)]
    mean, variance = reference.prompt_moments(batches)
    moments = torch.zeros(2, 5)
    for n, batch in enumerate(batches, start=1):
        rows = torch.cat([batch, torch.zeros(n % 3, 5)])  # rows of zeros have no prompt
        moments = updated_moments(moments, torch.tensor(float(n)), batch_moments(rows))
    np.testing.assert_allclose(moments[0], mean, atol=1e-3)
    np.testing.assert_allclose(moments[1], variance, atol=1e-2)
    x = torch.randn(3, 1, 5, generator=generator) * torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    np.testing.assert_allclose(
        standardised(x, moments), reference.standardised(x, *moments.double().numpy()), rtol=1e-4
    )


def test_moments_summed_over_ranks_equal_those_of_the_whole_batch():
    rows = 100 + torch.randn(6, 5)
    all_moments = batch_moments(rows)
    others = [
        torch.cat([rows[2:].sum(dim=0), torch.tensor([4.0])]),
        (rows[2:] - all_moments[0]).square().sum(dim=0),
    ]
    torch.testing.assert_close(
        batch_moments(rows[:2], lambda sums: sums + others.pop(0)),
        all_moments,
        rtol=1e-4,
        atol=1e-4,
    )


def test_constant_features_pass_no_gradient():
    moments_2I = torch.stack([torch.zeros(3), torch.tensor([0.0, 1e-30, 4.0])])
    x_BI = torch.randn(2, 3, requires_grad=True)
    standardised(x_BI, moments_2I).sum().backward()
    assert x_BI.grad.isfinite().all()
    assert not x_BI.grad[:, 0].any()
    assert x_BI.grad[:, 1:].all()


@given(st.integers(1, 6), _SEED)
def test_centroids_find_separate_groups_and_are_at_a_fixed_point(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:groups]
    group_S = torch.arange(12) % groups
    rows = directions[group_S] * (1 + torch.rand(12, 1, generator=generator))
    rows = rows + 0.05 * torch.randn(12, 8, generator=generator)
    x = torch.cat([rows, torch.zeros(2, 8)])  # rows of zeros have no prompt
    centroids = prompt_centroids(x, groups)
    unit = torch.nn.functional.normalize(rows, dim=1)
    nearest_S = (unit @ centroids.T).argmax(dim=1)
    assert len({(int(a), int(b)) for a, b in zip(group_S, nearest_S, strict=True)}) == groups
    for cluster in range(groups):
        mean = unit[nearest_S == cluster].sum(dim=0)
        torch.testing.assert_close(centroids[cluster], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert torch.equal(centroids, prompt_centroids(x, groups))
    codes = random_codes(groups, 3)
    gates = cluster_gates(x[:, None], centroids, codes)
    np.testing.assert_allclose(
        gates[:, 0], reference.cluster_gates(x, centroids, codes.numpy()), rtol=1e-6
    )
    # More clusters than prompts.
    torch.testing.assert_close(prompt_centroids(rows[:1], 3), unit[:1].expand(3, 8))
    assert not prompt_centroids(torch.zeros(2, 5), 3).any()


def test_codes_have_sum_1_and_mostly_choose_one_expert():
    codes = random_codes(4_000, 3)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(4_000))
    assert codes.amax(dim=1).mean() > 0.8
    torch.testing.assert_close(codes.mean(dim=0), torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert random_codes(4, 1).eq(1).all()
