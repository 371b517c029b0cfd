"""The arguments of transformers' Trainer, from a resolved run."""

from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import is_liger_kernel_available

from badit.recipe.arguments import TrainingSection, argument_names
from badit.runs.resolved import ResolvedRun
from badit.support.errors import BaditError, explained
from badit.training.checkpoints import STAGING
from badit.training.loading import model_dtype
from badit.training.logs import trackers_of

_OLDEST_TRL = (1, 16)


def training_arguments(
    run: ResolvedRun, folder: Path, seed: int, checkpoint: Path | None = None
) -> TrainingArguments:
    """Returns a recipe's training arguments with those that badit sets.

    BaditError if they are incompatible. The first call in a process starts its group of processes.
    """
    recipe = run.recipe
    settings = recipe.training.model_dump(include=argument_names())  # without badit's own fields
    defaults = {
        # Trained base weights are stored in float32.
        "bf16": run.method.trains_base_weights and model_dtype(recipe) == "bfloat16",
        # transformers needs it for bf16 and for several processes.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": False,
        # The level of rank 0; else the other ranks print warnings that it hides.
        "log_level_replica": "passive",
        "project": "badit",
        "run_name": folder.resolve().name,
    }
    if settings.pop("gradient_checkpointing"):
        settings |= _gradient_checkpointing()
    fixed = {
        "output_dir": str(folder / "checkpoints" / STAGING),
        # Read by the callbacks.
        "resume_from_checkpoint": None if checkpoint is None else str(checkpoint),
        "seed": seed,
        # For tensorboard, see tracking().
        "report_to": [name for name in trackers_of(recipe.training) if name != "tensorboard"],
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "prediction_loss_only": True,
        "per_device_eval_batch_size": recipe.evaluation.batch_size,
    }
    if settings.get("use_liger_kernel") and not is_liger_kernel_available():
        problem = "liger-kernel is not installed; install it, or remove this key"
        raise BaditError(f"training.use_liger_kernel: {problem}")
    keeps_best = settings.pop("load_best_model_at_end")
    if keeps_best or settings.get("save_strategy") == "best":
        settings["metric_for_best_model"] = "loss"
    make = TrainingArguments
    if recipe.training.objective == "dpo":
        refuse_without_trl(recipe.training)
        from badit.training.preferences import dpo_arguments

        make = partial(dpo_arguments, recipe.training)
    # Incompatible values, or DeepSpeed is not installed.
    with explained("training", action="used", any_error=True):
        arguments = make(**{**defaults, **settings, **fixed})
    # Set afterwards: transformers refuses other intervals of checkpoints, but AnswerTrainer saves
    # at every evaluation.
    arguments.load_best_model_at_end = keeps_best
    return arguments


def refuse_without_trl(training: TrainingSection) -> None:
    """Raises BaditError if TRL is needed and not installed."""
    if training.objective != "dpo":
        return
    if find_spec("trl") is not None:
        major, minor = version("trl").split(".")[:2]
        if (int(major), int(minor)) >= _OLDEST_TRL:
            return
    needed = ".".join(map(str, _OLDEST_TRL))
    raise BaditError(
        f"training.objective: dpo needs TRL {needed} or newer: pip install 'badit[trl]'"
    )


def _gradient_checkpointing() -> dict[str, Any]:
    # transformers renamed it within version 5.
    is_renamed = "activation_checkpointing" in argument_names()
    name = "activation_checkpointing" if is_renamed else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
