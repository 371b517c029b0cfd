"""Checkpoints: damaged ones are skipped, code in them is not run, old ones are deleted; signals."""

import os
import pickle
import shutil
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from badit.recipe.loading import build_recipe
from badit.training.checkpoints import (
    SEAL,
    STAGING,
    Checkpoints,
    checkpoint_being_written,
    last_checkpoint,
    seal,
)
from refusals import refuses
from steps import fit
from test_security import Mark
from training.trainers import assert_same, fit_until, learned


def sealed(checkpoints, step):
    folder = checkpoints / STAGING / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "shards" / "0.bin").write_bytes(bytes(range(step)))
    seal(folder, checkpoints)
    return checkpoints / folder.name


def test_checkpoint_of_a_hyperparameter_search_is_in_the_folder_of_the_current_trial(tmp_path):
    args, state = Mock(output_dir=str(tmp_path)), Mock(global_step=4, is_hyper_param_search=True)
    for seconds, trial in enumerate(["run-1", "run-0"]):
        folder = tmp_path / trial / "checkpoint-4"
        folder.mkdir(parents=True)
        os.utime(folder, (seconds, seconds))
    assert checkpoint_being_written(args, state) == tmp_path / "run-0" / "checkpoint-4"
    state.is_hyper_param_search = False
    assert checkpoint_being_written(args, state) == tmp_path / "checkpoint-4"


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "shards" / "0.bin"), "shards/0.bin does not match seal.json"),
        (
            lambda folder: (folder / "trainer_state.json").unlink(),
            "trainer_state.json does not match seal.json",
        ),
        (lambda folder: (folder / "new.bin").touch(), "new.bin does not match seal.json"),
        (lambda folder: os.mkfifo(folder / "new.bin"), "new.bin does not match seal.json"),
        (
            lambda folder: (folder / "link").symlink_to(folder / "shards"),
            "[Errno 21] Is a directory",
        ),
        (lambda folder: (folder / SEAL).unlink(), "seal.json: cannot be read (No such file"),
        (lambda folder: (folder / SEAL).write_text("[]"), "seal.json: must hold one JSON object"),
    ],
)
def test_damaged_checkpoint_is_reported_and_previous_one_is_used(tmp_path, capsys, damage, message):
    good, bad = sealed(tmp_path, 5), sealed(tmp_path, 10)
    assert last_checkpoint(tmp_path) == bad
    damage(bad)
    assert last_checkpoint(tmp_path) == good
    assert capsys.readouterr().err.startswith(f"badit: {bad} is damaged ({message}")


def test_seal_keeps_previous_checkpoint_and_deletes_later_ones(tmp_path):
    for step, earlier in ((5, 5), (10, 5), (15, 10), (12, 10)):
        sealed(tmp_path, step)
        assert {folder.name for folder in tmp_path.glob("c*")} == {
            f"checkpoint-{earlier}",
            f"checkpoint-{step}",
        }
    (tmp_path / "checkpoint-tmp").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.fixture
def stopped(recipe_values):
    """A run stopped after step 11, with checkpoints of steps 5 and 10."""
    return fit_until(11, build_recipe(recipe_values))


def test_run_with_damaged_checkpoint_ends_bit_identical(
    recipe_values, tmp_path, stopped, capsys, monkeypatch
):
    whole = fit(build_recipe({**recipe_values, "output": str(tmp_path / "whole")}), progress=False)
    flip(stopped.checkpoints_path / "checkpoint-10" / "optimizer.pt")
    monkeypatch.setattr(
        "badit.tuner.BaditModel.start_task", None
    )  # not called: the checkpoint has the clusters
    fit(build_recipe(recipe_values), progress=False)
    assert (
        "checkpoint-10 is damaged (optimizer.pt does not match seal.json)"
        in capsys.readouterr().err
    )
    assert_same(learned(stopped), learned(whole))
    assert stopped.metrics_path.read_text() == whole.metrics_path.read_text()


def put_code(checkpoint, pattern, marker, good):
    """Replaces a checkpoint by the good one with code in some files, and seals it."""
    for file in good.rglob(pattern):
        name = file.relative_to(good)
        replace_file(checkpoint, name, lambda path: torch.save(Mark(marker), path), good)


