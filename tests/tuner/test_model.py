"""Adapters added, switched, deleted and taken off again: the base model is never the worse for it."""

import copy

import pytest
import torch

from tuner.helpers import FAMILIES, adapt, adapted, config, forward, layers, padded, random_rows, randomise

IDS, MASK = padded(random_rows(6, 11, 9))


def logits(model):
    with torch.no_grad():
        return forward(model, IDS, MASK).logits


def with_two(base, **second):
    model = adapted(base)
    model.add_adapter("second", config(**{"num_experts": 4, **second}))
    return randomise(model, "second", seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_switched_and_both_at_once_add_up(tiny_model, family):
    model = with_two(tiny_model(family))
    first = logits(model)
    torch.testing.assert_close(first, logits(adapted(tiny_model(family))))
    model.set_adapter("second")
    alone = randomise(adapt(tiny_model(family), num_experts=4), seed=1)
    torch.testing.assert_close(logits(model), logits(alone))
    layer, x = layers(model)[0], torch.randn(2, 5, 32)
    outputs = {}
    with torch.no_grad():
        for names in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(names)
            outputs[len(outputs)] = layer(x) - layer.get_base_layer()(x)
    torch.testing.assert_close(outputs[2], outputs[0] + outputs[1], atol=1e-4, rtol=1e-4)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if "second" in name]
    torch.testing.assert_close(logits(model), first)
    assert all(list(layer.badit_config) == list(layer.badit_expert_of) == ["default"] for layer in layers(model))


def test_both_at_once_decode_as_they_are_teacher_forced(tiny_model):
    from transformers import DynamicCache

    from tuner.helpers import cached_steps, teacher_forced

    model = with_two(tiny_model("llama"), routing="prompt")
    model.base_model.set_adapter(["default", "second"])
    forced = teacher_forced(model, IDS, MASK, 8)[:, 7:]
    assert torch.equal(MASK[:, 7], torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(cached_steps(model, IDS, MASK, 8, DynamicCache()), forced, atol=1e-4, rtol=1e-4)


def test_a_refused_adapter_leaves_no_configuration_behind(tiny_model):
    """Also where PEFT does not roll back itself, as when transformers adds an adapter to its own model."""
    tuner = adapted(tiny_model("llama")).base_model
    for name in ("second", "third"):
        tuner.peft_config[name] = config()
        tuner.peft_config[name].bias = "all"  # afterwards, since with PEFT before 0.21 the configuration refuses it
    with pytest.raises(ValueError, match="bias"):
        tuner.inject_adapter(tuner.model, "third")
    assert "third" not in tuner.peft_config


def test_a_deep_copy_is_independent(tiny_model):
    model = adapted(tiny_model("llama"))
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    randomise(copied, seed=5)
    changed = logits(copied)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model), expected)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "use_cache": False}
    tokens = copied.generate(**options)
    assert not torch.equal(model.generate(**options), tokens)
    unloaded = model.unload()
    assert not unloaded._forward_pre_hooks
    assert torch.equal(logits(copied), changed)
    assert torch.equal(copied.generate(**options), tokens)
    assert not copied.unload()._forward_pre_hooks
