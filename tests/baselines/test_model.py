"""The mixtures in whole models: training, saving, switching, and leaving no trace."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PeftType

from badit.baselines import BASELINES
from badit.baselines.mixture import MixtureModel
from badit.errors import BaditError
from badit.tuner.model import register
from baselines.naive import MIXTURES, adapt, adapted, config, layers, randomise
from tuner.helpers import enable_checkpointing, forward, padded, random_rows

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - :UserWarning")  # PEFT 0.19

FAMILIES = ("llama", "gpt2", "gemma2")
IDS, MASK = padded(random_rows(6, 11, 9))


def logits(model):
    with torch.no_grad():
        return forward(model, IDS, MASK).logits


def loss(model, **options):
    return forward(model, IDS, MASK, labels=IDS.masked_fill(MASK == 0, -100), **options).loss


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rival", MIXTURES)
def test_where_it_goes_and_step_0(tiny_model, rival, family):
    model, base = adapt(tiny_model(family), rival), logits(tiny_model(family))
    target = "transformer.h.{}.mlp.c_fc" if family == "gpt2" else "model.layers.{}.mlp.gate_proj"
    assert [layer.name for layer in layers(model)] == [target.format(i) for i in range(2)]
    if rival == "goat":
        difference = (logits(model) - base)[MASK.bool()].norm() / base[MASK.bool()].norm()
        assert 1e-3 < difference < 0.3
    else:
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rival", MIXTURES)
def test_training_changes_A_B_and_router_and_nothing_else(tiny_model, rival, family):
    model = adapt(tiny_model(family), rival).train()
    expected = {
        f"base_model.model.{layer.name}.badit_{part}.default"
        for layer in layers(model)
        for part in ("A", "B", "router")
    }
    assert trainable(model) == expected
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad.any() for name, p in model.named_parameters() if name in expected)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rival", MIXTURES)
def test_saved_and_loaded(tiny_model, tmp_path, monkeypatch, rival, family):
    model = adapted(tiny_model(family), rival)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == f"BADIT_{rival.upper()}"
    for low_memory in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr("badit.baselines.goat.top_singular_triples", None)  # no need of it to load
            loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(logits(loaded), expected)
        assert loaded.peft_config["default"].to_dict() == {
            **model.peft_config["default"].to_dict(), "inference_mode": True
        }  # fmt: skip
        assert not trainable(loaded)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model)


@pytest.mark.parametrize("rival", MIXTURES)
def test_loaded_by_the_auto_class(tiny_model, tmp_path, rival):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = adapted(type(tiny_model("llama")).from_pretrained(tmp_path / "base"), rival)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rival", MIXTURES)
def test_disabled_and_unloaded_it_is_the_base_model_to_the_bit(tiny_model, rival, family):
    model, base = adapted(tiny_model(family), rival, target_modules="all-linear"), logits(tiny_model(family))
    expected = logits(model)
    assert not torch.equal(expected, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), base)
    plain = tiny_model(family)
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in plain.modules()]
    for one, other in zip(unloaded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rival", MIXTURES)
def test_a_second_adapter_is_switched_to_and_deleted(tiny_model, rival):
    model = adapted(tiny_model("llama"), rival)
    first = logits(model)
    model.add_adapter("second", config(rival))
    randomise(model, seed=1, adapter="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if "second" in name]
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("rival", MIXTURES)
def test_what_it_cannot_do_is_refused(tiny_model, rival):
    model = adapted(tiny_model("llama"), rival)
    for merge in (model.merge_and_unload, model.merge_adapter, layers(model)[0].merge):
        with pytest.raises(BaditError, match=r"no single weight to merge into; keep it as an adapter \(unload\(\)"):
            merge()
    with pytest.raises(BaditError, match=f"adapter_names: BADIT_{rival.upper()} cannot mix adapters"):
        model(input_ids=IDS, adapter_names=["default"] * 3)
    with pytest.raises(BaditError, match=f"RMSNorm; BADIT_{rival.upper()} adapts nn.Linear and Conv1D"):
        adapt(tiny_model("llama"), rival, target_modules=["input_layernorm"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rival", MIXTURES)
def test_padding_and_the_cache_change_nothing(tiny_model, rival, family):
    """Gates are per position, so a row alone, a row in a batch and a decoded row agree."""
    model = adapted(tiny_model(family), rival)
    together = logits(model)
    for row, length in enumerate((6, 11, 9)):
        alone = model(input_ids=IDS[row : row + 1, -length:]).logits
        torch.testing.assert_close(together[row, -length:], alone[0], atol=1e-4, rtol=1e-4)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rival", MIXTURES)
def test_gradient_checkpointing_changes_no_gradient(tiny_model, rival, reentrant):
    found = []
    for checkpoint in (False, True):
        model = adapted(tiny_model("llama"), rival).train()
        model.enable_input_require_grads()
        if checkpoint:
            enable_checkpointing(model, reentrant)
        loss(model, use_cache=False).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rival", MIXTURES)
def test_a_bf16_base_model(tiny_model, tmp_path, rival):
    model = adapted(tiny_model("llama", dtype=torch.bfloat16), rival)
    assert {p.dtype for name, p in model.named_parameters() if "badit_" in name} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", dtype=torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_copies_and_names(tiny_model):
    model = adapted(tiny_model("llama"), "goat")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert "badit.MixtureLinear" in repr(model)
    for rival in MIXTURES:
        config_cls = BASELINES[rival].config_cls
        register(config_cls, MixtureModel)  # again, which changes nothing
        assert config_cls().peft_type is PeftType[f"BADIT_{rival.upper()}"]