def replace_file(checkpoint, name, write, good):
    """Replaces a checkpoint by the good one with another file, and seals it."""
    staged = shutil.copytree(good, checkpoint.parent / STAGING / checkpoint.name)
    write(staged / name)
    (staged / SEAL).unlink()
    seal(staged, checkpoint.parent)


LEGACY = {"_use_new_zipfile_serialization": False}  # torch's format before 1.6


def with_code(path, marker):
    """Writes code next to the values that torch and transformers allow in a random state."""
    states = torch.load(path, weights_only=False)
    objects = np.array([Mark(marker)], dtype=object)
    torch.save({**states, "numpy": ("MT19937", objects, 1, 0, 0.0)}, path)


def test_pickled_code_in_sealed_checkpoint_is_never_executed(recipe_values, tmp_path, stopped):
    checkpoint, marker = stopped.checkpoints_path / "checkpoint-10", tmp_path / "attacked"
    good = shutil.copytree(checkpoint, tmp_path / "good")
    sums = good / "badit_sums.json"
    sums.write_text(sums.read_text().replace('"seconds": ', '"seconds": 1000'))
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        put_code(checkpoint, file, marker, good)
        assert last_checkpoint(stopped.checkpoints_path) == checkpoint
        if file == "training_args.bin":  # written by the Trainer, never read
            run = fit(build_recipe(recipe_values), progress=False)
            assert run.environment["training"]["seconds"] > 1000, (
                "includes the time before the checkpoint"
            )
        else:
            refuses(
                "checkpoint-10: contains pickled objects",
                fit,
                build_recipe(recipe_values),
                progress=False,
            )
        assert not marker.exists()


def test_code_in_a_random_state_and_in_a_pickled_adapter_is_never_executed(
    recipe_values, tmp_path, stopped
):
    checkpoint, marker = stopped.checkpoints_path / "checkpoint-10", tmp_path / "attacked"
    good = shutil.copytree(checkpoint, tmp_path / "good")
    attacks = [
        ("rng_state.pth", lambda path: with_code(path, marker)),
        ("scheduler.pt", lambda path: path.write_bytes(pickle.dumps(Mark(marker), protocol=2))),
        ("optimizer.pt", lambda path: torch.save(Mark(marker), path, **LEGACY)),
    ]
    for name, write in attacks:
        replace_file(checkpoint, name, write, good)
        message = "checkpoint-10: (contains pickled objects|cannot be resumed from)"
        refuses(message, fit, build_recipe(recipe_values), progress=False)
    (good / "adapter_model.safetensors").unlink()
    replace_file(checkpoint, "adapter_model.bin", lambda path: torch.save(Mark(marker), path), good)
    refuses("checkpoint-10: ", fit, build_recipe(recipe_values), progress=False)
    assert not marker.exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: torch.save([1, 2, 3], path),
    ],
    ids=["empty", "cut", "another type"],
)
def test_sealed_files_that_cannot_be_read_are_refused_in_one_line(
    recipe_values, tmp_path, stopped, write
):
    checkpoint = stopped.checkpoints_path / "checkpoint-10"
    good = shutil.copytree(checkpoint, tmp_path / "good")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
        replace_file(checkpoint, name, write, good)
        message = "checkpoint-10: .*remove the folder to resume from the previous checkpoint"
        error = refuses(message, fit, build_recipe(recipe_values), progress=False)
        assert "\n" not in error
    shutil.rmtree(checkpoint)
    fit(build_recipe(recipe_values), progress=False)


def test_signals_are_deferred_but_a_second_ctrl_c_interrupts_at_once(tmp_path, capfd):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    reached = []

    def signal_again_and_again():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            reached.append(number)

    with pytest.raises(KeyboardInterrupt), Checkpoints(None, tmp_path):
        signal_again_and_again()
    assert reached == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]
    assert (
        capfd.readouterr().err
        == "\nbadit: finishing the step and saving; press Ctrl-C again to stop now\n"
    )
    with pytest.raises(KeyboardInterrupt), Checkpoints(None, tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)  # as after the last step: raised on exit
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
