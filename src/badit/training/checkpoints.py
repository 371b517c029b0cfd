"""Atomic checkpoints: written to a staging folder, sealed with the SHA-256 of every file, then renamed into place.

The Trainer writes to ``checkpoints/partial/``. A complete checkpoint is sealed and renamed to
``checkpoints/checkpoint-STEP``. If a run is killed at any point, the last sealed checkpoint stays intact.

The checksums detect damage, not tampering: whoever can write the files can also write the checksums. Files are read
with ``weights_only=True``, which runs no pickled code (:func:`safe_resuming`).
"""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from pkgutil import resolve_name
from types import FrameType
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import EarlyStoppingCallback, TrainerCallback

from badit.support.console import is_main_process, say
from badit.support.errors import BaditError
from badit.support.files import read_json, replace_folder, write_json
from badit.tuner.distributed import any_of_all

STAGING = "partial"
SEAL = "seal.json"
_PREFIX = "checkpoint-"
_SUMS = "badit_sums.json"
_DEEPSPEED_TYPES = (  # the objects in DeepSpeed's checkpoints, apart from tensors and plain values
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)


def last_checkpoint(checkpoints: Path) -> Path | None:
    """Returns the newest undamaged checkpoint, if any; rank 0 reports the damaged checkpoints that are skipped."""
    for folder in reversed(_folders(checkpoints)):
        try:
            sealed, present = read_json(folder / SEAL), checksums(folder)
            changed = [
                name
                for name in sealed.keys() | present.keys()
                if sealed.get(name) != present.get(name)
            ]
            if not changed:
                return folder
            damage = f"{min(changed)} does not match seal.json"
        except (BaditError, OSError) as error:
            damage = str(error).removeprefix(f"{folder}/")
        if is_main_process():
            say(f"badit: {folder} is damaged ({damage}); trying the previous checkpoint")
    return None


def seal(staged: Path, checkpoints: Path, best: str | None = None) -> None:
    """Seals a staged checkpoint, moves it to ``checkpoints``, and deletes all others but the previous and ``best``."""
    write_json(staged / SEAL, checksums(staged))
    final = checkpoints / staged.name
    replace_folder(staged, final)
    # Checkpoints of later steps are left from before the run resumed from an earlier step.
    earlier = [folder.name for folder in _folders(checkpoints) if step_of(folder) < step_of(final)]
    for folder in _folders(checkpoints):
        if folder.name not in (final.name, *earlier[-1:], best):
            shutil.rmtree(folder)


def discard(folder: Path) -> None:
    """Removes a folder if it exists; only rank 0 removes it."""
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def engine_of(trainer: Any) -> str:
    """Returns the engine that determines the format of a trainer's checkpoints (of weights and optimizer state)."""
    if trainer.is_deepspeed_enabled:  # every rank has its own file
        return f"DeepSpeed in {trainer.accelerator.num_processes} processes"
    return "FSDP, unsharded" if trainer.is_fsdp_enabled else "neither FSDP nor DeepSpeed"


@contextmanager
def safe_resuming(trainer: Any, checkpoint: Path | None) -> Iterator[None]:
    """A context for a training that may resume, in which torch executes no pickled code of the ``checkpoint``.

    FSDP's checkpoints become single files of the trained weights, because torch unpickles sharded ones unrestrictedly.
    DeepSpeed, which asks torch for its unrestricted reader, gets the restricted one.

    BaditError if the checkpoint is another engine's, has tensors of other shapes, or other pickled objects.
    """
    wrote = None if checkpoint is None else read_json(checkpoint / _SUMS).get("engine")
    if wrote not in (None, engine_of(trainer)):
        fix = "launch the training in the same way, or remove the run's folder to start over"
        raise BaditError(f"{checkpoint}: was written with {wrote}; {fix}")
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.state_dict_config = plugin.optim_state_dict_config = (
            None  # else those of the former type are kept
        )
        plugin.set_state_dict_type("FULL_STATE_DICT")
    known = (
        [resolve_name(name) for name in _DEEPSPEED_TYPES] if trainer.is_deepspeed_enabled else []
    )
    variables = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"} if trainer.is_deepspeed_enabled else {}
    try:
        with patch_environment(**variables), torch.serialization.safe_globals(known):
            yield
    except UnpicklingError:  # torch's loader found something other than tensors and plain values
        problem = "contains pickled objects that badit does not write, which were not executed"
        raise BaditError(
            f"{checkpoint}: {problem}; remove the folder to resume from the previous checkpoint"
        ) from None
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        problem = "does not fit the run, as after a change of the number of tasks"
        raise BaditError(
            f"{checkpoint}: {problem}; restore them, or remove the run's folder to start over"
        ) from None


