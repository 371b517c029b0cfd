"""Every baseline as a recipe's method: options, errors, and a run from training to loading."""

import pytest
import torch
from peft import LoraConfig

from badit.baselines import BASELINES
from badit.recipe.loading import build_recipe
from badit.training.methods import AdapterMethod
from baselines.naive import SMALL, logits
from refusals import refuses
from steps import fit, load_run, method_of
from training.trainers import learned
from tuner.helpers import IDS

OPTIONS = {name: {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1} for name in BASELINES}
OPTIONS |= {
    name: {key: value for key, value in small.items() if key != "tasks"}
    for name, small in SMALL.items()
}
FROM_PEFT = [name for name, baseline in BASELINES.items() if baseline.config_cls is LoraConfig]
NOT_BELOW = "input should be greater than or equal to"


@pytest.mark.parametrize("name", BASELINES)
def test_loaded_run_matches_trained_model(recipe_values, monkeypatch, name):
    trained = []
    apply = AdapterMethod.apply
    monkeypatch.setattr(
        AdapterMethod, "apply", lambda *given: trained.append(apply(*given)) or trained[0]
    )
    recipe = build_recipe(
        {**recipe_values, "method": {"name": name, **OPTIONS[name]}}, ["training.save_steps=100"]
    )
    run = fit(recipe, progress=False)
    losses = run.metrics["loss"]
    assert losses[10] < losses[0]
    assert all("gate_proj" in key or "badit_gate" in key for key in learned(run))
    loaded, _ = load_run(run)
    assert torch.equal(logits(loaded, IDS % 60), logits(trained[0].eval(), IDS % 60))


def test_config_errors_are_one_line():
    for method, message in (
        (
            {"name": "hidralora"},
            r"unknown method 'hidralora' \(did you mean 'hydralora'\?\); known: badit, cluster-",
        ),
        ({"name": ["goat"]}, r"unknown method \['goat'\]"),
        (
            {"name": "pissa", "init_lora_weights": 1},
            r"init_lora_weights: is set by the method name pissa \(to pissa\)",
        ),
        (
            {"name": "lora", "init_lora_weights": "pissa_niter_4"},
            "init_lora_weights: pissa_niter is random",
        ),
        (
            {"name": "lora", "init_lora_weights": "eva"},
            "init_lora_weights: eva needs a pass over data",
        ),
        (
            {"name": "lora", "modules_to_save": "lm_head"},
            r"modules_to_save: must be a list, such as \[lm_head\]",
        ),
        (
            {"name": "loramoe", "num_expert": 4},
            r"num_expert: loramoe has no such option .* 'num_experts'\?\)",
        ),
        (
            {"name": "loramoe", "balance_weight": -1},
            rf"method.balance_weight: {NOT_BELOW} 0, got -1",
        ),
        (
            {"name": "mtl-lora", "temperature": 0},
            r"method.temperature: input should be greater than 0, got 0",
        ),
        ({"name": "o-lora", "num_experts": 2}, r"method\.num_experts: o-lora has no such option"),
        ({"name": "o-lora", "orthogonality_weight": -0.1}, rf"orthogonality_weight: {NOT_BELOW} 0"),
        ({"name": "sapt", "gate_hidden_size": 0}, rf"gate_hidden_size: {NOT_BELOW} 1"),
        ({"name": "goat", "rho": 0}, r"method.rho: input should be greater than 0, got 0"),
        (
            {"name": "goat", "top_k": None},
            r"method.top_k: input should be a valid integer, got None",
        ),
        (
            {"name": "goat", "r": 12},
            r"method.r = 12, GOAT's total rank, must be a multiple of num_experts = 8",
        ),
    ):
        refuses(message, method_of, method)


@pytest.mark.parametrize("name", FROM_PEFT)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_peft_baselines_adapt_first_mlp_projection_and_start_as_base_model(
    tiny_model, name, family
):
    method = method_of({"name": name, **OPTIONS[name], "fan_in_fan_out": family == "gpt2"})
    if (name, family) == ("olora", "gpt2"):
        refuses(
            r"olora cannot adapt this model's Conv1D layers.*use pissa instead",
            method.apply,
            tiny_model(family),
        )
        return
    model = method.apply(tiny_model(family)).eval()
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(("c_fc" if family == "gpt2" else "gate_proj") in key for key in trained)
    assert (logits(model) - logits(tiny_model(family))).abs().max() <= 1e-4
