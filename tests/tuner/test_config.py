"""Every option of BaditConfig does something, and a bad value is refused by a message that names its field."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from badit.errors import BaditError
from badit.tuner import BaditConfig
from badit.tuner import config as tuner_config
from tuner.helpers import adapt, adapted, config, layers, logits

SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")  # PEFT 0.21 and later
# What PEFT 0.19 wrongly says of models without a saved configuration.
SAYS_TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("num_experts", value) for value in (0, 2.0, True, "4", None)],
        ("r", 0),
        *[("lora_alpha", value) for value in (0, "32", None, True, float("nan"), float("inf"), 10**400)],
        *[("lora_dropout", value) for value in (-0.1, 1.0, "0.1", float("nan"))],
        ("svd_tolerance", 0),
        *[("top_k", value) for value in (0, 9, 1.5, True)],
        *[("init_weights", value) for value in ("pissa", 1, None, False)],
        *[("format_version", value) for value in (0, -1, True, None, "1", 1.0)],
        *[(name, "other") for name in ("routing", "router_input", "gates", "svd_method", "bias", "num_experts")],
    ],
)
def test_bad_values_are_refused(field, value):
    with pytest.raises(BaditError, match=rf"^{field} must be"):
        BaditConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"router_input": "standardised", "routing": "token"}, "needs routing='prompt'"),
        ({"target_modules": r".*gate_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": r".*gate_proj", "layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, field):
    with pytest.raises(BaditError, match=field):
        BaditConfig(**options)


def test_lora_dropout_is_active_in_training_only(tiny_model):
    model = adapted(tiny_model("llama"), lora_dropout=0.5)
    without = adapted(tiny_model("llama"), lora_dropout=0.0)
    assert torch.equal(logits(model), logits(without))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, ["0.self_attn.q", "0.mlp.down", "1.self_attn.q", "1.mlp.down"]),
        ({"target_modules": ("v_proj",)}, ["0.self_attn.v", "1.self_attn.v"]),
        ({"target_modules": r".*1\.mlp\.(gate|up)_proj"}, ["1.mlp.gate", "1.mlp.up"]),
        ({"exclude_modules": ["model.layers.1.mlp.gate_proj"]}, ["0.mlp.gate"]),
        ({"exclude_modules": r".*layers\.1\..*"}, ["0.mlp.gate"]),
        ({"target_modules": ["up_proj"], "layers_to_transform": 1}, ["1.mlp.up"]),
        ({"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, ["0.mlp.up"]),
    ],
    ids=str,
)
def test_which_modules_are_adapted(tiny_model, options, expected):
    model = adapt(tiny_model("llama"), **options)
    assert [layer.name for layer in layers(model)] == [f"model.layers.{name}_proj" for name in expected]


@SAYS_TIED
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens is a Embedding.*change target_modules"),
        ({"target_modules": ["no_such_layer"]}, "not found in the base model"),
        ({"r": 11}, r"layers\.0\.mlp\.gate_proj.*num_experts × r = 33.*lower num_experts or r"),
    ],
    ids=str,
)
def test_modules_that_cannot_be_adapted_are_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(tiny_model("llama"), **options)


@pytest.mark.parametrize("init_weights", [True, "bad", "lora"])
def test_init_weights(tiny_model, init_weights):
    base = tiny_model("llama")
    before, from_base = logits(base), init_weights != "lora"
    u, s, vh = torch.linalg.svd(base.model.layers[0].mlp.gate_proj.weight)
    model = adapt(base, init_weights=init_weights)
    layer = layers(model)[0]
    a, b = layer.badit_A["default"], layer.badit_B["default"]
    torch.testing.assert_close(2.0 * b @ a, from_base * u[:, :6] * s[:6] @ vh[:6], atol=1e-5, rtol=1e-4)
    assert a.any()
    assert not layer.badit_router["default"].any()
    assert ("default" in layer.badit_A0) == from_base
    assert (logits(model) - before).abs().max() <= (1e-5 if from_base else 0)


def test_svd_method_and_tolerance_reach_the_decomposition(tiny_model, monkeypatch):
    seen, real = [], tuner_config.top_singular_triples
    monkeypatch.setattr(tuner_config, "top_singular_triples", lambda *a, **k: seen.append(k) or real(*a, **k))
    adapt(tiny_model("llama"), svd_method="randomized", svd_tolerance=0.5)
    assert seen == 2 * [{"method": "randomized", "tolerance": 0.5}]


@pytest.mark.parametrize(
    ("bias", "trained"), [("none", set()), ("all", {"c_attn", "c_fc", "ln_1"}), ("badit_only", {"c_fc"})]
)
def test_bias(tiny_model, tmp_path, bias, trained):
    if bias != "none" and not SAVES_BIASES:
        with pytest.raises(BaditError, match=r"^bias must be 'none' with PEFT before 0\.21"):
            config(bias=bias)
        return
    model = adapted(tiny_model("gpt2"), bias=bias)
    found = {n: p for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}
    owners = {name.replace(".base_layer", "").split(".")[-2] for name in found}
    assert owners == trained if bias != "all" else owners > trained
    for parameter in found.values():
        parameter.data.add_(0.5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)), logits(model))


@SAYS_TIED
def test_modules_to_save(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"), modules_to_save=["lm_head"])
    head = [p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n]
    assert len(head) == 1
    assert head[0].requires_grad
    head[0].data.add_(0.5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model))
