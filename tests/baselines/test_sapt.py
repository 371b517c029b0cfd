"""SAPT's shared attention: its formula, what a new key takes from the others, and what stays."""

import numpy as np
import pytest
import torch

from baselines import naive
from baselines.naive import IDS, MASK, adapted, gate, layers, logits, loss


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_the_attention_equals_the_formula_and_sums_to_one(tiny_model, tasks):
    model = adapted(tiny_model("llama"), "sapt", tasks)
    prompts = model.base_model.prompt_embeddings(IDS, MASK)
    found = gate(model)(prompts).detach()
    assert found.shape == (3, tasks)
    for row, prompt in zip(found, prompts, strict=True):
        np.testing.assert_allclose(row, naive.weights("sapt", model, prompt), atol=1e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))
    assert (found > 0).all()


def test_one_task_is_plain_lora(tiny_model):
    """The softmax over one key is 1, and the gate has no gradient."""
    ours, plain = (adapted(tiny_model("llama"), method, tasks=1) for method in ("sapt", "o-lora"))
    for one, other in zip(layers(ours), layers(plain), strict=True):
        for name in ("badit_A", "badit_B"):
            getattr(one, name)["default"].data.copy_(getattr(other, name)["default"])
    torch.testing.assert_close(logits(ours), logits(plain))
    loss(ours).backward()
    loss(plain).backward()
    for one, other in zip(layers(ours), layers(plain), strict=True):
        torch.testing.assert_close(one.badit_B["default"].grad, other.badit_B["default"].grad)
    assert not any(parameter.grad.any() for parameter in gate(ours).parameters())


def test_a_new_key_takes_the_same_share_from_all_others(tiny_model):
    """What a layer adds is multiplied with 1 − a_t, and the earlier branches keep their proportions."""
    model = adapted(tiny_model("llama"), "sapt")
    prompts = model.base_model.prompt_embeddings(IDS, MASK)
    layer, added = layers(model)[0], []
    layer.register_forward_hook(lambda layer, args, y: added.append((y - layer.base_layer(args[0])).detach()))
    before = gate(model)(prompts).detach()
    logits(model)
    model.base_model.next_task()
    after = gate(model)(prompts).detach()
    logits(model)
    share = after[:, -1:]
    assert (share > 0.01).all()
    torch.testing.assert_close(after[:, :-1], (1 - share) * before)
    torch.testing.assert_close(added[1], (1 - share[..., None]) * added[0], atol=1e-5, rtol=1e-4)
