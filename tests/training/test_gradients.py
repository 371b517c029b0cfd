"""Gram matrices of sharded gradients; DeepSpeed's gradients are read before its step."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from badit.method import cosine_gram
from badit.recipe.loading import build_recipe
from badit.recipe.method import resolve_method
from badit.training.trainer import AnswerTrainer
from badit.tuner.distributed import before_step, component_grams, scale_columns, whole_weights
from method.shards import in_processes
from refusals import refuses
from steps import fit

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))


@given(st.integers(1, 4), SHAPES, st.sampled_from([1e-30, 1.0, 1e30]), st.booleans(), st.booleans())
def test_gram_of_shards_equals_gram_of_whole_gradient(count, shape, scale, dead, broken):
    components, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    grad_A = torch.randn(components, inputs, generator=generator) * scale
    grad_B = torch.randn(outputs, components, generator=generator) * scale
    if dead:
        grad_A[0], grad_B[:, 0] = 0, 0
    if broken:
        grad_A[-1, -1] = torch.inf
    shards = list(
        zip(grad_A.tensor_split(count, dim=1), grad_B.tensor_split(count, dim=0), strict=True)
    )
    grams = in_processes(count, lambda rank, over_shards: cosine_gram(*shards[rank], over_shards))
    for gram_NN in grams:
        assert torch.equal(gram_NN, grams[0])
        torch.testing.assert_close(gram_NN, cosine_gram(grad_A, grad_B), rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 60, 2**24])
def test_batched_layers_give_the_same_grams_as_single_layers(monkeypatch, at_a_time):
    monkeypatch.setattr("badit.tuner.distributed._NUMBERS_AT_A_TIME", at_a_time)
    factors = []
    for components, inputs, outputs in [(2, 3, 6), (4, 5, 1), (4, 3, 6), (2, 3, 6), (4, 5, 1)]:
        factors.append(
            [
                nn.Parameter(torch.randn(shape))
                for shape in ((components, inputs), (outputs, components))
            ]
        )
        for parameter in factors[-1]:
            parameter.grad = torch.randn_like(parameter)
    factors[3][1].grad = None
    grams = component_grams(factors)
    assert grams.pop(3) is None
    expected = [
        cosine_gram(a_NI.grad, b_ON.grad) for a_NI, b_ON in factors if b_ON.grad is not None
    ]
    torch.testing.assert_close(grams, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])  # ZeRO-1 and -2; ZeRO-3
def test_gradients_and_weights_are_accessed_through_deepspeed(monkeypatch, mark):
    """Stubs DeepSpeed's accessors (test_deepspeed.py runs DeepSpeed itself)."""
    masters = {}
    stub = SimpleNamespace(
        safe_get_full_grad=lambda parameter: parameter.kept_gradient,
        safe_get_full_fp32_param=lambda parameter: masters[id(parameter)],
        safe_set_full_fp32_param=lambda parameter, value: masters.__setitem__(id(parameter), value),
        GatheredParameters=lambda parameters, modifier_rank: nullcontext(),
    )
    monkeypatch.setattr("badit.tuner.distributed.import_module", lambda name: stub)
    a_NI, b_ON = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(5, 4))
    grad_A, grad_B = torch.randn(4, 3), torch.randn(5, 4)
    for parameter, gradient in ((a_NI, grad_A), (b_ON, grad_B)):
        setattr(parameter, mark, object())
        parameter.kept_gradient = gradient
    torch.testing.assert_close(component_grams([(a_NI, b_ON)])[0], cosine_gram(grad_A, grad_B))
    b_ON.kept_gradient = None
    assert component_grams([(a_NI, b_ON)])[0] is None
    master_ON, scale_N = torch.randn(5, 4), torch.rand(4)
    masters[id(b_ON)] = master_ON
    scale_columns(b_ON, scale_N)
    assert torch.equal(masters[id(b_ON)], master_ON * scale_N)
    assert torch.equal(b_ON, master_ON * scale_N), (
        "the copy that the next forward pass reads is not scaled"
    )
    whole = whole_weights(nn.ModuleList([nn.ParameterList([b_ON])]))
    assert torch.equal(whole["0.0"], masters[id(b_ON)]) if mark == "ds_id" else whole is None


def test_before_step_reads_before_every_step_of_deepspeed_engine():
    order = []
    engine = SimpleNamespace(step=lambda: order.append("step"))
    wrapper = type(
        "Wrapper",
        (DeepSpeedOptimizerWrapper,),
        {"__init__": lambda self: None, "optimizer": engine},
    )()
    assert before_step(wrapper, lambda: order.append("read"))
    engine.step()
    engine.step()
    assert order == ["read", "step"] * 2
    assert not before_step(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), lambda: None)


@pytest.mark.parametrize("name", ["o-lora", "gainlora", "sapt", "task-neurons"])
def test_methods_that_need_whole_weights_are_refused_with_sharded_ones(
    recipe_values, monkeypatch, name
):
    assert not any(
        resolve_method({"name": other}).needs_whole_weights for other in ("badit", "lora", "full")
    )
    own = AnswerTrainer.__init__

    def sharded(trainer, **arguments):
        own(trainer, **arguments)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(AnswerTrainer, "__init__", sharded)
    recipe = build_recipe({**recipe_values, "method": {"name": name}})
    refuses(
        f"method: {name} needs unsharded weights; launch it without FSDP",
        fit,
        recipe,
        progress=False,
    )
