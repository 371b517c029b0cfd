"""Atomic checkpoints: written to a staging folder, sealed with checksums, then renamed into place.

The Trainer writes to ``checkpoints/partial/``. A complete checkpoint is sealed with the SHA-256 of
every file and renamed to ``checkpoints/checkpoint-STEP``. If a run is killed at any point, the last
sealed checkpoint stays intact.

The checksums detect damage, not tampering: whoever can write the files can also write the
checksums. Files are read with ``weights_only=True``, which runs no pickled code
(:func:`safe_resuming`).
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

from badit.support.console import is_main_process, say_once
from badit.support.errors import BaditError, first_line
from badit.support.files import read_json, replace_folder, write_json
from badit.tuner.distributed import any_of_all

STAGING = "partial"
SEAL = "seal.json"
_PREFIX = "checkpoint-"
_SUMS = "badit_sums.json"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEEPSPEED_TYPES = (  # the objects in DeepSpeed's checkpoints, apart from tensors and plain values
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)


def last_checkpoint(checkpoints: Path) -> Path | None:
    """Returns the newest undamaged checkpoint, if any; rank 0 reports the damaged ones."""
    for folder in reversed(_folders(checkpoints)):
        damage = _damage(folder)
        if damage is None:
            return folder
        say_once(f"badit: {folder} is damaged ({damage}); trying the previous checkpoint")
    return None


def _damage(folder: Path) -> str | None:
    """Compares a checkpoint with its seal; returns the first difference, or None."""
    try:
        sealed = read_json(folder / SEAL)
        present = checksums(folder)
    except (BaditError, OSError) as error:
        return str(error).removeprefix(f"{folder}/")
    changed = [
        name for name in sealed.keys() | present.keys() if sealed.get(name) != present.get(name)
    ]
    if not changed:
        return None
    return f"{min(changed)} does not match seal.json"


def seal(staged: Path, checkpoints: Path, best: str | None = None) -> None:
    """Seals a staged checkpoint and moves it to ``checkpoints``.

    All other checkpoints but the previous one and ``best`` are deleted.
    """
    write_json(staged / SEAL, checksums(staged))
    final = checkpoints / staged.name
    replace_folder(staged, final)

    # Checkpoints of later steps are left from before the run resumed from an earlier step.
    folders = _folders(checkpoints)
    previous = [folder.name for folder in folders if step_of(folder) < step_of(final)][-1:]
    for folder in folders:
        if folder.name not in (final.name, *previous, best):
            shutil.rmtree(folder)


def discard(folder: Path) -> None:
    """Removes a folder if it exists; only rank 0 removes it."""
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def engine_of(trainer: Any) -> str:
    """Returns the engine that determines the format of the weights and the optimizer's state."""
    if trainer.is_deepspeed_enabled:  # every rank has its own file
        return f"DeepSpeed in {trainer.accelerator.num_processes} processes"
    if trainer.is_fsdp_enabled:
        return "FSDP, unsharded"
    return "neither FSDP nor DeepSpeed"


@contextmanager
def safe_resuming(trainer: Any, checkpoint: Path | None) -> Iterator[None]:
    """A context for a training that may resume, in which torch executes no pickled code.

    FSDP's checkpoints become single files of the trained weights, because torch unpickles sharded
    ones unrestrictedly. DeepSpeed, which asks torch for its unrestricted reader, gets the
    restricted one.

    BaditError if the checkpoint is another engine's, has tensors of other shapes, other pickled
    objects, or cannot be read for another reason.
    """
    first_step = _FirstStep()
    if checkpoint is not None:
        _refuse_other_engine(trainer, checkpoint)
        trainer.add_callback(first_step)
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        # Otherwise the configurations of the former type are kept.
        plugin.state_dict_config = None
        plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("FULL_STATE_DICT")

    variables = {}
    allowed_types = []
    if trainer.is_deepspeed_enabled:
        variables = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
        allowed_types = [resolve_name(name) for name in _DEEPSPEED_TYPES]
    try:
        with patch_environment(**variables), torch.serialization.safe_globals(allowed_types):
            yield
    except UnpicklingError:  # torch's loader found something other than tensors and plain values
        problem = "contains pickled objects that badit does not write, which were not executed"
        fix = "remove the folder to resume from the previous checkpoint"
        raise BaditError(f"{checkpoint}: {problem}; {fix}") from None
    except BaditError:
        raise
    except Exception as error:
        if checkpoint is None or first_step.has_begun:
            raise
        # Before the first step the trainer only loads, and a damaged file can raise any error.
        problem = f"cannot be resumed from ({first_line(error)})"
        fix = "remove the folder to resume from the previous checkpoint"
        if "size mismatch" in str(error):
            problem = "does not fit the run, as after a change of the number of tasks"
            fix = "restore them, or remove the run's folder to start over"
        raise BaditError(f"{checkpoint}: {problem}; {fix}") from None


class _FirstStep(TrainerCallback):
    """Notes that a training has begun its first step."""

    has_begun = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.has_begun = True


def _refuse_other_engine(trainer: Any, checkpoint: Path) -> None:
    engine = read_json(checkpoint / _SUMS).get("engine")
    if engine != engine_of(trainer):
        raise BaditError(
            f"{checkpoint}: was written with {engine}; launch the training in the same way, or "
            "remove the run's folder to start over"
        )


