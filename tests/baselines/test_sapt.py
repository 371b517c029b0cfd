"""SAPT's shared attention: its formula, what a new key takes from the others, and what stays."""

import numpy as np
import pytest
import torch

from baselines import naive
from baselines.naive import IDS, MASK, adapted, gate, layers, logits


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
