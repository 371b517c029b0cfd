"""Every method with experts or branches in whole models, through all of PEFT's operations."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, PeftType
from transformers import DynamicCache

from badit.tuner import hooks_of
from badit.tuner.model import register
from baselines import naive
from baselines.naive import (
    BRANCHES,
    GATED,
    IDS,
    MASK,
    ROWS,
    adapt,
    adapted,
    config,
    logits,
    loss,
    randomise,
    trainable,
)
from refusals import refuses
from training.trainers import assert_same
from tuner import helpers
from tuner.helpers import (
    cached_steps,
    gradients,
    greedy_by_hand,
    layers,
    take_steps,
    teacher_forced,
)

by_family = pytest.mark.parametrize("family", ["llama", "gpt2"])  # nn.Linear and Conv1D
by_method = pytest.mark.parametrize("method", naive.METHODS)


@by_family
@by_method
def test_step_0_is_close_to_base_model_and_training_changes_only_the_adapter(
    tiny_model, method, family
):
    model = adapt(tiny_model(family), method)
    base = logits(tiny_model(family))
    target = "transformer.h.{}.mlp.c_fc" if family == "gpt2" else "model.layers.{}.mlp.gate_proj"
    assert [layer.name for layer in layers(model)] == [target.format(i) for i in range(2)]
    if method == "goat":
        assert 1e-3 < (logits(model) - base).norm() / base.norm() < 0.3
    else:
        torch.testing.assert_close(
            logits(model), base, atol=1e-5 if method == "badit" else 0, rtol=0
        )
    if method in BRANCHES:  # in their third task, where gates weight several branches
        model = adapted(model.unload(), method, tasks=2)
        model.base_model.next_task()
    model.train()
    places = [(layer.name, name) for layer in layers(model) for name in layer.adapter_layer_names]
    expected = {f"base_model.model.{layer}.{name}.default" for layer, name in places}
    expected |= {name for name, _ in model.named_parameters() if "badit_gate.default" in name}
    assert trainable(model) == expected
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    hooks = model.base_model.before_update, model.base_model.after_update
    losses = take_steps(optimizer, 8, lambda: loss(model), *hooks)
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad.any() for name, p in model.named_parameters() if name in expected)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {
        name for name in changed if "badit_moments" not in name and "badit_batches" not in name
    } == expected


@by_family
@by_method
def test_save_and_load_round_trip(tiny_model, tmp_path, monkeypatch, method, family):
    model = adapted(tiny_model(family), method)
    expected = logits(model)
    settings = model.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
        == config(method).method
    )
    for low_memory in (False, True):
        with monkeypatch.context() as patch:
            for module in ("badit.baselines.mixture", "badit.tuner.config"):
                # Loading computes no decomposition.
                patch.setattr(f"{module}.top_singular_triples", None)
            loaded = PeftModel.from_pretrained(
                tiny_model(family), tmp_path, low_cpu_mem_usage=low_memory
            ).eval()
        assert torch.equal(logits(loaded), expected)
        assert all(
            torch.equal(value, loaded.state_dict()[name])
            for name, value in model.state_dict().items()
        )
        assert loaded.peft_config["default"].to_dict() == {**settings, "inference_mode": True}
        assert not trainable(loaded)
    assert trainable(
        PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    ) == trainable(model)


@by_family
@by_method
def test_disabled_or_unloaded_model_is_bit_identical_to_base_model(tiny_model, method, family):
    model = adapted(tiny_model(family), method, target_modules="all-linear")
    base = logits(tiny_model(family))
    expected = logits(model)
    assert not torch.equal(expected, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, rows=None), base)
        # Packed rows are accepted without gates.
        model(input_ids=IDS, position_ids=torch.zeros_like(IDS))
    assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    plain = tiny_model(family)
    assert torch.equal(logits(unloaded), base)
    assert [type(module) for module in unloaded.modules()] == [
        type(module) for module in plain.modules()
    ]
    assert_same(unloaded.state_dict(), plain.state_dict())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules()
    )
    assert "generate" not in vars(unloaded)
    assert torch.equal(logits(adapted(unloaded, method, target_modules="all-linear")), expected)


@by_method
def test_second_adapter_can_be_activated_and_deleted(tiny_model, method):
    model = adapted(tiny_model("llama"), method)
    first = logits(model)
    names = trainable(model)
    model.add_adapter("second", config(method))
    randomise(model, seed=1, adapter="second")
    assert torch.equal(logits(model), first)
    assert trainable(model) == names
    model.set_adapter("second")
    assert trainable(model) == {name.replace("default", "second") for name in names}
    assert not torch.equal(logits(model), first)
    model.set_requires_grad("second", False)
    assert not trainable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about the new active adapter
        model.delete_adapter("second")
    assert not [name for name in model.state_dict() if "second" in name]
    assert torch.equal(logits(model), first)
    assert trainable(model) == names


@by_method
def test_merge_mixed_adapters_and_unsupported_layers_are_refused(tiny_model, method):
    model = adapted(tiny_model("llama"), method)
    for merge in (model.merge_and_unload, model.merge_adapter, layers(model)[0].merge):
        refuses(r"no single weight to merge into; unload\(\) returns the base.*badit adopt", merge)
    refuses("have no weighted sum", model.add_weighted_adapter, ["default"], [1.0], "sum")
    name = config(method).method
    refuses(
        f"adapter_names: {name} cannot mix adapters",
        model,
        input_ids=IDS,
        adapter_names=["default"] * 3,
    )
    message = f"input_layernorm is a LlamaRMSNorm; {name} adapts .*: change target_modules"
    refuses(message, adapt, tiny_model("llama"), method, target_modules=["input_layernorm"])


@pytest.mark.parametrize("family", naive.FAMILIES)
@by_method
def test_padding_and_cache_do_not_change_outputs(tiny_model, method, family):
    """Outputs of a row are equal alone, in a batch and with a cache.

    With gates, they also equal teacher forcing.
    """
    model = adapted(tiny_model(family), method)
    together = logits(model).split([6, 11, 9])
    options = {"max_new_tokens": 4, "do_sample": False}
    batch = {"input_ids": IDS, "attention_mask": MASK, **options}
    with hooks_of(model).rows_of(ROWS):
        generated = model.generate(**batch)
        assert torch.equal(generated, model.generate(**batch, use_cache=False))
    if method in GATED:
        assert torch.equal(
            *(model.generate(**batch, num_beams=2, use_cache=cached) for cached in (True, False))
        )
        assert torch.equal(generated, greedy_by_hand(model, IDS, MASK, 4))
        generation = (
            generated,
            torch.cat([MASK, torch.ones(3, 4, dtype=torch.long)], dim=1),
            IDS.shape[1],
        )
        steps = cached_steps(model, *generation, DynamicCache(config=model.config))
        expected = teacher_forced(model, *generation)
        torch.testing.assert_close(steps, expected[:, IDS.shape[1] - 1 :], atol=1e-4, rtol=1e-4)
    for row, length in enumerate((6, 11, 9)):
        ids = IDS[row : row + 1, -length:]
        with hooks_of(model).rows_of(ROWS[row : row + 1]):
            torch.testing.assert_close(
                together[row], model(input_ids=ids).logits[0], atol=1e-4, rtol=1e-4
            )
            assert torch.equal(
                generated[row, -4:], model.generate(input_ids=ids, **options)[0, -4:]
            )


@pytest.mark.parametrize("reentrant", [True, False])
@by_method
def test_gradient_checkpointing_does_not_change_gradients(tiny_model, method, reentrant):
    """Re-entrant checkpointing is refused for gates outside the layers and for balance losses."""
    model = adapted(
        tiny_model("llama"), method, **({"balance_weight": 1.0} if method == "goat" else {})
    ).train()
    model.enable_input_require_grads()

    def backward():
        answer_loss = loss(model, use_cache=False)
        extra = model.base_model.extra_loss(MASK)
        (answer_loss if extra is None else answer_loss + extra).backward()
        assert not any(getattr(layer, "router_logits", None) for layer in layers(model))
        return gradients(model)

    start = copy.deepcopy(model.state_dict())
    expected = backward()
    assert expected.keys() == trainable(model)
    # A training pass updates the moments of a standardised router input.
    model.load_state_dict(start)
    helpers.enable_checkpointing(model, reentrant)
    if reentrant and method in (*GATED, "goat"):
        refuses("set use_reentrant=False", backward)
    else:
        torch.testing.assert_close(backward(), expected, atol=1e-6, rtol=1e-4)


@by_method
def test_bf16_base_model_round_trip_deepcopy_and_repeated_registration(
    tiny_model, tmp_path, method
):
    model = adapted(tiny_model("llama", dtype=torch.bfloat16), method)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "badit_" in name}
    assert {tensor.dtype for name, tensor in tensors.items() if "expert_of" not in name} == {
        torch.float32
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", dtype=torch.bfloat16), tmp_path).eval()
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    loss(model.train()).backward()  # leaves tensors with a graph, which cannot be copied
    model.eval()
    copied = copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(copied), expected)
    assert not torch.equal(logits(randomise(copied, seed=5)), expected)
    assert torch.equal(logits(model), expected)
    options = config(method)
    members = list(PeftType)
    register(type(options), type(model.base_model))  # a second registration changes nothing
    assert list(PeftType) == members
    assert options.peft_type is PeftType[options.method] is PeftType(options.method)