class Checkpoints(TrainerCallback):
    """Seals the checkpoint that the Trainer and the callbacks before this one, the last, have written.

    It also saves what the Trainer does not save: the sum of the losses since the last log line (without it, the next
    line would be a mean over fewer steps), the number of skipped steps, the time, and the name of the best checkpoint.

    In its context, Ctrl-C or SIGTERM to any process finishes the step, saves a checkpoint, then stops all processes. A
    second Ctrl-C stops at once. Incomplete checkpoints are deleted.
    """

    def __init__(self, trainer: Any, checkpoints: Path) -> None:
        self._trainer = trainer
        self._checkpoints, self._began = checkpoints, time.monotonic()
        self._asked = self._stopping = False
        self._former: dict[int, Any] = {}

    @property
    def seconds(self) -> float:
        """The time of the training, and of its interrupted parts up to the checkpoints that it resumed from."""
        return time.monotonic() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            kept = read_json(resumed_checkpoint(args, state) / _SUMS)
            self._began -= kept.get("seconds", 0.0)  # checkpoints of earlier releases have no time
            # Private names of the Trainer, which has no public way to set them.
            self._trainer._tr_loss += kept["loss"]
            self._trainer._globalstep_last_logged = kept["last_logged_step"]
            self._trainer.skipped_steps = kept["skipped_steps"]
            state.best_model_checkpoint = kept["best"] and str(
                self._checkpoints / Path(kept["best"]).name
            )
            for callback in self._trainer.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback):
                    vars(callback).update(
                        state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]
                    )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The log has the mean over the ranks, so every rank resumes with this mean.
        mean = self._trainer.accelerator.reduce(self._trainer._tr_loss, reduction="mean")
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
        self._trainer.accelerator.wait_for_everyone()  # every rank writes its part
        if state.is_world_process_zero:
            kept = {
                "loss": float(mean),
                "last_logged_step": self._trainer._globalstep_last_logged,
                "skipped_steps": self._trainer.skipped_steps,
                "best": best,
                "seconds": round(self.seconds, 1),
                "engine": engine_of(self._trainer),
            }
            staged = checkpoint_being_written(args, state)
            write_json(staged / _SUMS, kept)
            seal(staged, self._checkpoints, best)
        if best:  # the Trainer has its path in the staging folder
            state.best_model_checkpoint = str(self._checkpoints / best)
        self._trainer.accelerator.wait_for_everyone()
        if self._stopping:
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        discard(self._checkpoints / STAGING)  # left by a killed process
        with suppress(
            ValueError
        ):  # only the main thread may set handlers; in other threads the caller handles them
            self._former = {
                number: signal.signal(number, self._handle)
                for number in (signal.SIGINT, signal.SIGTERM)
            }

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if error[0] is not None:
            discard(self._checkpoints / STAGING)
        elif any_of_all(
            self._asked
        ):  # the signal came after the last step, which saved a checkpoint
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if (
            self._asked and number == signal.SIGINT
        ):  # SIGTERM may come twice: from a batch system and from torchrun
            raise KeyboardInterrupt
        if is_main_process() and not self._asked:  # print is not safe in a signal handler
            os.write(2, b"\nbadit: finishing the step and saving; press Ctrl-C again to stop now\n")
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stopping = any_of_all(self._asked)
        control.should_save |= self._stopping


def checkpoint_being_written(args: Any, state: Any) -> Path:
    """Returns the folder of the Trainer's checkpoint for this step; a hyperparameter search has subfolders."""
    output, name = Path(args.output_dir), f"{_PREFIX}{state.global_step}"
    trials = output.glob(f"*/{name}") if state.is_hyper_param_search else ()
    return max(trials, key=os.path.getmtime, default=output / name)


def resumed_checkpoint(args: Any, state: Any) -> Path:
    """Returns the folder that a run resumes from: ``resume_from_checkpoint``, else that of the current step."""
    given = args.resume_from_checkpoint
    return (
        Path(given)
        if isinstance(given, str) and Path(given).is_dir()
        else checkpoint_being_written(args, state)
    )


def _folders(checkpoints: Path) -> list[Path]:
    """Returns the checkpoint folders, sorted by step."""
    folders = [
        folder
        for folder in checkpoints.glob(f"{_PREFIX}*")
        if folder.name.removeprefix(_PREFIX).isdecimal()
    ]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Returns the number of optimizer steps that precede a checkpoint."""
    return int(folder.name.removeprefix(_PREFIX))


def checksums(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Returns the SHA-256 of every file with such a name except the seal, by path relative to the folder."""
    sums = {}
    for path in sorted(folder.rglob(pattern)):
        if path != folder / SEAL and (
            path.is_symlink() or not path.is_dir()
        ):  # a link to a folder cannot be read
            # Without waiting: a pipe reads as empty.
            with open(
                path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
            ) as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return sums
