"""The metrics file, the progress bar and the experiment trackers of a training."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_available_reporting_integrations,
)

from badit.recipe.arguments import TrainingSection
from badit.support.console import is_main_process
from badit.support.errors import BaditError
from badit.support.files import append_to_log, rewind_log
from badit.training.checkpoints import step_of
from badit.training.trainer import AnswerTrainer

_LOSSES = ("loss", "eval_loss")
_LAST_NORMS = 3  # a single step may have no answers, and then a gradient of 0


class MetricsLog(TrainerCallback):
    """Appends the Trainer's log lines to a file, without those that a resumed run will log again.

    It has no run times and no throughput, which depend on the process, and no metrics of
    regroupings, which regroupings.jsonl has by layer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            rewind_log(self._path, state.global_step)

    def on_log(self, args, state, control, **kwargs):
        logs = kwargs["logs"]
        # The Trainer's final summary has train_loss instead.
        if state.is_world_process_zero and logs.keys() & {*_LOSSES}:
            append_to_log(self._path, {"step": state.global_step, **_metrics(logs)})


def _metrics(logs: Mapping[str, float]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for name, value in logs.items():
        if name.endswith(("_runtime", "_per_second")) or name.startswith("regroup/"):
            continue
        # JSON has no NaN or infinity: such a loss becomes null, and other such values (grad_norm)
        # are omitted.
        if math.isfinite(value):
            metrics[name] = value
        elif name in _LOSSES:
            metrics[name] = None
    return metrics


def divergence(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns what is wrong with the last gradient norms of a training's log lines, or None.

    They are wrong if all are 0 or not finite, as after a learning rate that is far too high.
    """
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line][-_LAST_NORMS:]
    if not norms or any(0 < norm < math.inf for norm in norms):
        return None
    return f"the last gradient norms are {', '.join(f'{norm:g}' for norm in norms)}"


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, which starts at the resumed step and shows the latest losses."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._losses: dict[str, str] = {}
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                desc="Training",
                unit="step",
                dynamic_ncols=True,
                total=state.max_steps,
                initial=state.global_step,
            )

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        for name in _LOSSES:
            if name in logs:
                self._losses[name] = f"{logs[name]:.3f}"
        if self.training_bar is not None:
            # Shown with the bar's next update, at the end of the step.
            self.training_bar.set_postfix(self._losses, refresh=False)

    def close(self) -> None:
        """Closes the bars, so that later output starts on a new line."""
        # The base class closes them at the end of training, which an error does not reach.
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


def trackers_of(training: TrainingSection) -> list[str]:
    """Returns the experiment trackers to report to; BaditError if one is not installed."""
    installed = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in (*installed, "all"):
            raise BaditError(
                f"training.report_to: {name} is not installed; install it, or leave it out"
            )
    if "all" in training.report_to:
        return installed
    return training.report_to


@contextmanager
def tracking(trainer: AnswerTrainer, folder: Path, checkpoint: Path | None) -> Iterator[None]:
    """A context in which trackers write to the run's folder.

    Environment variables can name another folder. TensorBoard hides the steps after ``checkpoint``,
    which are logged again. The W&B run begins and ends here: transformers does not end it, so the
    next stage of a sequence would log to it.
    """
    # transformers' callbacks of trackers write on rank 0 only.
    if not is_main_process():
        yield
        return
    trackers = trackers_of(trainer.options)

    if "tensorboard" in trackers:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None
        if checkpoint is not None:
            # TensorBoard hides the purge step itself too.
            purge_step = step_of(checkpoint) + 1
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        # Not by report_to: transformers' own writer has no purge_step.
        trainer.add_callback(TensorBoardCallback(writer))

    with ExitStack() as stack:
        if "wandb" in trackers:
            wandb = import_module("wandb")
            # A run that the caller has started also ends with the caller.
            if wandb.run is None:
                run = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "badit"),
                    # Given here, because wandb reads the variable once per process.
                    dir=os.environ.get("WANDB_DIR", str(folder)),
                    name=folder.resolve().name,
                )
                stack.enter_context(run)
        swanlab_folder = os.environ.get("SWANLAB_LOG_DIR", folder)
        stack.enter_context(patch_environment(SWANLAB_LOG_DIR=swanlab_folder))
        yield
