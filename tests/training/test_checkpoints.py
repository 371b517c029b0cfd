"""Checkpoints are whole or not there; a damaged one is named and passed over; none of them is run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from badit.checkpoint import SEAL, STAGING, damage_of, last_checkpoint, seal
from badit.cli import main
from badit.errors import BaditError
from badit.methods import AdapterMethod
from badit.recipe import build_recipe
from badit.run import Run
from badit.train import fit
from training.trainers import StopAt


def sealed(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / STAGING / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "shards" / "0.bin").write_bytes(bytes(range(step)))
    seal(folder, checkpoints)
    return checkpoints / folder.name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda folder: cut(folder / "shards" / "0.bin"), "shards/0.bin has changed"),
    "flipped": (lambda folder: flip(folder / "shards" / "0.bin"), "shards/0.bin has changed"),
    "removed": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "added": (lambda folder: (folder / "new.bin").touch(), "new.bin does not belong to it"),
    "unsealed": (lambda folder: (folder / SEAL).unlink(), "seal.json: cannot be read (No such file"),
    "seal cut": (lambda folder: (folder / SEAL).write_text("{"), "seal.json: invalid JSON"),
    "seal of a list": (lambda folder: (folder / SEAL).write_text("[]"), "seal.json: must hold one JSON object"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, message = DAMAGES[name]
    good, bad = sealed(tmp_path, 5), sealed(tmp_path, 10)
    assert last_checkpoint(tmp_path) == bad
    damage(bad)
    assert last_checkpoint(tmp_path) == good
    line = capsys.readouterr().err
    assert line.startswith(f"badit: {bad} is damaged (")
    assert message in line
    assert damage_of(good) is None


def test_two_checkpoints_are_kept_and_none_of_another_future(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        sealed(tmp_path, step)
    assert {folder.name for folder in tmp_path.iterdir()} == {STAGING, "checkpoint-10", "checkpoint-15"}
    flip(tmp_path / "checkpoint-15" / "shards" / "0.bin")
    sealed(tmp_path, 12)
    assert {folder.name for folder in tmp_path.iterdir()} == {STAGING, "checkpoint-10", "checkpoint-12"}
    (tmp_path / "checkpoint-tmp").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.fixture
def stopped(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of twelve steps, stopped after its eleventh: with checkpoints of steps 5 and 10."""
    with monkeypatch.context() as patch:
        callbacks = AdapterMethod.callbacks
        patch.setattr(AdapterMethod, "callbacks", lambda self, run: [*callbacks(self, run), StopAt(11)])
        with pytest.raises(KeyboardInterrupt):
            fit(build_recipe(recipe_values), progress=False)
    run = Run(recipe_values["output"])
    assert {folder.name for folder in run.checkpoints_path.iterdir()} == {"checkpoint-5", "checkpoint-10"}
    return run


def test_a_run_goes_on_from_the_last_good_checkpoint(
    recipe_values: dict[str, Any], tmp_path: Path, stopped: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(stopped.checkpoints_path / "checkpoint-10" / "optimizer.pt")
    fit(build_recipe(recipe_values), progress=False)
    assert "checkpoint-10 is damaged (optimizer.pt has changed); going on" in capsys.readouterr().err
    fit(build_recipe({**recipe_values, "output": str(tmp_path / "whole")}), progress=False)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_code_in_a_checkpoint_is_run_not_even_in_one_that_is_sealed(
    recipe_values: dict[str, Any], tmp_path: Path, stopped: Run, file: str
) -> None:
    marker = tmp_path / "attacked"
    checkpoint = stopped.checkpoints_path / "checkpoint-10"
    torch.save(Attack(marker), checkpoint / file)
    (checkpoint / SEAL).unlink()
    staged = stopped.checkpoints_path / STAGING / "checkpoint-10"
    shutil.copytree(checkpoint, staged)
    seal(staged, stopped.checkpoints_path)
    assert last_checkpoint(stopped.checkpoints_path) == checkpoint

    if file == "training_args.bin":  # which the trainer writes and nobody reads
        fit(build_recipe(recipe_values), progress=False)
    else:
        with pytest.raises(BaditError, match="checkpoint-10: holds what no training has written there"):
            fit(build_recipe(recipe_values), progress=False)
    assert not marker.exists()


def test_the_attack_would_work_on_an_unsafe_loader(tmp_path: Path) -> None:
    torch.save(Attack(tmp_path / "attacked"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "attacked").exists()


def test_a_full_disk_ends_the_command_with_code_2(
    recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_values))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"badit: {tmp_path / 'run'}: cannot be written, the disk (or a quota) is full; "
        "make room and run the same command again"
    )
    assert not list(Run(tmp_path / "run").checkpoints_path.rglob("*.json")), "no half checkpoint takes room"
    assert main(["train", str(path)]) == 0
