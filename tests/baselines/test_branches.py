"""Baselines with one branch per task in whole models."""

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import reference
from badit.analysis.gates import read_gates
from badit.baselines.branches import mean_embedding
from badit.support.files import read_json, write_json
from baselines import naive
from baselines.naive import (
    BRANCHES,
    FAMILIES,
    GATED,
    adapt,
    adapted,
    config,
    gate,
    logits,
    loss,
    randomise,
    trainable,
)
from refusals import refuses
from tuner.helpers import IDS, MASK, cache_name, gradients, layers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("method", BRANCHES)
def test_forward_matches_loop_over_branches(tiny_model, method, tasks, family):
    model = adapted(tiny_model(family, dtype=torch.float64), method, tasks).double()
    seen = {}
    for layer in layers(model):
        layer.register_forward_hook(
            lambda layer, args, y: seen.update({layer: (args[0].detach(), y.detach())})
        )
    logits(model)
    embeddings = model.get_input_embeddings()(IDS)
    prompts = reference.prompt_mean(embeddings, MASK)
    np.testing.assert_allclose(mean_embedding(embeddings, MASK), prompts, atol=1e-6)
    for row, prompt in enumerate(prompts):
        a = naive.weights(method, model, prompt)
        prompted = MASK[row].bool()
        assert len(a) == tasks
        for layer, (x, y) in seen.items():
            expected = naive.branch_forward(layer, x[row, prompted], a)
            np.testing.assert_allclose(y[row, prompted], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", BRANCHES)
def test_next_task_reinitialises_the_branch_and_keeps_the_output(
    tiny_model, tmp_path, method, family
):
    model = randomise(adapt(tiny_model(family), method))
    original = model.peft_config["default"]
    for _ in range(2):
        before = logits(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        model.base_model.next_task()
        for layer in layers(model):
            assert not layer.badit_B["default"].any()
            spread = (3 * layer.weight_OI.shape[1]) ** -0.5
            assert layer.badit_A["default"].std().item() == pytest.approx(spread, rel=0.3)
        assert [*map(id, parameters)] == [id(p) for p in model.parameters() if p.requires_grad]
        if method != "sapt":  # SAPT's new key scales the other weights: see below
            torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
        randomise(model, seed=5)
        assert (logits(model) - before).abs().max() > 1e-2
    assert (original.past_branches, model.peft_config["default"].past_branches) == (0, 2)
    write_json(tmp_path / "gates.json", {layer.name: [1.0, 0.5, 0.0] for layer in layers(model)})
    assert read_gates(tmp_path / "gates.json", model), "each branch has a gate"
    model.add_adapter("ref", model.peft_config["default"])  # as TRL copies the adapter
    for tensor in ("past_keys", "key") if method != "o-lora" else ():
        assert torch.equal(
            *(getattr(model.base_model.badit_gate[name], tensor) for name in ("default", "ref"))
        )


@pytest.mark.parametrize("method", BRANCHES)
def test_loaded_adapter_continues_with_next_task_like_the_original(tiny_model, tmp_path, method):
    model = adapted(tiny_model("llama"), method)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert "num_experts" not in read_json(tmp_path / "adapter_config.json")
    renamed = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path, adapter_name="other", is_trainable=True
    ).eval()
    trained = trainable(model)
    assert trainable(renamed) == {name.replace("default", "other") for name in trained}
    model.load_adapter(tmp_path, "for_inference")
    assert trainable(model) in (trained, set()), (
        "the gate is trained like the factors, which PEFT 0.19 freezes"
    )
    model.delete_adapter("for_inference")
    for adapted_model in (model, renamed):
        torch.manual_seed(3)
        adapted_model.base_model.next_task()
        adapter = next(iter(adapted_model.peft_config))
        assert adapted_model.peft_config[adapter].past_branches == 3
        assert layers(adapted_model)[0].badit_config[adapter] is adapted_model.peft_config[adapter]
        randomise(adapted_model, adapter=adapter)
    assert torch.equal(logits(renamed), logits(model))
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", GATED)
def test_gates_do_not_propagate_gradients_to_embeddings(tiny_model, method):
    model = adapted(tiny_model("llama"), method)
    seen_gates = []
    table = model.get_input_embeddings().weight.requires_grad_(True)
    layers(model)[0].register_forward_pre_hook(
        lambda layer, args: seen_gates.append(layer.gates("default", args[0])[:, 0])
    )
    loss(model)
    down, embeddings = torch.autograd.grad(
        seen_gates[0][:, -1].sum(), [gate(model).down, table], allow_unused=True
    )
    assert down.any()
    assert embeddings is None


@pytest.mark.parametrize("method", GATED)
def test_forward_without_gates_and_unsuitable_models_are_refused(tiny_model, method):
    model = adapted(tiny_model("llama"), method)
    embeddings = model.get_input_embeddings()(IDS)
    name = cache_name(model)
    with model.disable_adapter():
        without = model(input_ids=IDS, use_cache=True)[name]
    of_two = model(input_ids=IDS, use_cache=True)[name]
    of_two.batch_select_indices(torch.tensor([0, 1]))
    for pass_ in (
        lambda: model(inputs_embeds=embeddings),
        lambda: model.get_base_model().model(input_ids=IDS),
        lambda: model(input_ids=IDS[:, :1], **{name: without}),
        lambda: model(input_ids=IDS[:2, :1], **{name: of_two}),
    ):
        refuses(r"gate_proj: there are no gates for an input of shape \(.*input_ids", pass_)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    for other, target in (
        (T5ForConditionalGeneration(T5Config(**sizes)), "wo"),
        (nn.Sequential(nn.Linear(4, 4)), "0"),
    ):
        of_other = config(method, target_modules=[target], task_type=None)
        refuses("is for decoder-only language models", get_peft_model, other, of_other)
    saved = {"modules_to_save": ["embed_tokens"]}
    refuses("modules_to_save: remove the embeddings", adapt, tiny_model("llama"), method, **saved)


def test_o_lora_works_without_token_embeddings():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), config("o-lora", target_modules=["0"], task_type=None)
    )
    x = torch.randn(3, 4)
    randomise(model)
    first = model(x)
    model.base_model.next_task()
    torch.testing.assert_close(model(x), first)
    model.base_model.end_task({})


