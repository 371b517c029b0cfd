"""PEFT's features for any method: registration, several adapters, copies, ways of loading."""

import copy

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from badit.tuner import BaditConfig, BaditModel, hooks_of
from badit.tuner.model import register
from refusals import refuses
from tuner.helpers import (
    CLUSTERS,
    FAMILIES,
    IDS,
    MASK,
    adapt,
    adapted,
    config,
    generate,
    layers,
    logits,
    randomise,
)

# With PEFT 0.19, transformers 5.24 cannot load any adapter into GPT-2, not even LoRA.
LOADED_BY_TRANSFORMERS = [
    family for family in FAMILIES if not (peft.__version__.startswith("0.19.") and family == "gpt2")
]


def test_name_registered_by_another_package_is_refused(monkeypatch):
    foreign = type("ForeignConfig", (), {"__module__": "elsewhere.config"})
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, config().peft_type, foreign)
    refuses(
        r"'badit' is already registered by elsewhere\.config; uninstall",
        register,
        BaditConfig,
        BaditModel,
    )


@pytest.mark.parametrize(("family", "second_module"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_adapters_are_switched_saved_separately_and_added(
    tiny_model, tmp_path, family, second_module
):
    model = adapted(tiny_model(family))
    target = layers(model)[0].name.rpartition(".")[2]
    other = {"num_experts": 4, "target_modules": [target, second_module]}
    model.add_adapter("second", config(**other))
    randomise(model, "second", seed=1)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    seconds_own = randomise(adapt(tiny_model(family), **other), seed=1)
    for name, alone in (("second", seconds_own), ("default", adapted(tiny_model(family)))):
        for switched in (model, loaded):
            switched.set_adapter(name)
            torch.testing.assert_close(logits(switched), logits(alone))
    layer = next(switched for switched in layers(model) if switched.name.endswith(target))
    x = torch.randn(2, 5, 32)
    added = []
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        added.append(layer(x) - layer.get_base_layer()(x))
    torch.testing.assert_close(added[2], added[0] + added[1], atol=1e-4, rtol=1e-4)


def test_refused_adapter_leaves_no_configuration(tiny_model):
    """Also if PEFT does not roll back, as when transformers adds an adapter to its own model."""
    tuner = adapted(tiny_model("llama")).base_model
    tuner.peft_config["second"] = tuner.peft_config["third"] = shared = config()
    shared.bias = "all"  # set later, because with PEFT before 0.21 the configuration refuses it
    with pytest.raises(ValueError, match="bias"):
        tuner.inject_adapter(tuner.model, "third")
    assert list(tuner.peft_config) == ["default", "second"]


@pytest.mark.filterwarnings("ignore:.*(second time|multiple adapters):UserWarning")
def test_second_call_on_a_base_replaces_an_adapter_of_the_method_only(tiny_model):
    base = tiny_model("llama")
    adapt(base, gates="mean_one")
    assert adapt(base).state_dict().keys() == adapt(tiny_model("llama")).state_dict().keys()
    of_lora = get_peft_model(tiny_model("llama"), LoraConfig()).base_model.model
    refuses("another method's adapter", adapt, of_lora, target_modules=["q_proj"])


def test_reference_of_a_preference_loss_is_a_copy_of_the_default_adapter(tiny_model):
    """TRL adds "ref" with the configuration of "default"; clusters may be found before or after."""
    model = adapt(tiny_model("llama"), **CLUSTERS)
    random_state = torch.get_rng_state()
    model.add_adapter("ref", model.peft_config["default"])
    assert torch.equal(torch.get_rng_state(), random_state)
    hooks_of(model).start_task({"all": [{"input_ids": IDS, "attention_mask": MASK}]})
    tensors = {name: value for name, value in model.state_dict().items() if "badit_" in name}
    copies = {name.removesuffix("ref"): value for name, value in tensors.items() if "ref" in name}
    for name, value in tensors.items():
        if name.endswith("default"):
            torch.testing.assert_close(copies[name.removesuffix("default")], value, rtol=0, atol=0)
    assert layers(model)[0].badit_batches["ref"] == 1
    randomise(model)
    assert not torch.equal(*layers(model)[0].badit_codes.values())


def test_deep_copy_is_independent(tiny_model):
    """Covers ``generate`` and hooks; tests/baselines/test_models.py covers tensors."""
    model = adapted(tiny_model("llama"))
    copied = randomise(copy.deepcopy(model), seed=5)
    changed = logits(copied)
    tokens = generate(copied, IDS, MASK, use_cache=False)
    assert not torch.equal(generate(model, IDS, MASK, use_cache=False), tokens)
    assert not model.unload()._forward_pre_hooks
    assert torch.equal(logits(copied), changed)
    assert torch.equal(generate(copied, IDS, MASK, use_cache=False), tokens)
    assert not copied.unload()._forward_pre_hooks


def test_unload_restores_the_models_own_generate(tiny_model):
    base = tiny_model("llama")
    base.generate = own_generate = lambda *args, **kwargs: "own"
    model = adapted(base)
    assert base.generate is not own_generate
    for layer in layers(model):
        layer.forward = layer.forward  # as accelerate's hooks do
    assert model.unload().generate is own_generate


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"
)
def test_adapter_on_a_tied_head_does_not_change_the_embedding(tiny_model, tmp_path):
    base = tiny_model("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    embedding = base.transformer.wte.weight.detach().clone()
    model = adapted(base, target_modules=["lm_head"])
    expected = logits(model)
    assert torch.equal(base.transformer.wte.weight, embedding)
    assert (expected - logits(tiny_model("gpt2"))).abs().max() > 0.1
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)), expected
    )


