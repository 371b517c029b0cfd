"""Runs that report to trackers: the metrics in the files of TensorBoard and Trackio."""

import pandas as pd
import pytest

from badit import BaditError, Run, train
from badit.recipe.loading import build_recipe
from steps import fit
from training.trainers import fit_until

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tensorboard", "ignore::DeprecationWarning:trackio"
)


def test_tensorboard_has_losses_and_regroupings_of_a_resumed_run_once(recipe_values):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = build_recipe(recipe_values, ["training.report_to=[tensorboard]"])
    fit_until(8, recipe)
    run = fit(recipe, progress=False)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()

    def scalars(name):
        return {event.step: event.value for event in events.Scalars(name)}

    assert list(scalars("train/loss")) == [*range(1, 13)]
    assert scalars("train/loss") == pytest.approx(run.metrics.set_index("step")["loss"].to_dict())
    assert not any(key.startswith("regroup/") for key in run.metrics)
    means = pd.DataFrame(run.log(run.regroupings_path)).groupby("step").mean(numeric_only=True)
    for field in ("objective_before", "objective_after", "components_moved"):
        assert scalars(f"train/regroup/{field}") == pytest.approx(means[field].to_dict(), rel=1e-5)
    assert scalars("train/regroup/intra_degrees").keys() == {6, 9}, (
        "angles are measured on the following steps"
    )


def test_trackio_stores_losses_and_regroupings(recipe_values, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import (
        SQLiteStorage,  # imported here because it reads TRACKIO_DIR on import
    )

    run = fit(build_recipe(recipe_values, ["training.report_to=[trackio]"]), progress=False)
    logged = SQLiteStorage.get_logs("badit", run.path.name)
    found = {
        entry["train/global_step"]: entry["train/loss"] for entry in logged if "train/loss" in entry
    }
    assert found == pytest.approx(run.metrics.set_index("step")["loss"].to_dict())
    assert {
        entry["train/global_step"] for entry in logged if "train/regroup/components_moved" in entry
    } == {3, 6, 9}


def test_unknown_or_missing_tracker_is_refused(recipe_values, monkeypatch):
    with pytest.raises(
        BaditError,
        match=r"report_to: unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)",
    ):
        build_recipe(recipe_values, ["training.report_to=[tensorbord]"])
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.is_swanlab_available", lambda: False
    )
    with pytest.raises(
        BaditError, match=r"report_to: swanlab is not installed; install it, or leave it out"
    ):
        train(recipe_values, training={"report_to": ["swanlab"]}, progress=False)
    assert not Run.at(recipe_values["output"]).path.exists()
