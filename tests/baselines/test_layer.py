"""One layer of each mixture against the loop over its experts, and what it starts from."""

import math

import pytest
import torch

import reference
from badit.baselines.mixture import MixtureLinear
from badit.errors import BaditError
from badit.tuner.prompt import RoutingContext
from baselines import naive
from baselines.naive import MIXTURES, config, randomise
from tuner.helpers import KINDS, base_layer

IN, OUT = 20, 18  # the chunks of four experts have 4 directions, of which rank 2 takes half


def make(method, kind="linear", *, dtype=torch.float64, at_start=False, **options):
    layer = MixtureLinear(
        base_layer(kind, IN, OUT).to(dtype), "layer", RoutingContext(), "default", config(method, **options)
    )
    layer.set_adapter("default")
    return (layer if at_start else randomise(layer)).eval()


def batch(dtype=torch.float64):
    return torch.randn(3, 5, IN, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", MIXTURES)
def test_forward_equals_the_loop_over_experts(method, kind):
    layer, x = make(method, kind), batch()
    torch.testing.assert_close(layer(x), naive.forward(method, layer, x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(x[:, 0]), layer(x)[:, 0])
    assert (layer(x) - layer.get_base_layer()(x)).abs().mean() > 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["loramoe", "hydralora"])
def test_step_0_is_the_base_layer_to_the_bit(method, kind):
    layer, x = make(method, kind, dtype=torch.float32, at_start=True), batch(torch.float32)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    bound = 1 / math.sqrt(IN)  # kaiming(√5)
    for parameter in (layer.badit_A["default"], layer.badit_router["default"]):
        assert 0.8 * bound < parameter.abs().max().item() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)
    assert not layer.badit_B["default"].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [10.0, 2.0])
def test_goat_starts_from_stretches_of_the_spectrum(kind, rho):
    layer = make("goat", kind, dtype=torch.float32, at_start=True, rho=rho)
    a, b = layer.badit_A["default"], layer.badit_B["default"]
    start = naive.goat_start(reference.float64(layer.weight_OI), 4, 2, 2.0, rho)
    found = naive.experts("goat", reference.float64(a), reference.float64(b), 4)
    for (b_k, a_k), (found_b, found_a) in zip(start, found, strict=True):
        torch.testing.assert_close(torch.tensor(found_b @ found_a), torch.tensor(b_k @ a_k), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(abs(found_a)), torch.tensor(abs(a_k)), atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.kept_factors("default")[0], a)
    assert torch.equal(layer.kept_factors("default")[1], b)


def test_goat_at_step_0_is_as_far_from_the_base_layer_as_it_says():
    """It adds (1/ρ) Σ_k (g_k − 1/K) P_k, of norm at most (1 − 1/K) σ₁/ρ, and nothing where all gates are alike."""
    layer, x = make("goat", at_start=True), batch()
    added = layer(x) - layer.get_base_layer()(x)
    parts = [20.0 * b @ a for b, a in naive.goat_start(reference.float64(layer.weight_OI), 4, 2, 2.0, 10.0)]
    gates, expected = naive.gates(layer, x), torch.zeros_like(added)
    for k, part in enumerate(parts):
        expected += torch.tensor(gates[..., k] - 0.25)[..., None] * (x @ torch.tensor(part).T) / 10
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-5)
    sigma = torch.linalg.svdvals(layer.weight_OI)[0]
    assert added.norm(dim=-1).max() > 1e-3
    assert (added.norm(dim=-1) <= 0.75 * sigma / 10 * x.norm(dim=-1)).all()
    dense = make("goat", at_start=True, top_k=4)
    with torch.no_grad():
        dense.badit_router["default"].zero_()
    torch.testing.assert_close(dense(x), dense.get_base_layer()(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_goat_uses_top_k_experts_a_token_and_keeps_all_in_the_graph(top_k):
    layer, x = make("goat", top_k=top_k), batch()
    gates = layer.component_gates("default", x)[..., ::2]
    assert ((gates > 0).sum(dim=-1) == top_k).all()
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(3, 5))
    layer(x).sum().backward()
    assert all(p["default"].grad is not None for p in (layer.badit_A, layer.badit_B, layer.badit_router))


def test_goat_refuses_a_weight_too_small_for_its_rank():
    with pytest.raises(BaditError, match=r"layer: a weight of shape \(18, 20\) has 4 directions .* at most r = 16$"):
        make("goat", r=24)
