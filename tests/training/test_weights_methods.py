"""Runs of the methods that train the base weights (full fine-tuning, task neurons), and of gradient surgery."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from badit.baselines.neurons import neuron_scores, top_neurons, union
from badit.checkpoint import last_checkpoint
from badit.data import AnswerCollator
from badit.errors import BaditError
from badit.evaluate import load_run, train_and_score
from badit.files import read_json
from badit.methods import WEIGHTS, Method, WeightsMethod
from badit.recipe import Recipe, build_recipe
from badit.run import Run
from badit.train import base_model, encoded, fit, make_plan, pad_id
from training.trainers import StopAt

Values = dict[str, Any]
Tensors = dict[str, torch.Tensor]
SHARE = 0.2
FULL: Values = {"name": "full"}
NEURONS: Values = {"name": "task-neurons", "share": SHARE, "score_batches": 1}


def recipe_with(values: Values, method: Values, *overrides: str, output: Path | None = None) -> Recipe:
    values = {**values, "method": method, "output": str(output or values["output"])}
    return build_recipe(values, ["training.num_train_epochs=1", "training.learning_rate=1e-3", *overrides])


def saved(recipe: Recipe) -> Tensors:
    return load_file(Run(recipe.output).adapter_path / WEIGHTS)


def base_weights(recipe: Recipe) -> Tensors:
    return dict(base_model(recipe, dtype="float32")[0].named_parameters())


def trained_count(recipe: Recipe) -> int:
    return read_json(Run(recipe.output).environment_path)["training"]["trainable_parameters"]


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models of the runs, as they are when their training has ended."""
    models: list[Any] = []
    monkeypatch.setattr(WeightsMethod, "after_training", lambda self, model, batches: models.append(model))
    return models


def test_full_fine_tuning_changes_every_weight_and_loads_them_back(recipe_values: Values, trained: list[Any]) -> None:
    recipe = recipe_with(recipe_values, FULL)
    scores = train_and_score(recipe, progress=False)
    assert set(scores["tasks"]) == {"cities", "rivers"}
    run = Run(recipe.output)
    base, weights = base_weights(recipe), saved(recipe)
    assert weights.keys() == base.keys()
    assert not any(torch.equal(weights[name], base[name]) for name in base)
    assert trained_count(recipe) == sum(tensor.numel() for tensor in base.values())
    assert [file.name for file in run.adapter_path.iterdir()] == [WEIGHTS]
    assert not run.checkpoints_path.exists()
    with safe_open(run.adapter_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"base_model": recipe.model.name, "method": "full"}
    assert torch.equal(logits(load_run(run)[0]), logits(trained[0]))


def test_a_bfloat16_recipe_trains_and_keeps_float32_and_uses_bfloat16(recipe_values: Values) -> None:
    recipe = recipe_with(recipe_values, FULL, "model.dtype=bfloat16")
    fit(recipe, progress=False)
    weights = saved(recipe)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    model, _ = load_run(Run(recipe.output))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, weights[name].bfloat16())


def neurons_of_tasks(recipe: Recipe) -> Tensors:
    """The masks that a run's first batch of every task leads to."""
    model, tokenizer = base_model(recipe)
    collate = AnswerCollator(pad_id(tokenizer))
    masks = []
    for task in make_plan(recipe).tasks:
        batch = collate([encoded(tokenizer, recipe, task, instance) for instance in task.train])
        masks.append(top_neurons(neuron_scores(model, [batch]), SHARE))
    return union(*masks)


def test_task_neurons_change_the_tasks_neurons_alone(recipe_values: Values, trained: list[Any]) -> None:
    recipe = recipe_with(
        {**recipe_values, "training": {**recipe_values["training"], "per_device_train_batch_size": 12}}, NEURONS
    )
    fit(recipe, progress=False)
    base, weights, masks = base_weights(recipe), saved(recipe), neurons_of_tasks(recipe)
    assert {name.split(".")[-2] for name in weights} == {"gate_proj", "up_proj", "down_proj"}
    for name, tensor in weights.items():
        mlp, _, projection = name.removesuffix(".weight").rpartition(".")
        changed = (tensor != base[name]).any(dim=0 if projection == "down_proj" else 1)
        assert torch.equal(changed, masks[mlp]), name
    per_neuron = 3 * 32
    neurons = sum(int(mask_F.sum()) for mask_F in masks.values())
    assert SHARE * 96 <= neurons < 96
    assert trained_count(recipe) == neurons * per_neuron
    assert torch.equal(logits(load_run(Run(recipe.output))[0]), logits(trained[0]))


