"""O-LoRA: its penalty, and one task of it as plain LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from baselines import naive
from baselines.naive import MASK, adapt, adapted, layers, logits, loss, trainable


@pytest.mark.parametrize("tasks", [2, 4])
def test_the_penalty_equals_the_naive_sum(tiny_model, tasks):
    model = adapted(tiny_model("llama"), "o-lora", tasks, orthogonality_weight=0.3, target_modules="all-linear")
    expected = 0.3 * sum(naive.penalty(layer) for layer in layers(model))
    found = model.base_model.extra_loss(MASK)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name in trainable(model) if "badit_A" in name}
    with model.disable_adapter():
        assert model.base_model.extra_loss(MASK) is None
    assert adapt(tiny_model("llama"), "o-lora").base_model.extra_loss(MASK) is None, "the first task has none"
    assert adapted(tiny_model("llama"), "o-lora", orthogonality_weight=0).base_model.extra_loss(MASK) is None


def test_one_task_is_plain_lora(tiny_model):
    ours = adapted(tiny_model("llama"), "o-lora", tasks=1)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model("llama"), lora).eval()
    with torch.no_grad():
        for layer in layers(ours):
            other = theirs.get_submodule(f"base_model.model.{layer.name}")
            other.lora_A["default"].weight.copy_(layer.badit_A["default"])
            other.lora_B["default"].weight.copy_(layer.badit_B["default"])
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    loss(ours).backward()
    loss(theirs).backward()
    for layer in layers(ours):
        other = theirs.get_submodule(f"base_model.model.{layer.name}")
        for one, two in ((layer.badit_A, other.lora_A), (layer.badit_B, other.lora_B)):
            torch.testing.assert_close(one["default"].grad, two["default"].weight.grad, atol=1e-6, rtol=1e-4)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
