"""Experiment trackers (``training.report_to``): transformers' own, with their files in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import TensorBoardCallback, get_available_reporting_integrations

from badit.checkpoint import step_of
from badit.environment import is_main_process
from badit.errors import BaditError
from badit.recipe import Recipe

# Says where SwanLab writes its files. W&B reads its own variable once per process.
_SWANLAB_FOLDER = "SWANLAB_LOG_DIR"


def trackers_of(recipe: Recipe) -> list[str]:
    """The experiment trackers to report to.

    Raises:
        BaditError: one is not installed.
    """
    names, installed = recipe.training.report_to, get_available_reporting_integrations()
    for name in names:
        if name not in installed and name != "all":
            raise BaditError(f"training.report_to: {name} is not installed; install it, or leave it out")
    return installed if "all" in names else names


def tensorboard(names: list[str], folder: Path, checkpoint: Path | None) -> list[TensorBoardCallback]:
    """HF's callback, which by itself could neither write into the run's folder nor hide steps that are logged again."""
    if "tensorboard" not in names or not is_main_process():
        return []
    from torch.utils.tensorboard import SummaryWriter

    purge_step = None if checkpoint is None else step_of(checkpoint) + 1
    return [TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step))]


@contextmanager
def tracker_folders(names: list[str], folder: Path) -> Iterator[None]:
    """Within, trackers write their files into the run's folder, unless the user's environment names another one.

    W&B's run begins and ends here: HF's callback ends none, so that a sequence's next stage would log to it.
    """
    wandb: Any = import_module("wandb") if "wandb" in names and is_main_process() else None
    run: AbstractContextManager[Any] = nullcontext()
    if wandb and wandb.run is None:
        project, where = os.environ.get("WANDB_PROJECT", "badit"), os.environ.get("WANDB_DIR", str(folder))
        run = wandb.init(project=project, dir=where, name=folder.resolve().name)
    sets_folder = "swanlab" in names and _SWANLAB_FOLDER not in os.environ
    if sets_folder:
        os.environ[_SWANLAB_FOLDER] = str(folder)
    try:
        with run:
            yield
    finally:
        if sets_folder:
            del os.environ[_SWANLAB_FOLDER]
