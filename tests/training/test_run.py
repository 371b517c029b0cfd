"""A run from recipe to scores on a tiny model: its folder, its resuming, its refusals."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from badit.errors import BaditError
from badit.evaluate import answers, evaluate
from badit.evaluate import train_and_score as train
from badit.methods import AdapterMethod
from badit.recipe import build_recipe
from badit.run import Run
from badit.train import make_plan
from training.trainers import StopAt

# badit.train is the function of that name.
train_module = import_module("badit.train")
Values = dict[str, Any]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_all_its_files(recipe_values: Values) -> None:
    recipe = build_recipe(recipe_values)
    scores = train(recipe, progress=False)
    run = Run.existing(recipe.output)
    assert json.loads(run.scores_path.read_text()) == scores
    assert set(scores["tasks"]) == {"cities", "rivers"}
    assert {"rouge_l", "rouge_l_instances", "exact_match"} <= scores.keys()
    assert {file.name for file in run.predictions_path.iterdir()} == {"cities.jsonl", "rivers.jsonl"}
    assert run.trusted_recipe() == recipe
    environment = json.loads(run.environment_path.read_text())
    assert environment["training"]["steps"] == 12
    assert environment["packages"]["torch"] == version("torch")
    steps = [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()]
    assert steps == [*range(1, 13)]
    assert run.regroupings_path.read_text().count("\n") == 2 * 3
    assert {file.suffix for file in run.adapter_path.iterdir()} == {".safetensors", ".json", ".md"}
    assert "| mean over tasks |" in (run.adapter_path / "README.md").read_text()
    config = json.loads((run.adapter_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.model.name
    assert not list(run.path.glob("*.partial"))


def test_a_finished_run_is_not_done_again(recipe_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build_recipe(recipe_values)
    scores = train(recipe, progress=False)
    monkeypatch.setattr(train_module, "load_base_model", lambda *a, **k: pytest.fail("loaded a model"))
    assert train(recipe, progress=False) == scores


def test_a_resumed_run_keeps_the_dtype_that_it_began_in(recipe_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build_recipe(recipe_values, ["model.dtype=fast"])
    dtypes = []
    apply = AdapterMethod.apply
    monkeypatch.setattr(
        AdapterMethod, "apply", lambda self, model, tasks: (dtypes.append(model.dtype), apply(self, model, tasks))[1]
    )
    monkeypatch.setattr(train_module, "slowdown", lambda dtype: 36.0)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterMethod, "callbacks", lambda self, run: [StopAt(5)])
        with pytest.raises(KeyboardInterrupt):
            train(recipe, progress=False)
    monkeypatch.setattr(train_module, "slowdown", lambda dtype: 0.6)
    train(recipe, progress=False)
    assert dtypes[:2] == [torch.float32] * 2
    assert json.loads(Run(recipe.output).environment_path.read_text())["dtype"] == "float32"


def test_another_recipes_folder_is_refused(recipe_values: Values) -> None:
    train(build_recipe(recipe_values), progress=False)
    other = build_recipe(recipe_values, ["training.num_train_epochs=3"])
    with pytest.raises(BaditError, match=r"differs in training\.num_train_epochs"):
        train(other, progress=False)


def test_a_folder_of_something_else_is_refused(recipe_values: Values, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(BaditError, match="not a run's folder"):
        train(build_recipe(recipe_values), progress=False)


@pytest.mark.parametrize(
    "method", [{"name": "lora", "r": 8}, {"name": "badit", "num_experts": 4, "r": 2, "regroup": None}]
)
def test_other_methods(recipe_values: Values, method: Values, tmp_path: Path) -> None:
    train(build_recipe({**recipe_values, "method": method}), progress=False)
    tensors = adapter_of(tmp_path / "run")
    assert not (tmp_path / "run" / "regroupings.jsonl").exists()
    if method["name"] == "lora":
        assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
        assert all("gate_proj" in name for name in tensors)
    else:
        labels = [tensor.tolist() for name, tensor in tensors.items() if "expert_of" in name]
        assert labels == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2


def test_the_base_model_is_scored_without_training(recipe_values: Values, tmp_path: Path) -> None:
    scores = train(build_recipe({**recipe_values, "method": {"name": "base"}}), progress=False)
    assert set(scores["tasks"]) == {"cities", "rivers"}
    assert not (tmp_path / "run" / "adapter").exists()
    assert evaluate(tmp_path / "run", progress=False) == scores


def test_the_validation_split_is_scored_apart(recipe_values: Values, tmp_path: Path) -> None:
    recipe = build_recipe(recipe_values, ["data.validation_per_task=2"])
    test_scores = train(recipe, progress=False)
    validation = evaluate(tmp_path / "run", split="validation", progress=False)
    assert validation["tasks"]["cities"]["instances"] == 2
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == test_scores
    assert json.loads((tmp_path / "run" / "scores-validation.json").read_text()) == validation


def test_an_answer_to_a_prompt(recipe_values: Values, tmp_path: Path) -> None:
    train(build_recipe(recipe_values), progress=False)
    run = Run.existing(tmp_path / "run")
    asked = ["Name the capital.", "Name the river of land 3, and no other one."]
    found = answers(run, asked, max_new_tokens=3)
    assert found == [answer for prompt in asked for answer in answers(run, [prompt], max_new_tokens=3)]
    assert any(found)
    with pytest.raises(BaditError, match="prompt is empty"):
        answers(run, ["Name the capital.", " \n"])


def test_a_damaged_adapter_is_named(recipe_values: Values, tmp_path: Path) -> None:
    train(build_recipe(recipe_values), progress=False)
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    # Copies, since the loaded tensors are the file's own pages, which the next line cuts off.
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}

    weights.write_bytes(b"cut short")
    with pytest.raises(BaditError, match=r"adapter_model\.safetensors: cannot be loaded"):
        evaluate(tmp_path / "run", progress=False)

    save_file({**tensors, "base_model.model.model.layers.7.badit_A": torch.zeros(2)}, weights)
    with pytest.raises(BaditError, match=r"belongs to another base model or method, with a tensor .*layers\.7"):
        evaluate(tmp_path / "run", progress=False)

    save_file({name: torch.zeros_like(t) if "expert_of" in name else t for name, t in tensors.items()}, weights)
    with pytest.raises(BaditError, match=r"does not give each of the 4 experts 2 components: the file is damaged"):
        evaluate(tmp_path / "run", progress=False)

    save_file({name: tensor for name, tensor in tensors.items() if "router" not in name}, weights)
    with pytest.raises(BaditError, match=r"adapter: cannot be loaded .Found missing adapter keys"):
        evaluate(tmp_path / "run", progress=False)

    save_file(tensors, weights)
    config = weights.with_name("adapter_config.json")
    settings = json.loads(config.read_text())
    for change, message in (
        ({"r": 4}, r"r: is 4, but the run's recipe says 2; this is another run's adapter"),
        ({"peft_type": "LORA"}, r"peft_type: is 'LORA', but the run's recipe says 'BADIT'"),
        ({"surplus": 1}, r"'surplus': is no setting that this PEFT knows"),
        ({"target_modules": "(.*)*$"}, r"target_modules: must be a list of names"),
        ({"past_branches": 10**12}, r"'past_branches': is no setting|past_branches: the weights have no"),
        (
            {"format_version": 9},
            r"format_version: the adapter has format 9, this badit reads formats up to 1: pip install --upgrade badit",
        ),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(BaditError, match=r"adapter_config\.json: " + message):
            evaluate(tmp_path / "run", progress=False)
    config.write_text(json.dumps(settings))

    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(BaditError, match=r"adapter: has no adapter_model\.safetensors"):
        evaluate(tmp_path / "run", progress=False)


def test_a_run_without_adapter_or_config_is_named(recipe_values: Values, tmp_path: Path) -> None:
    with pytest.raises(BaditError, match=r"no config\.yaml"):
        evaluate(tmp_path / "nothing")
    Run.prepare(build_recipe(recipe_values))
    with pytest.raises(BaditError, match="no adapter yet"):
        evaluate(tmp_path / "run")


def test_every_data_option_reaches_the_plan(recipe_values: Values) -> None:
    def plan(*overrides: str) -> Any:
        return make_plan(build_recipe(recipe_values, list(overrides)))

    assert plan().training_instances == 24
    assert plan().test_instances == 8
    assert plan("data.train_per_task=5").training_instances == 10
    assert plan("data.test_per_task=1").test_instances == 2
    assert [task.name for task in plan("data.tasks=[rivers]").tasks] == ["rivers"]
    assert plan("data.validation_per_task=2").training_instances == 20
    held_out = plan("data.validation_per_task=2", "evaluation.split=validation")
    assert held_out.test_instances == 4
    other = plan("data.validation_per_task=2", "evaluation.split=validation", "data.seed=1")
    assert held_out.tasks[0].validation != other.tasks[0].validation


def test_a_split_without_instances_is_refused(recipe_values: Values) -> None:
    with pytest.raises(BaditError, match=r"has no validation instances; set data\.validation_per_task"):
        make_plan(build_recipe(recipe_values, ["evaluation.split=validation"]))
    with pytest.raises(BaditError, match="has no validation instances"):
        make_plan(build_recipe(recipe_values), split="validation")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "badet"}, r"method\.name: unknown method 'badet' \(did you mean 'badit'\?\)"),
        ({"name": "badit", "num_expert": 4}, r"method\.num_expert: unknown key \(did you mean 'num_experts'\?\)"),
        ({"name": "badit", "peft_type": "LORA"}, r"method\.peft_type: unknown key"),
        ({"name": "badit", "num_experts": 0}, r"method: num_experts must be"),
        ({"name": "badit", "regroup": {"evry": 3}}, r"method\.regroup\.evry: unknown key \(did you mean 'every'\?\)"),
        ({"name": "badit", "regroup": {"every": 0}}, r"method: regroup\.every must be"),
        ({"name": "badit", "regroup": 3}, r"method\.regroup: must be a mapping"),
        ({"name": "lora", "num_experts": 4}, r"method\.num_experts: unknown key"),
        ({"name": "base", "r": 4}, r"method\.r: unknown key"),
    ],
)
def test_bad_methods_are_named(recipe_values: Values, method: Values, message: str) -> None:
    with pytest.raises(BaditError, match=message):
        make_plan(build_recipe({**recipe_values, "method": method}))


def test_training_options_reach_the_trainer(recipe_values: Values, tmp_path: Path) -> None:
    overrides = [
        "training.max_steps=2",
        "training.gradient_accumulation_steps=2",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.learning_rate=1e-2",
        "training.gradient_checkpointing=true",
        "training.group_by_length=false",
        "data.sampling=balanced",
        "model.dtype=bfloat16",
        "prompt.encoding=def+pos1",
        "prompt.chat_template=never",
        "prompt.max_source_tokens=40",
        "prompt.max_answer_tokens=2",
    ]
    train(build_recipe(recipe_values, overrides), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == [0.01, 0.01]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["learning_rate"] == 0.01
    prompts = [
        json.loads(line)["prompt"] for line in (tmp_path / "run/predictions/cities.jsonl").read_text().splitlines()
    ]
    assert not any("<|im_start|>" in prompt for prompt in prompts)