@pytest.mark.parametrize("tasks", [2, 4])
def test_orthogonality_penalty_matches_naive_sum(tiny_model, tasks):
    model = adapted(
        tiny_model("llama"), "o-lora", tasks, orthogonality_weight=0.3, target_modules="all-linear"
    )
    factors = [
        [reference.float64(of["default"]) for of in (layer.badit_A_past, layer.badit_A)]
        for layer in layers(model)
    ]
    expected = 0.3 * sum(
        abs(row @ other) for past, current in factors for row in past for other in current
    )
    penalty = model.base_model.extra_loss(MASK)
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert gradients(model).keys() == {name for name in trainable(model) if "badit_A" in name}
    with model.disable_adapter():
        assert model.base_model.extra_loss(MASK) is None
    assert adapt(tiny_model("llama"), "o-lora").base_model.extra_loss(MASK) is None, (
        "the first task has no penalty"
    )
    assert (
        adapted(tiny_model("llama"), "o-lora", orthogonality_weight=0).base_model.extra_loss(MASK)
        is None
    )


def test_new_key_scales_all_other_weights_equally(tiny_model):
    """The weights of the earlier branches keep their ratios."""
    model = adapted(tiny_model("llama"), "sapt")
    prompts = mean_embedding(model.get_input_embeddings()(IDS), MASK)
    before = gate(model)(prompts).detach()
    model.base_model.next_task()
    after = gate(model)(prompts).detach()
    assert (after[:, -1:] > 0.01).all()
    torch.testing.assert_close(after[:, :-1], (1 - after[:, -1:]) * before)