class Checkpoints(TrainerCallback):
    """Seals the checkpoint that the Trainer and the callbacks before this one have written.

    It must be the last callback. It also saves what the Trainer does not save: the sum of the
    losses since the last log line (without it, the next line would be a mean over fewer steps), the
    number of skipped steps, the time, and the name of the best checkpoint.

    In its context, Ctrl-C or SIGTERM to any process finishes the step, saves a checkpoint, then
    stops all processes. A second Ctrl-C stops at once. Incomplete checkpoints are deleted.
    """

    def __init__(self, trainer: Any, checkpoints: Path) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._began = time.monotonic()
        self._asked = False  # a signal has come to this process
        self._stopping = False  # a signal has come to some process
        self._former_handlers: dict[int, Any] = {}

    @property
    def seconds(self) -> float:
        """The time of the training, with its earlier parts up to the resumed checkpoints."""
        return time.monotonic() - self._began

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            return
        sums = read_json(resumed_checkpoint(args, state) / _SUMS)
        self._began -= sums["seconds"]
        # Private names of the Trainer, which has no public way to set them.
        self._trainer._tr_loss += sums["loss"]
        self._trainer._globalstep_last_logged = sums["last_logged_step"]
        self._trainer.skipped_steps = sums["skipped_steps"]
        self._trainer.sums = sums.get("metrics", {})
        self._set_best(state, sums["best"])
        saved: Any = state.stateful_callbacks
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                # The Trainer restores callbacks only with restore_callback_states_from_checkpoint.
                vars(callback).update(saved["EarlyStoppingCallback"]["attributes"])

    def on_save(self, args, state, control, **kwargs):
        accelerator = self._trainer.accelerator
        # The log has the mean over the ranks, so every rank resumes with this mean.
        mean_loss = accelerator.reduce(self._trainer._tr_loss, reduction="mean")
        best = state.best_model_checkpoint
        if best is not None:  # the Trainer has its path in the staging folder
            best = Path(best).name
        accelerator.wait_for_everyone()  # every rank writes its part
        if state.is_world_process_zero:
            staged = checkpoint_being_written(args, state)
            sums = {
                "loss": float(mean_loss),
                "last_logged_step": self._trainer._globalstep_last_logged,
                "skipped_steps": self._trainer.skipped_steps,
                "metrics": self._trainer.sums,
                "best": best,
                "seconds": round(self.seconds, 1),
                "engine": engine_of(self._trainer),
            }
            write_json(staged / _SUMS, sums)
            seal(staged, self._checkpoints, best)
        self._set_best(state, best)
        accelerator.wait_for_everyone()
        if self._stopping:
            raise KeyboardInterrupt

    def _set_best(self, state: Any, best: str | None) -> None:
        # Whatever path a file names, the best checkpoint is one of this run.
        if best is not None:
            best = str(self._checkpoints / Path(best).name)
        state.best_model_checkpoint = best

    def __enter__(self) -> None:
        discard(self._checkpoints / STAGING)  # left by a killed process
        # Only the main thread may set handlers; in other threads the caller handles the signals.
        with suppress(ValueError):
            for number in _SIGNALS:
                self._former_handlers[number] = signal.signal(number, self._handle)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        if error[0] is not None:
            discard(self._checkpoints / STAGING)
        elif any_of_all(self._asked):
            # The signal came after the last step, which saved a checkpoint.
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # SIGTERM may come twice: from a batch system and from torchrun.
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if is_main_process() and not self._asked:
            # print is not safe in a signal handler.
            os.write(2, b"\nbadit: finishing the step and saving; press Ctrl-C again to stop now\n")
        self._asked = True

    def on_step_end(self, args, state, control, **kwargs):
        self._stopping = any_of_all(self._asked)
        control.should_save |= self._stopping


def checkpoint_being_written(args: Any, state: Any) -> Path:
    """Returns the folder of the Trainer's checkpoint for this step.

    ``Trainer.hyperparameter_search`` writes it into a subfolder for each trial.
    """
    name = f"{_PREFIX}{state.global_step}"
    folder = Path(args.output_dir, name)
    if not state.is_hyper_param_search:
        return folder
    trials = Path(args.output_dir).glob(f"*/{name}")
    return max(trials, key=os.path.getmtime, default=folder)


def resumed_checkpoint(args: Any, state: Any) -> Path:
    """Returns the folder that a run resumes from.

    It is ``resume_from_checkpoint``, or else the checkpoint of the current step.
    """
    folder = args.resume_from_checkpoint
    if isinstance(folder, str) and Path(folder).is_dir():
        return Path(folder)
    return checkpoint_being_written(args, state)


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
    """Returns the SHA-256 of every file with such a name except the seal, by relative path."""
    sums = {}
    for path in sorted(folder.rglob(pattern)):
        is_folder = path.is_dir() and not path.is_symlink()  # reading a link to a folder fails
        if is_folder or path == folder / SEAL:
            continue
        with open(path, "rb", opener=_open_without_waiting) as file:
            name = path.relative_to(folder).as_posix()
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer reads as empty
