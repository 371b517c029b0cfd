"""Trains the runs of an experiment, and keeps what was measured of each in a file.

A run with a result is not trained again, and an interrupted training continues.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cell_losses import say

from badit.api import plan
from badit.evaluation.losses import validation_loss
from badit.runs.resolved import ResolvedRun
from badit.support.files import read_json, write_json
from badit.training.fit import fit

BENCHMARKS = Path(__file__).resolve().parents[1]
RECIPES = BENCHMARKS.parent / "recipes"

Measure = Callable[[ResolvedRun], Mapping[str, Any]]


def measured(
    recipe: Path, values: Mapping[str, Any], result_path: Path, measure: Measure
) -> dict[str, Any]:
    """Returns what is measured of a run after its training, with its environment and recipe.

    ``values`` override those of the recipe. They are kept in ``result_path``, and the run's folder
    is removed.
    """
    name = result_path.stem
    if not result_path.is_file():
        say(f"{name}: started")
        place = result_path.relative_to(BENCHMARKS / "results").with_suffix("")
        folder = BENCHMARKS.parent / "runs" / place
        run = plan(str(recipe), **{"compare": None, **values, "output": str(folder)})
        fit(run, progress=False)
        result = {
            **measure(run),
            "environment": run.folder.environment,
            "recipe": run.recipe.model_dump(mode="json", exclude={"output", "compare"}),
        }
        result_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result_path, result)
        shutil.rmtree(run.folder.path)
        say(f"{name}: done")
    return read_json(result_path)


def held_out_loss(recipe: Path, values: Mapping[str, Any], result_path: Path) -> float:
    """Returns the loss on held-out training instances, the mean over the tasks.

    Nothing is generated and no test instance is read.
    """
    return measured(recipe, values, result_path, _held_out_losses)["loss"]


def _held_out_losses(run: ResolvedRun) -> Mapping[str, Any]:
    validation_loss(run)
    return read_json(run.folder.validation_path)
