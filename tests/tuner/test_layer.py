"""One adapted layer against the naive loop over experts: values, gradients, dtypes."""

import itertools

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

import reference
from badit.errors import BaditError
from badit.tuner.layer import BaditLinear
from badit.tuner.prompt import ForwardPass, RoutingContext
from tuner.helpers import KINDS, base_layer, config, randomise

IN, OUT, EXPERTS, RANK = 12, 10, 3, 2


def naive_gates(layer, x, mask):
    """Each position's gates (batch, positions, K), by the written-down formulas."""
    options = layer.badit_config["default"]
    seen = reference.prompt_mean(x, mask)[:, None].repeat(x.shape[1], axis=1) if options.routing == "prompt" else x
    if options.router_input == "standardised":
        seen = reference.standardised(seen, *layer.badit_moments["default"].double().numpy())
    logits = reference.float64(seen) @ reference.float64(layer.badit_router["default"]).T
    return reference.expert_gates(logits, options.gates, options.top_k)


def naive_forward(layer, x, mask):
    """y = W x + b + s·Σ_k gate_k B_k A_k x − s·B0 A0 x, one expert and one position at a time."""
    options, base = layer.badit_config["default"], layer.get_base_layer()
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    a, b, expert_of = layer.badit_A["default"], layer.badit_B["default"], layer.expert_of("default")
    a0, b0 = layer.kept_factors("default") if options.subtracted_share else (None, None)
    gates = naive_gates(layer, x, mask)
    y = reference.badit_linear(x, weight, base.bias, a, b, a0, b0, expert_of, gates, options.scaling)
    return torch.from_numpy(y)


def differentiable_forward(layer, x, mask):
    """The same by a loop over experts that autograd can follow."""
    options = layer.badit_config["default"]
    a, b, router = (p["default"] for p in (layer.badit_A, layer.badit_B, layer.badit_router))
    seen = x
    if options.routing == "prompt":
        seen = torch.stack([row[prompt].mean(dim=0) for row, prompt in zip(x, mask, strict=True)])[:, None]
    logits = seen @ router.T
    if options.top_k is not None:
        weak = logits.argsort(dim=-1)[..., : -options.top_k]
        logits = logits.scatter(-1, weak, float("-inf"))
    gates = logits.softmax(dim=-1) * (options.num_experts if options.gates == "mean_one" else 1)
    y = layer.get_base_layer()(x)
    for k in range(options.num_experts):
        mine = layer.expert_of("default") == k
        y = y + options.scaling * gates[..., k : k + 1] * (x @ a[mine].T @ b[:, mine].T)
    if options.subtracted_share:
        a0, b0 = layer.kept_factors("default")
        y = y - options.scaling * (x @ a0.T @ b0.T)
    return y


def make(kind="linear", *, dtype=torch.float64, at_start=False, **options):
    layer = BaditLinear(base_layer(kind, IN, OUT).to(dtype), "layer", RoutingContext(), "default", config(**options))
    layer.set_adapter("default")
    if not at_start:
        randomise(layer)
    return layer.eval()


def batch(dtype=torch.float64):
    x = torch.randn(3, 5, IN, dtype=dtype)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
    return x, mask


def run(layer, x, mask):
    layer.routing._running = ForwardPass(lambda: mask, begun_with_gradients=torch.is_grad_enabled())
    try:
        return layer(x)
    finally:
        layer.routing._running = None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("routing", "gates", "top_k"), list(itertools.product(["prompt", "token"], ["mean_one", "softmax"], [None, 1, 2]))
)
def test_forward_equals_the_loop_over_experts(kind, routing, gates, top_k):
    layer = make(kind, routing=routing, gates=gates, top_k=top_k)
    x, mask = batch()
    torch.testing.assert_close(run(layer, x, mask), naive_forward(layer, x, mask), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("router_input", ["mean", "standardised"])
@pytest.mark.parametrize("init_weights", ["bad", "lora", "directions"])
def test_forward_from_every_start_equals_the_loop(init_weights, router_input):
    layer = make(init_weights=init_weights, router_input=router_input)
    x, mask = batch()
    assert naive_gates(layer, x, mask).std(axis=0).max() > 0.1
    torch.testing.assert_close(run(layer, x, mask), naive_forward(layer, x, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"gates": "softmax"}, {"top_k": 1}], ids=str)
def test_directions_start_as_the_base_layer_to_the_bit_whatever_the_gates(kind, options):
    layer = make(kind, dtype=torch.float32, at_start=True, init_weights="directions", **options)
    x, mask = batch(torch.float32)
    assert torch.equal(run(layer, x, mask), layer.get_base_layer()(x))
    A, B = layer.badit_A["default"], layer.badit_B["default"]
    assert not B.any()
    torch.testing.assert_close(3 * A @ A.T, torch.eye(len(A)), atol=1e-5, rtol=0)
    _, _, vh = torch.linalg.svd(layer.weight_OI, full_matrices=False)
    torch.testing.assert_close((3**0.5 * A * vh[: len(A)]).sum(dim=1).abs(), torch.ones(len(A)), atol=1e-4, rtol=0)
    assert "default" not in layer.badit_A0


def test_only_training_passes_count_prompts():
    layer = make(router_input="standardised", at_start=True)
    passes = [batch() for _ in range(3)]
    for x, mask in passes:
        layer.train()
        run(layer, x, mask)
        layer.eval()
        run(layer, x + 1, mask)
    mean, variance = reference.prompt_moments([reference.prompt_mean(x, mask) for x, mask in passes])
    np.testing.assert_allclose(layer.badit_moments["default"][0], mean, atol=1e-5)
    np.testing.assert_allclose(layer.badit_moments["default"][1], variance, atol=1e-5)
    assert layer.badit_batches["default"] == 3


def test_an_input_without_positions_has_one_gate_a_row_and_one_that_is_not_the_batch_is_refused():
    layer, x = make(), torch.randn(4, IN, dtype=torch.float64)
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone)
    torch.testing.assert_close(layer(x), layer(x[:, None])[:, 0])
    x, mask = batch()
    with pytest.raises(BaditError, match=r"layer sees an input of shape \(3, 4, 12\).*leave it out of target_modules"):
        run(layer, x[:, :4], mask)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("conv1d", {}),
        ("linear", {"routing": "token", "top_k": 2}),
        ("linear", {"gates": "softmax", "init_weights": "lora"}),
    ],
)
def test_gradients_equal_the_naive_ones(kind, options):
    layer = make(kind, **options).double()
    x, mask = batch()
    x.requires_grad_(True)
    trained = [layer.badit_A["default"], layer.badit_B["default"], layer.badit_router["default"]]
    upstream = torch.randn(3, 5, OUT, dtype=torch.float64)
    naive = torch.autograd.grad((differentiable_forward(layer, x, mask) * upstream).sum(), [*trained, x])
    found = torch.autograd.grad((run(layer, x, mask) * upstream).sum(), [*trained, x])
    for ours, theirs in zip(found, naive, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_gate_sums_count_training_passes_only():
    layer, (x, mask) = make(), batch()
    run(layer, x, mask)
    layer.train()
    with torch.no_grad():
        run(layer, x, mask)
    assert layer.gate_sums == {}
    run(layer, x, mask)
    run(layer, x, mask)
    assert layer.gate_sums["default"][-1] == 6
    torch.testing.assert_close(layer.gate_sums["default"][:-1].sum(), torch.tensor(18.0))
