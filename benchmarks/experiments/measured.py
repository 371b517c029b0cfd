"""Trains runs of an experiment and measures their loss on held-out training instances.

Nothing is generated and no test instance is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cell_losses import say

from badit.api import plan
from badit.evaluation.losses import validation_loss
from badit.support.files import read_json, write_json
from badit.training.fit import fit


def held_out_loss(recipe: Mapping[str, Any], run_folder: Path, result_path: Path) -> float:
    """Returns a run's loss, the mean over tasks, from its result, or trains the run first.

    An interrupted training continues. ``result_path`` gets the losses by task, the environment and
    the recipe; the run's folder is removed.
    """
    if not result_path.is_file():
        say(f"{result_path.stem}: started")
        run = plan({**recipe, "output": str(run_folder)})
        fit(run, progress=False)
        validation_loss(run)
        losses = read_json(run.folder.validation_path)
        result = {
            **losses,
            "environment": run.folder.environment,
            "recipe": run.recipe.model_dump(mode="json", exclude={"output", "compare"}),
        }
        result_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result_path, result)
        shutil.rmtree(run.folder.path)
        say(f"{result_path.stem}: held-out loss {losses['loss']:.4f}")
    return read_json(result_path)["loss"]
