"""Options of BaditConfig take effect, and an invalid value is refused by its field's name."""

import re

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from badit.tuner import BaditConfig
from badit.tuner import config as tuner_config
from refusals import refuses
from tuner.helpers import adapt, adapted, config, layers, logits

INVALID = {
    "num_experts": (0, True, "4"),
    "r": (0,),
    "num_clusters": (0,),
    "lora_alpha": (0, "32", float("nan"), 10**400),
    "lora_dropout": (-0.1, 1.0),
    "svd_tolerance": (0,),
    "top_k": (0, 9),
    "format_version": (0, None, 1.0),
    **dict.fromkeys(
        ("init_weights", "routing", "router_input", "gates", "svd_method", "bias"), ("other",)
    ),
}
CONFLICTS = [
    ("router_input: 'standardised' needs", {"router_input": "standardised", "routing": "token"}),
    ("gates: 'clusters' needs", {"gates": "clusters", "routing": "token"}),
    ("gates: 'clusters' needs", {"gates": "clusters", "router_input": "mean"}),
    ("gates: 'clusters' needs", {"gates": "clusters", "top_k": 1}),
    ("layers_to_transform", {"target_modules": r".*gate_proj", "layers_to_transform": [0]}),
    ("layers_to_transform", {"target_modules": "all-linear", "layers_to_transform": [0]}),
    ("layers_pattern", {"layers_pattern": "layers"}),
]


@pytest.mark.parametrize("field", INVALID)
def test_invalid_values_are_refused(field):
    for value in INVALID[field]:
        refuses(f"^{field}: input should be", BaditConfig, **{field: value})


@pytest.mark.parametrize(("message", "options"), CONFLICTS)
def test_conflicting_options_are_refused(message, options):
    refuses(message, BaditConfig, **options)


def test_default_gates_are_clusters_where_possible():
    routed = {
        "routing": "token",
        "router_input": "mean",
        "top_k": 2,
        "gated": "factors",
        "num_experts": 1,
    }
    routed["target_parameters"] = ["experts.down_proj"]
    assert {BaditConfig(**{name: value}).gates for name, value in routed.items()} == {"mean_one"}
    assert BaditConfig().gates == "clusters"
    assert BaditConfig(init_weights="directions").gates == "clusters"
    assert BaditConfig(init_weights="lora", gated="factors").gates == "clusters"
    assert BaditConfig().router_input == "standardised"
    assert BaditConfig(routing="token").router_input == "mean"


def test_lora_dropout_is_active_in_training_only(tiny_model):
    model = adapted(tiny_model("llama"), lora_dropout=0.5)
    assert torch.equal(logits(model), logits(adapted(tiny_model("llama"))))
    assert not torch.equal(logits(model.train()), logits(model))


def test_module_options_select_the_adapted_layers(tiny_model):
    for options, expected in (
        (
            {"target_modules": ("q_proj", "down_proj")},
            ["0.self_attn.q", "0.mlp.down", "1.self_attn.q", "1.mlp.down"],
        ),
        ({"target_modules": r".*1\.mlp\.(gate|up)_proj"}, ["1.mlp.gate", "1.mlp.up"]),
        ({"exclude_modules": ["model.layers.1.mlp.gate_proj"]}, ["0.mlp.gate"]),
        ({"exclude_modules": r".*layers\.1\..*"}, ["0.mlp.gate"]),
        ({"target_modules": ["up_proj"], "layers_to_transform": 1}, ["1.mlp.up"]),
        (
            {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            ["0.mlp.up"],
        ),
    ):
        model = adapt(tiny_model("llama"), **options)
        assert [layer.name for layer in layers(model)] == [
            f"model.layers.{name}_proj" for name in expected
        ], options


def test_svd_method_and_tolerance_are_passed_to_the_decomposition(tiny_model, monkeypatch):
    seen = []
    real = tuner_config.top_singular_triples
    monkeypatch.setattr(
        tuner_config, "top_singular_triples", lambda *a, **k: seen.append(k) or real(*a, **k)
    )
    adapt(tiny_model("llama"), svd_method="randomized", svd_tolerance=0.5)
    assert seen == 2 * [{"method": "randomized", "tolerance": 0.5}]


# PEFT 0.19 emits this warning wrongly for models without a saved configuration.
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"
)
@pytest.mark.parametrize(
    ("family", "options", "trained"),
    [
        ("gpt2", {"bias": "all"}, {"c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"}),
        ("gpt2", {"bias": "badit_only"}, {"c_fc"}),
        ("llama", {"modules_to_save": ["lm_head"]}, {"lm_head"}),
    ],
)
def test_biases_and_modules_to_save_are_trainable_and_saved(
    tiny_model, tmp_path, family, options, trained
):
    # PEFT before 0.21 saves no trained biases.
    if "bias" in options and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
        refuses(r"^bias must be 'none' with PEFT before 0\.21", config, **options)
        return
    model = adapted(tiny_model(family), **options)
    trained_parameters = {
        n: p for n, p in model.named_parameters() if p.requires_grad and "badit_" not in n
    }
    assert {
        re.sub(r"\.(base_layer|modules_to_save\.default)", "", name).split(".")[-2]
        for name in trained_parameters
    } == trained
    for parameter in trained_parameters.values():
        parameter.data.add_(0.5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), logits(model)
    )
