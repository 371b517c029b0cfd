"""Losses and gradients stay finite on edge cases; non-finite steps are skipped and counted."""

import itertools

import pytest
import torch

from badit import Run
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.support.files import read_jsonl
from badit.training.methods import AdapterMethod
from badit.training.regrouping import RegroupCallback
from badit.training.trainer import AnswerTrainer
from refusals import refuses
from steps import fit
from training.trainers import adapted, fit_until, learned, make_trainer, on, with_callbacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"router_input": "standardised"}, {"routing": "token"}, {"top_k": 1}], ids=str
)
def test_edge_case_rows_give_finite_losses_and_gradients(tiny_model, tmp_path, dtype, options):
    """Four rows: ordinary, with a one-token prompt, without an answer, and of padding only."""
    model = adapted(tiny_model("llama", dtype=dtype), **options).train()
    trainer = make_trainer(model, tmp_path, [])
    ids, position = torch.arange(3, 3 + 4 * 8).view(4, 8), torch.arange(8)
    length, answer = torch.tensor([[8], [3], [8], [0]]), torch.tensor([[5], [1], [8], [0]])
    labels = ids.masked_fill((position < answer) | (position >= length), -100)
    odd = {"input_ids": ids, "attention_mask": (position < length).long(), "labels": labels}
    for rows in ([0, 1, 2, 3], [1], [2], [3], [2, 3]):
        batch = {key: value[rows] for key, value in odd.items()}
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        assert loss.isfinite(), rows
        assert (loss > 0) == (batch["labels"] != -100).any(), rows
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), rows


@pytest.mark.parametrize("weight", ["rank one", 0.0, 1e-20, 1e-39, 1e6])
@pytest.mark.parametrize("init_weights", ["bad", "directions"])
def test_training_on_degenerate_base_weights_stays_finite(
    tiny_model, tmp_path, weight, init_weights
):
    base = tiny_model("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            w_OI = layer.mlp.gate_proj.weight
            w_OI.copy_(torch.outer(w_OI[:, 0], w_OI[0]) if weight == "rank one" else w_OI * weight)
    model = adapted(base, init_weights=init_weights)
    trainer = make_trainer(
        model, tmp_path, [RegroupCallback(every=2)], max_steps=4, save_strategy="no"
    )
    trainer.train()
    assert trainer.skipped_steps == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loss_decreases_and_experts_are_float32_in_every_precision(recipe_values, dtype):
    overrides = [f"model.dtype={dtype}", "training.num_train_epochs=4", "training.warmup_steps=0"]
    run = fit(build_recipe(recipe_values, overrides), progress=False)
    losses = [line["loss"] for line in read_jsonl(run.metrics_path)]
    assert losses[-1] < losses[0] - 0.3
    assert {tensor.dtype for name, tensor in learned(run).items() if "badit_A" in name} == {
        torch.float32
    }
    if dtype == "float16":
        full = build_recipe({**recipe_values, "method": {"name": "full"}}, overrides)
        refuses(r"model\.dtype: base weights cannot be trained in float16", resolve, full)


def break_loss(monkeypatch, steps):
    """Makes the loss infinite in the given steps, counted from 1."""
    compute = AnswerTrainer.compute_loss

    def broken(self, model, inputs, **options):
        loss = compute(self, model, inputs, **options)
        return loss * torch.inf if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(AnswerTrainer, "compute_loss", broken)


def test_non_finite_steps_are_skipped_and_counted_across_resume(
    recipe_values, monkeypatch, tmp_path
):
    break_loss(monkeypatch, {4, 5, 6})
    weights = []
    options = ["method.init_weights=bad", "method.gated=factors"]
    options += ["method.regroup.every=4", "training.weight_decay=0.1"]

    def keep_weights(state, keywords):
        weights.append(
            [p.detach().clone() for p in keywords["model"].parameters() if p.requires_grad]
        )

    with with_callbacks(on("on_step_end", keep_weights)):
        run = fit(build_recipe(recipe_values, options), progress=False)
    unchanged = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
    # The regrouping after step 4 rescales weights, so only steps 5 and 6 leave all weights
    # unchanged.
    assert unchanged == [step in (5, 6) for step in range(2, 13)]
    lines = list(read_jsonl(run.metrics_path))
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 0, 1, 2, *[3] * 7]
    assert [line["loss"] is None for line in lines] == [step in (4, 5, 6) for step in range(1, 13)]
    assert [line["window_steps"] for line in read_jsonl(run.regroupings_path)][::2] == [2, 4]
    assert not [word for word in ("NaN", "Infinity") if word in run.metrics_path.read_text()]
    resumed = build_recipe(recipe_values, [*options, f"output={tmp_path / 'resumed'}"])
    fit_until(6, resumed)
    assert fit(resumed, progress=False).metrics_path.read_text() == run.metrics_path.read_text()


def test_too_many_non_finite_steps_stop_the_run_and_name_the_batch(recipe_values, monkeypatch):
    recipe = build_recipe(recipe_values, ["training.max_skipped_steps=2"])
    message = "training: the loss or its gradient is not finite in step 9, after 2 skipped steps; "
    # The checkpoint of step 5 has counted one skipped step, so the resumed run may skip one more,
    # not two.
    for steps in ({3, 7, 9}, {7, 9}):
        with monkeypatch.context() as patch:
            break_loss(patch, steps)
            said = refuses(f"^{message}", fit, recipe, progress=False)
    named = said.partition("the batch has instances ")[2].partition(";")[0].split(", ")
    assert len(named) == 4
    assert set(named) <= {
        f"{task.name}/{each.id}" for task in resolve(recipe).tasks for each in task.train
    }
    fit(recipe, progress=False)
    short = build_recipe(recipe_values, ["training.max_steps=6", f"output={recipe.output}-short"])
    break_loss(monkeypatch, range(1, 7))
    refuses(
        "not finite in step 4, after 3 skipped steps", fit, short, progress=False
    )  # half of the 6 steps
    assert Run(short.output).metrics["loss"].isna().all()
    assert not Run(short.output).adapter_path.exists()


def test_deterministic_algorithms_are_enabled_only_during_training(recipe_values, monkeypatch):
    found = []
    for variable in (
        "CUDA_LAUNCH_BLOCKING",
        "CUBLAS_WORKSPACE_CONFIG",
        "FLASH_ATTENTION_DETERMINISTIC",
    ):
        monkeypatch.setenv(variable, "")  # transformers sets them for the whole process
    look = on(
        "on_step_begin", lambda *args: found.append(torch.are_deterministic_algorithms_enabled())
    )
    monkeypatch.setattr(AdapterMethod, "callbacks", lambda self, run: [look])
    for switch in (True, False):
        overrides = [
            f"training.full_determinism={switch}",
            f"output={recipe_values['output']}-{switch}",
        ]
        fit(build_recipe(recipe_values, [*overrides, "training.max_steps=2"]), progress=False)
        assert not torch.are_deterministic_algorithms_enabled()
    assert found == [True, True, False, False]