@pytest.mark.parametrize("family", LOADED_BY_TRANSFORMERS)
def test_auto_class_and_transformers_load_adapter_give_the_same_model(tiny_model, tmp_path, family):
    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    tiny_model(family).save_pretrained(base)
    model = adapted(type(tiny_model(family)).from_pretrained(base))
    for _ in range(2):
        model.save_pretrained(str(adapter))
    assert (adapter / "README.md").read_text().count(
        "`pip install badit`, and `import badit.tuner`"
    ) == 1
    expected = logits(model)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)
    plain = tiny_model(family)
    plain.load_adapter(str(adapter))
    torch.testing.assert_close(logits(plain), expected)
    tokens = generate(model, IDS, MASK)
    assert torch.equal(generate(plain, IDS, MASK), tokens)
    # These are not calls of PeftModel.generate; without a cache, the answer must still not affect
    # the routing.
    assert torch.equal(generate(plain, IDS, MASK, use_cache=False), tokens)
    assert torch.equal(generate(model.get_base_model(), IDS, MASK, use_cache=False), tokens)
    # Not with disable_adapters(), which in transformers 5.24 requires an unreleased PEFT.
    for layer in layers(plain):
        layer.enable_adapters(False)
    assert torch.equal(logits(plain), logits(tiny_model(family)))


def test_a_model_that_is_not_of_transformers_is_trained_by_default():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = nn.Embedding(100, 16)
            self.up = nn.Linear(16, 16)
            self.head = nn.Linear(16, 100)

        def forward(self, input_ids, labels=None):
            return self.head(self.up(self.embeddings(input_ids)).relu())

    model = get_peft_model(Plain(), BaditConfig(target_modules=["up"], num_experts=4, r=2))
    batch = {"input_ids": IDS, "labels": IDS.where(MASK.cumsum(dim=1) > 3, -100)}
    hooks_of(model).start_task({"all": [batch]})
    assert model.train()(**batch).isfinite().all()


def test_clusters_of_another_adapter_leave_the_reference_as_it_is(tiny_model):
    model = adapt(tiny_model("llama"), **CLUSTERS)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    model.add_adapter("ref", model.peft_config["default"])
    hooks_of(model).start_task({"all": [batch]})
    before = [layer.badit_B["ref"].clone() for layer in layers(model)]
    randomise(model)  # as training does
    model.add_adapter("second", config(**CLUSTERS))
    model.set_adapter("second")
    hooks_of(model).start_task({"all": [batch]})
    for layer, factor in zip(layers(model), before, strict=True):
        assert torch.equal(layer.badit_B["ref"], factor)
