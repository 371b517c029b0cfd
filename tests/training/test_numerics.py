"""Losses and gradients are finite on odd batches and odd weights; a step whose are not is skipped and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from badit.cli import main
from badit.errors import BaditError
from badit.files import read_jsonl
from badit.methods import AdapterMethod
from badit.recipe import build_recipe
from badit.regroup import RegroupCallback
from badit.train import fit, make_plan
from badit.trainer import AnswerTrainer
from training.trainers import adapted, make_trainer

Values = dict[str, Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def odd_batch() -> dict[str, torch.Tensor]:
    """An ordinary row, one whose prompt is one token, one without an answer, and one that is all padding."""
    ids = torch.arange(3, 3 + 4 * 8).view(4, 8)
    mask = torch.ones_like(ids)
    labels = torch.full_like(ids, -100)
    labels[0, 5:] = ids[0, 5:]
    labels[1, 1:3] = ids[1, 1:3]
    mask[1, 3:] = 0
    mask[3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def finite_gradients(model: Any) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"router_input": "standardised"}, {"routing": "token"}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1], [2], [3], [2, 3]], ids=str)
def test_odd_rows_give_finite_losses_and_gradients(
    tiny_model: Any, tmp_path: Path, dtype: torch.dtype, options: Values, rows: list[int]
) -> None:
    model = adapted(tiny_model("llama", dtype=dtype), **options).train()
    trainer = make_trainer(model, tmp_path, [])
    batch = {key: value[rows] for key, value in odd_batch().items()}
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    loss = float(loss.detach())
    assert math.isfinite(loss)
    assert (loss > 0) == bool((batch["labels"] != -100).any())
    assert finite_gradients(model)


@pytest.mark.parametrize("weight", ["zero", "rank one", "tiny", "subnormal", "huge"])
@pytest.mark.parametrize("init_weights", ["bad", "directions"])
def test_odd_base_weights_are_trained(tiny_model: Any, tmp_path: Path, weight: str, init_weights: str) -> None:
    base = tiny_model("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            w_OI = layer.mlp.gate_proj.weight
            if weight == "rank one":
                w_OI.copy_(torch.outer(w_OI[:, 0], w_OI[0]))
            else:
                w_OI.mul_({"zero": 0.0, "tiny": 1e-20, "subnormal": 1e-39, "huge": 1e6}[weight])
    model = adapted(base, init_weights=init_weights)
    trainer = make_trainer(model, tmp_path, [RegroupCallback(every=2)], max_steps=4, save_strategy="no")
    trainer.train()
    assert trainer.skipped_steps == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_in_every_precision_learns(recipe_values: Values, dtype: str) -> None:
    overrides = [f"model.dtype={dtype}", "training.num_train_epochs=4", "training.warmup_steps=0"]
    run = fit(build_recipe(recipe_values, overrides), progress=False)
    losses = [line["loss"] for line in read_jsonl(run.metrics_path)]
    assert losses[-1] < losses[0] - 0.3
    tensors = load_file(run.adapter_path / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "badit_A" in name} == {torch.float32}


def test_base_weights_are_not_trained_in_float16(recipe_values: Values) -> None:
    with pytest.raises(BaditError, match=r"model\.dtype: float16 is too narrow"):
        make_plan(build_recipe({**recipe_values, "method": {"name": "full"}}, ["model.dtype=float16"]))


def break_loss(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the loss infinite in some steps, counted from 1."""
    compute = AnswerTrainer.compute_loss

    def broken(self: AnswerTrainer, model: Any, inputs: Values, **options: Any) -> Any:
        loss = compute(self, model, inputs, **options)
        return loss * math.inf if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(AnswerTrainer, "compute_loss", broken)


class KeepWeights(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.detach().clone() for name, p in named if p.requires_grad})


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    recipe_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_loss(monkeypatch, {4, 5})
    kept = KeepWeights()
    callbacks = AdapterMethod.callbacks
    monkeypatch.setattr(AdapterMethod, "callbacks", lambda self, run: [*callbacks(self, run), kept])
    run = fit(build_recipe(recipe_values, ["method.regroup.every=4", "training.weight_decay=0.1"]), progress=False)
    for step in range(2, 13):
        unchanged = all(
            torch.equal(kept.steps[step - 1][name], tensor) for name, tensor in kept.steps[step - 2].items()
        )
        # The regrouping after step 4 rescales; of the steps it is the fifth alone that shows whether it was skipped.
        assert unchanged == (step == 5), step
    lines = list(read_jsonl(run.metrics_path))
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 0, 1, *[2] * 8]
    assert [line["window_steps"] for line in read_jsonl(run.regroupings_path)][::2] == [3, 4]
    assert "NaN" not in run.metrics_path.read_text()
    assert "Infinity" not in run.metrics_path.read_text()


def test_too_many_of_them_stop_the_run_and_name_the_batch(
    recipe_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_values))
    with monkeypatch.context() as patch:
        break_loss(patch, {3, 7, 9})
        assert main(["train", str(path), "training.max_skipped_steps=2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "badit: training: the loss or its gradient is not finite in step 9, after 2 skipped steps; "
    )
    ids = {f"{task}/{i}" for task in ("cities", "rivers") for i in instance_ids(recipe_values, task)}
    named = error.partition("the batch has instances ")[2].partition(";")[0].split(", ")
    assert len(named) == 4
    assert set(named) <= ids
    # The checkpoint of step 5 has counted the one before it, so the run goes on with one skip left, not two.
    with monkeypatch.context() as patch:
        break_loss(patch, {7, 9})
        assert main(["train", str(path), "training.max_skipped_steps=2"]) == 2
    assert "in step 9" in capsys.readouterr().err
    assert main(["train", str(path), "training.max_skipped_steps=2"]) == 0


def instance_ids(values: Values, task: str) -> list[str]:
    plan = make_plan(build_recipe(values))
    return [instance.id for one in plan.tasks if one.name == task for instance in one.train]


def test_deterministic_algorithms_are_asked_for_in_training_and_only_then(
    recipe_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    for variable in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(variable, "")  # transformers sets them for the whole process

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            try:  # an operation that has no deterministic form
                torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
                found.append(False)
            except RuntimeError as error:
                found.append("deterministic" in str(error))

    monkeypatch.setattr(AdapterMethod, "callbacks", lambda self, run: [Look()])
    for switch in (True, False):
        overrides = [f"training.full_determinism={switch}", f"output={recipe_values['output']}-{switch}"]
        fit(build_recipe(recipe_values, overrides), progress=False)
        assert found == [switch] * 12
        assert not torch.are_deterministic_algorithms_enabled()
        found.clear()
