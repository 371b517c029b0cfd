"""The loss that learning rates are chosen by, against one worked out example by example without padding."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch

from badit.errors import BaditError
from badit.evaluate import load_run, validation_loss
from badit.files import read_json
from badit.recipe import Recipe, build_recipe
from badit.run import Run
from badit.train import encoded, fit, make_plan
from badit.tuner import hooks_of

# badit.train is the function of that name.
train_module = import_module("badit.train")
Values = dict[str, Any]


def losses_of(model: Any, example: dict[str, Any], *, prompt_length: int | None) -> list[float]:
    """−log p of each answer token, one by one, in double precision."""
    ids = torch.tensor([example["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt_length is not None:
        inputs["prompt_mask"] = (torch.arange(ids.shape[1]) < prompt_length)[None]
    with torch.no_grad(), hooks_of(model).rows_of([example["task"]]):
        logits_TV = model(**inputs).logits[0].double()
    losses = []
    for position in range(example["prompt_length"], ids.shape[1]):
        row_V = logits_TV[position - 1].tolist()
        largest = max(row_V)
        log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in row_V))
        losses.append(log_sum - row_V[example["input_ids"][position]])
    return losses


def naive_loss(recipe: Recipe, *, with_prompt_mask: bool, whole: bool = False) -> dict[str, float]:
    """By task: all its answer tokens' losses, averaged."""
    model, tokenizer = load_run(Run(recipe.output))
    by_task = {}
    for task in make_plan(recipe).tasks:
        losses = []
        for instance in task.validation:
            example = encoded(tokenizer, recipe, task, instance)
            length = len(example["input_ids"]) if whole else example["prompt_length"]
            losses += losses_of(model, example, prompt_length=length if with_prompt_mask else None)
        by_task[task.name] = sum(losses) / len(losses)
    return by_task


@pytest.mark.parametrize("name", ["badit", "mtl-lora", "full"])
def test_it_is_each_tasks_mean_over_answer_tokens(recipe_values: Values, name: str) -> None:
    options = {"badit": {"num_experts": 4, "r": 2, "regroup": {"every": 3}}, "mtl-lora": {"r": 2}, "full": {}}
    recipe = build_recipe(
        {**recipe_values, "method": {"name": name, **options[name]}},
        # Batches that mix the tasks and lengths, the last one short.
        ["data.validation_per_task=3", "evaluation.batch_size=4", "training.learning_rate=0.05"],
    )
    fit(recipe, progress=False)
    found = validation_loss(recipe.output)
    expected = naive_loss(recipe, with_prompt_mask=name == "badit")
    assert found["tasks"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx((expected["cities"] + expected["rivers"]) / 2, rel=1e-5)
    assert expected["cities"] != pytest.approx(expected["rivers"], rel=1e-3)
    if name == "badit":
        leaking = naive_loss(recipe, with_prompt_mask=True, whole=True)
        assert leaking != pytest.approx(expected, rel=1e-4), "the answer must not route"


def test_it_is_kept(recipe_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build_recipe({**recipe_values, "method": {"name": "base"}}, ["data.validation_per_task=2"])
    run = fit(recipe, progress=False)
    found = validation_loss(run.path)
    assert read_json(run.path / "validation.json") == found
    monkeypatch.setattr(train_module, "load_base_model", lambda *a, **k: pytest.fail("loaded a model"))
    assert validation_loss(run.path) == found


def test_without_held_out_instances_or_a_model_there_is_none(recipe_values: Values) -> None:
    recipe = build_recipe(recipe_values)
    Run.prepare(recipe)
    with pytest.raises(BaditError, match=r"has no validation instances; set data\.validation_per_task"):
        validation_loss(recipe.output)
    held_out = build_recipe(recipe_values, ["data.validation_per_task=2", f"output={recipe.output}-2"])
    Run.prepare(held_out)
    with pytest.raises(BaditError, match="no adapter yet"):
        validation_loss(held_out.output)
