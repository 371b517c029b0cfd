"""Runs that report to trackers: what TensorBoard and Trackio have of them, read back from their files."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from badit.errors import BaditError
from badit.files import read_jsonl
from badit.recipe import build_recipe
from badit.run import Run
from badit.train import fit

# badit.train is the function of that name.
train_module = import_module("badit.train")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::DeprecationWarning:trackio")

REGROUPED = ("objective_before", "objective_after", "components_moved", "output_change")


def scalars(folder: Path, name: str) -> dict[int, float]:
    """Of TensorBoard's event files, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.fixture
def reporting(recipe_values: dict[str, Any]) -> dict[str, Any]:
    training = {**recipe_values["training"], "report_to": ["tensorboard"]}
    return {**recipe_values, "training": training}


def test_tensorboard_has_the_losses_and_the_regroupings(reporting: dict[str, Any]) -> None:
    run = fit(build_recipe(reporting), progress=False)
    events = run.path / "tensorboard"
    lines = list(read_jsonl(run.metrics_path))
    assert scalars(events, "train/loss") == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert not any(key.startswith("regroup/") for line in lines for key in line)
    regroupings = list(read_jsonl(run.regroupings_path))
    steps = {line["step"] for line in regroupings}
    assert steps == {3, 6, 9}
    for field in REGROUPED:
        found = scalars(events, f"train/regroup/{field}")
        assert found.keys() == steps
        for step in steps:
            values = [line[field] for line in regroupings if line["step"] == step]
            assert found[step] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert scalars(events, "train/regroup/intra_degrees").keys() == {6, 9}, "measured on the steps that follow"


def test_what_a_resumed_run_logs_again_takes_the_place_of_what_it_had(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for checkpoint, steps in ((None, (1, 2, 3, 4, 5)), (tmp_path / "checkpoint-3", (4, 5, 6))):
        (callback,) = train_module._tensorboard(["tensorboard"], tmp_path, checkpoint)
        for step in steps:
            logs = {"loss": bool(checkpoint) + step / 8}
            callback.on_log(arguments, TrainerState(global_step=step), TrainerControl(), logs)
    assert scalars(tmp_path / "tensorboard", "train/loss") == {
        1: 0.125, 2: 0.25, 3: 0.375, 4: 1.5, 5: 1.625, 6: 1.75
    }  # fmt: skip


def test_trackio_has_them_in_its_database(
    reporting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage  # not before, since it reads the variable once

    reporting["training"]["report_to"] = ["trackio"]
    run = fit(build_recipe(reporting), progress=False)
    logged = SQLiteStorage.get_logs("badit", run.path.name)
    losses = {entry["train/global_step"]: entry["train/loss"] for entry in logged if "train/loss" in entry}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in read_jsonl(run.metrics_path)})
    moved = {entry["train/global_step"] for entry in logged if "train/regroup/components_moved" in entry}
    assert moved == {3, 6, 9}


def test_a_tracker_that_is_not_installed_is_one_line(
    reporting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "get_available_reporting_integrations", list)
    with pytest.raises(BaditError, match=r"report_to: tensorboard is not installed; install it, or leave it out"):
        fit(build_recipe(reporting), progress=False)
    assert not Run(reporting["output"]).path.exists()


def test_an_unknown_tracker_is_refused_with_the_nearest_name(recipe_values: dict[str, Any]) -> None:
    with pytest.raises(BaditError, match=r"report_to: unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        build_recipe(recipe_values, ["training.report_to=[tensorbord]"])


def test_trackers_write_into_the_runs_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWANLAB_LOG_DIR", "elsewhere")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    with train_module._tracker_folders(["wandb", "swanlab", "mlflow"], tmp_path):
        assert (os.environ["WANDB_DIR"], os.environ["SWANLAB_LOG_DIR"]) == (str(tmp_path), "elsewhere")
    assert "WANDB_DIR" not in os.environ