def test_task_neurons_refuse_weight_decay(recipe_values: Values) -> None:
    recipe = recipe_with(recipe_values, NEURONS, "training.weight_decay=0.01")
    with pytest.raises(BaditError, match=r"training\.weight_decay: must be 0 with task-neurons"):
        make_plan(recipe)


@pytest.mark.parametrize("method", [FULL, NEURONS], ids=lambda method: method["name"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    recipe_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Values
) -> None:
    whole = recipe_with(recipe_values, method, output=tmp_path / "whole")
    fit(whole, progress=False)
    recipe = recipe_with(recipe_values, method)
    with monkeypatch.context() as patch:
        patch.setattr(Method, "callbacks", lambda self, run: [StopAt(6)])
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, progress=False)
    assert last_checkpoint(Run(recipe.output).checkpoints_path) is not None
    begun = []

    class Noting(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)

    monkeypatch.setattr(Method, "callbacks", lambda self, run: [Noting()])
    fit(recipe, progress=False)
    assert begun == [5], "the sixth step alone"
    expected, weights = saved(whole), saved(recipe)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert trained_count(whole) == trained_count(recipe)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_other_shapes(path: Path) -> None:
    save_file({name: torch.zeros(3) for name in load_file(path)}, path)


def with_one_weight_less(path: Path) -> None:
    save_file(dict(list(load_file(path).items())[1:]), path)


def with_a_foreign_weight(path: Path) -> None:
    save_file({"lm_head.bias": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"adapter: has no weights\.safetensors; pickled weights are not read; remove the folder"),
        (cut_short, r"weights\.safetensors: cannot be loaded"),
        (emptied, r"weights\.safetensors: cannot be loaded"),
        (of_other_shapes, r"belongs to another base model, which has a weight "),
        (with_one_weight_less, r"weights\.safetensors: has no weight .*; remove the folder to train it again"),
        (with_a_foreign_weight, r"belongs to another base model, which has a weight 'lm_head\.bias'"),
    ],
)
def test_damaged_weights_are_named_on_one_line(
    recipe_values: Values, damage: Callable[[Path], None], message: str
) -> None:
    recipe = recipe_with(recipe_values, FULL)
    run = Run.prepare(recipe)
    WeightsMethod("full").save(base_model(recipe)[0], run.adapter_path, recipe.model.name)
    load_run(run)
    damage(run.adapter_path / WEIGHTS)
    with pytest.raises(BaditError, match=message) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, r"method: share must be above 0 and at most 1, got 0"),
        ({"share": 1.5}, r"method: share must be above 0"),
        ({"share": math.nan}, r"method: share must be above 0"),
        ({"score_batches": 0}, r"method: score_batches must be a whole number of at least 1"),
        ({"shares": 0.1}, r"method\.shares: unknown key \(did you mean 'share'\?\)"),
    ],
)
def test_bad_options_of_task_neurons_are_named(recipe_values: Values, options: Values, message: str) -> None:
    with pytest.raises(BaditError, match=message):
        make_plan(recipe_with(recipe_values, {"name": "task-neurons", **options}))


def test_full_fine_tuning_has_no_options(recipe_values: Values) -> None:
    with pytest.raises(BaditError, match=r"method\.r: unknown key"):
        make_plan(recipe_with(recipe_values, {"name": "full", "r": 4}))


def test_before_the_data_task_neurons_count_as_one_tasks(recipe_values: Values) -> None:
    recipe = recipe_with(recipe_values, NEURONS)
    model, _ = base_model(recipe)
    layers, width, per_neuron = 2, 48, 3 * 32
    assert make_plan(recipe).method.trained_parameters(model) == round(SHARE * layers * width * per_neuron)


def test_surgery_trains_otherwise_than_the_plain_sum(recipe_values: Values, tmp_path: Path) -> None:
    adapters = {}
    for name in ("lora", "pcgrad", "cagrad"):
        recipe = recipe_with(recipe_values, {"name": name, "r": 4}, output=tmp_path / name)
        fit(recipe, progress=False)
        adapters[name] = load_file(Run(recipe.output).adapter_path / "adapter_model.safetensors")
    for one, other in (("lora", "pcgrad"), ("lora", "cagrad"), ("pcgrad", "cagrad")):
        assert adapters[one].keys() == adapters[other].keys()
        assert not all(torch.equal(tensor, adapters[other][name]) for name, tensor in adapters[one].items())
