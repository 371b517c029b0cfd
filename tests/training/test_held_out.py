"""The held-out loss during training: value, no effect on training, best model, early stopping."""

import signal
from statistics import fmean
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file

from badit.api import Run
from badit.data import AnswerCollator
from badit.evaluation.losses import prompt_losses
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.training.checkpoints import step_of
from badit.training.encoding import encoded
from badit.training.trainer import AnswerTrainer
from steps import fit, load_run
from training.trainers import assert_same, fit_until, learned, on

HELD_OUT = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {**HELD_OUT, "num_train_epochs": 6, "save_steps": 3}
BEST |= {"load_best_model_at_end": True, "early_stopping_patience": 2}
BEST_EPOCH = BEST | {"eval_strategy": "epoch", "eval_steps": None}


@pytest.fixture
def recipe(recipe_values, tmp_path):
    """A factory of recipes with held-out instances, each with its own output folder."""

    def make(name, **training):
        values = {**recipe_values, "training": {**recipe_values["training"], **training}}
        overrides = [
            "data.validation_per_task=3",
            "method.init_weights=bad",
            "method.gated=factors",
            f"output={tmp_path / name}",
        ]
        return build_recipe(values, overrides)

    return make


def set_lowest(monkeypatch, step):
    """Gives the held-out loss its minimum at a step."""
    measured = AnswerTrainer.prediction_step

    def moved(trainer, *arguments, **options):
        loss, *rest = measured(trainer, *arguments, **options)
        return loss + abs(trainer.state.global_step - step), *rest

    monkeypatch.setattr(AnswerTrainer, "prediction_step", moved)


def test_held_out_loss_is_mean_instance_nll_and_does_not_affect_training(recipe):
    plain, measured = (
        recipe("plain", logging_steps=5),
        recipe("measured", **HELD_OUT, logging_steps=5),
    )
    one, other = (fit(each, progress=False) for each in (plain, measured))
    assert_same(learned(one), learned(other))
    losses = other.metrics.dropna(subset="eval_loss")
    assert losses["step"].tolist() == [2, 4, 6, 8, 10]
    assert one.metrics["step"].tolist() == [5, 10]
    last = fit(recipe("last", logging_steps=7), progress=False)
    assert last.metrics["step"].tolist() == [7, 10], "the last step is not logged"
    model, tokenizer = load_run(other, measured)
    pairs = [(task, instance) for task in resolve(measured).tasks for instance in task.validation]
    sums, counts = prompt_losses(
        model, [AnswerCollator(0)(encoded(tokenizer, measured, pairs, model))]
    )
    means = sums / counts
    assert losses["eval_loss"].iloc[-1] == pytest.approx(means.mean(), rel=1e-4)
    names = [task.name for task, _ in pairs]
    assert {name for name in losses if "/" in name} == {f"eval_loss/{name}" for name in names}
    for name in set(names):
        of_task = [
            mean for mean, other_name in zip(means, names, strict=True) if other_name == name
        ]
        assert losses[f"eval_loss/{name}"].iloc[-1] == pytest.approx(fmean(of_task), rel=1e-4)


def test_training_without_a_best_model_ends(recipe):
    without = recipe("ends", **HELD_OUT, max_steps=3, load_best_model_at_end=True, eval_delay=99)
    assert fit(without).environment["training"]["steps"] == 3


def assert_resumes(recipe, whole, stop):
    """Asserts that a run stopped at ``stop`` and resumed is bit-identical to the run ``whole``."""
    fit_until(stop, recipe)
    run = fit(recipe, progress=False)
    assert_same(learned(whole), learned(run))
    assert run.metrics_path.read_text() == whole.metrics_path.read_text()
    assert run.environment["training"]["steps"] == whole.environment["training"]["steps"]


def test_best_model_is_kept_and_early_stopping_resumes_bit_identically(recipe, monkeypatch):
    set_lowest(monkeypatch, 12)
    whole = fit(recipe("whole", **BEST), progress=False)
    losses = whole.metrics.dropna(subset="eval_loss").set_index("step")["eval_loss"]
    best, last = int(losses.idxmin()), int(losses.index[-1])
    assert (best, last) == (12, 16), "early stopping must come two evaluations after the best"
    until = fit_until(last, recipe("until", **BEST))
    kept = {folder.name: folder for folder in until.checkpoints_path.iterdir()}
    assert_same(learned(whole), load_file(kept[f"checkpoint-{best}"] / "adapter_model.safetensors"))
    at_the_end = on(
        "on_train_end", Mock(side_effect=KeyboardInterrupt)
    )  # after the last checkpoint
    for name, stop in enumerate([best, last - 1, last, at_the_end]):
        assert_resumes(recipe(str(name), **BEST), whole, stop)
    whole = fit(
        recipe("three-steps", max_steps=3), progress=False
    )  # ends in the middle of an epoch
    assert_resumes(recipe("ended", max_steps=3), whole, at_the_end)


def test_best_model_of_epochs_is_kept_with_checkpoints_at_other_steps(recipe, monkeypatch):
    set_lowest(monkeypatch, 10)
    epochs = recipe("epochs", **BEST_EPOCH)
    run = Run(fit_until(on("on_train_end", Mock(side_effect=KeyboardInterrupt)), epochs).path)
    best = int(run.metrics.dropna(subset="eval_loss").set_index("step")["eval_loss"].idxmin())
    assert {best, best + 10} < set(map(step_of, run.checkpoints_path.iterdir()))
    at_best = on(
        "on_step_end",
        lambda state, _: state.global_step == best and signal.raise_signal(signal.SIGINT),
    )
    assert_resumes(recipe("stopped", **BEST_EPOCH), fit(epochs, progress=False), at_best)


def test_run_that_saves_only_the_best_stops_at_an_evaluated_step_without_a_new_best(
    recipe, monkeypatch
):
    set_lowest(monkeypatch, 2)
    only_best = recipe("stopped", **HELD_OUT, save_strategy="best", max_steps=6)
    interrupt = on(
        "on_step_end",
        lambda state, _: state.global_step == 4 and signal.raise_signal(signal.SIGINT),
    )
    assert set(
        map(step_of, Run(fit_until(interrupt, only_best).path).checkpoints_path.iterdir())
    ) == {2, 4}
    assert fit(only_best, progress=False).environment["training"]["steps"] == 6
