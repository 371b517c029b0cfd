"""``training.optimizer`` of a recipe: which optimizer trains, exact resume, and several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from badit.checkpoint import last_checkpoint
from badit.errors import BaditError
from badit.optimizer import OrthogonalUpdates
from badit.recipe import build_recipe
from badit.train import fit
from badit.trainer import AnswerTrainer
from training.launches import Launches, assert_same_run, assert_stops_and_resumes
from training.trainers import assert_same, fit_until, learned

Values = dict[str, Any]


def values_with(recipe_values: Values, **training: Any) -> Values:
    return recipe_values | {"training": recipe_values["training"] | training}


@pytest.mark.parametrize("method", [{"name": "badit"}, {"name": "lora", "r": 4}, {"name": "hydralora"}])
def test_a_run_trains_with_the_optimizer_of_its_recipe(
    recipe_values: Values, method: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    create = AnswerTrainer.create_optimizer

    def recorded(trainer: AnswerTrainer, model: Any = None) -> torch.optim.Optimizer:
        optimizer = made[name] = create(trainer, model)
        return optimizer

    monkeypatch.setattr(AnswerTrainer, "create_optimizer", recorded)
    adapters = {}
    for name in ("adamw", "lora+", "orthogonal"):
        values = values_with(recipe_values, optimizer=name, lora_plus_ratio=4.0, max_steps=3, learning_rate=1e-2)
        run = fit(build_recipe({**values, "method": method, "output": f"{values['output']}-{name}"}), progress=False)
        adapters[name] = learned(run)
    assert isinstance(made["orthogonal"], OrthogonalUpdates)
    rates = [group["initial_lr"] for group in made["lora+"].param_groups]
    assert rates[:2] == [1e-2, 4e-2]
    changed = next(key for key in adapters["adamw"] if key.endswith(("badit_B", "lora_B.weight")))
    assert not torch.equal(adapters["adamw"][changed], adapters["lora+"][changed])
    assert not torch.equal(adapters["adamw"][changed], adapters["orthogonal"][changed])


def test_a_stopped_run_with_orthogonal_updates_ends_the_same(recipe_values: Values) -> None:
    values = values_with(recipe_values, optimizer="orthogonal", max_steps=8, save_steps=2, learning_rate=1e-2)
    whole = fit(build_recipe({**values, "output": f"{values['output']}-whole"}), progress=False)
    recipe = build_recipe(values)
    stopped = fit_until(5, recipe)
    assert last_checkpoint(stopped.checkpoints_path) == stopped.checkpoints_path / "checkpoint-4"
    fit(recipe, progress=False)
    assert_same(learned(stopped), learned(whole))


def test_two_processes_train_as_one_does_and_resume(recipe_values: Values, tmp_path: Path) -> None:
    launches = Launches(values_with(recipe_values, optimizer="orthogonal"), tmp_path)
    assert launches.train_alone("alone", batch=4) == 0
    for engine in ("ddp", "fsdp2"):
        launches.train(engine, 2, engine)
        assert_same_run(launches.run(engine), launches.run("alone"))
    assert_stops_and_resumes(launches, "fsdp2")


def test_orthogonal_updates_of_base_weights_are_refused(recipe_values: Values) -> None:
    values = values_with(recipe_values, optimizer="orthogonal")
    with pytest.raises(BaditError, match="no pair of trainable factors"):
        fit(build_recipe({**values, "method": {"name": "full"}}), progress=False)
