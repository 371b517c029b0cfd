"""The demo on a tiny model, and the fairness of its budget on the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from badit import demo
from badit.cli import main
from badit.methods import build_method
from badit.recipe import build_recipe


def test_lora_and_badit_train_as_many_parameters(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    counts = {}
    for name in ("LoRA", "BADIT"):
        config = build_method(demo.METHODS[name]).config
        config.init_weights = "lora" if name == "BADIT" else None  # no need of singular vectors to count
        config.target_modules = {"gate_proj"}
        adapted = get_peft_model(model, config)
        counts[name], _ = adapted.get_nb_trainable_parameters()
        model = adapted.unload()
    assert counts["LoRA"] == pytest.approx(counts["BADIT"], rel=0.01)


def test_lora_has_badits_scaling() -> None:
    lora, badit = (build_method(demo.METHODS[name]).config for name in ("LoRA", "BADIT"))
    assert lora.lora_alpha / lora.r == badit.scaling
    assert lora.lora_dropout == badit.lora_dropout


def test_the_methods_differ_in_the_method_alone() -> None:
    recipes = [
        build_recipe(demo.demo_recipe(method, "x", 1.0, 0)).model_dump(exclude={"method"})
        for method in demo.METHODS.values()
    ]
    assert recipes[0] == recipes[1] == recipes[2]


def test_the_demo_shows_scores_budget_angles_and_samples(
    recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def tiny(method: dict[str, Any], output: str, epochs: float, seed: int) -> dict[str, Any]:
        training = {**recipe_values["training"], "num_train_epochs": epochs, "seed": seed}
        return {**recipe_values, "method": method, "training": training, "output": output}

    methods = {
        "base": {"name": "base"},
        "LoRA": {"name": "lora", "r": 8},
        "BADIT": {"name": "badit", "num_experts": 4, "r": 2, "regroup": {"every": 3}},
    }
    monkeypatch.setattr(demo, "METHODS", methods)
    monkeypatch.setattr(demo, "demo_recipe", tiny)
    output = str(tmp_path / "demo")
    assert main(["demo", "--output", output, "--epochs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "base Rouge-L" in shown
    assert "BADIT EM" in shown
    assert "trainable parameters" in shown
    assert "as decomposed (steps after 3)" in shown
    assert "regrouped (steps after 9)" in shown
    assert "[cities] land 12" in shown
    assert all(f"  {name:10} " in shown for name in ("reference", "base", "LoRA", "BADIT"))

    assert main(["demo", "--output", output, "--epochs", "2"]) == 0, "a second time shows it again"
    assert capsys.readouterr().out == shown
