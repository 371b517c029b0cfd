"""Checkpoints that are whole or not there: written apart, sealed with every file's SHA-256, then renamed into place.

The trainer writes into ``checkpoints/partial/``. A complete checkpoint is sealed and becomes
``checkpoints/checkpoint-STEP``. Whatever ends a run, and whenever, the last sealed checkpoint is untouched.

A seal finds damage, not malice: who can write the files can write the seal. So nothing of a checkpoint is unpickled
except by torch's loader of plain tensors and numbers (``weights_only=True``, which transformers uses throughout).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from badit.environment import is_main_process
from badit.errors import BaditError, say
from badit.files import read_json, replace_folder, write_json
from badit.gradients import any_of_all

STAGING = "partial"
SEAL = "seal.json"
_PREFIX = "checkpoint-"
_SUMS = "badit_sums.json"


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is as it was sealed; the first process says which damaged ones it passes over."""
    for folder in reversed(_folders(checkpoints)):
        try:
            sealed, present = read_json(folder / SEAL), _checksums(folder)
            changed = [name for name in sealed.keys() | present.keys() if sealed.get(name) != present.get(name)]
            if not changed:
                return folder
            damage = f"{min(changed)} is not as it was sealed"
        except (BaditError, OSError) as error:
            damage = str(error).removeprefix(f"{folder}/")
        if is_main_process():
            say(f"badit: {folder} is damaged ({damage}); continuing from the one before it")
    return None


def seal(staged: Path, checkpoints: Path, best: str | None = None) -> None:
    """Seals a complete folder and puts it among the checkpoints, of which the one before and ``best`` are kept."""
    write_json(staged / SEAL, _checksums(staged))
    final = checkpoints / staged.name
    replace_folder(staged, final)
    # Checkpoints of later steps are of a run that ended before this one was resumed from an earlier step.
    earlier = [folder.name for folder in _folders(checkpoints) if step_of(folder) < step_of(final)]
    for folder in _folders(checkpoints):
        if folder.name not in (final.name, *earlier[-1:], best):
            shutil.rmtree(folder)


def discard(folder: Path) -> None:
    """Removes a folder that may not be there; of several processes the first does."""
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def engine_of(trainer: Any) -> str:
    """What decides the form of a trainer's checkpoints: each engine has its own for weights and optimizer."""
    if trainer.is_deepspeed_enabled:  # every process has a file of its own
        return f"DeepSpeed in {trainer.accelerator.num_processes} processes"
    return "FSDP" if trainer.is_fsdp_enabled else "neither FSDP nor DeepSpeed"


def refuse_other_engine(checkpoint: Path, trainer: Any) -> None:
    """Raises BaditError if the checkpoint was written under another engine than the trainer's."""
    wrote = read_json(checkpoint / _SUMS).get("engine")
    if wrote not in (None, engine_of(trainer)):
        fix = "start it so again, or remove the folder to start over"
        raise BaditError(f"{checkpoint}: was written under {wrote}; {fix}")


class SealCheckpoints(TrainerCallback):
    """Seals what the trainer and the callbacks before this one have written into its output folder.

    It also keeps what the trainer would forget: the losses summed up since its last line of the log (else the next line
    would be the mean of fewer steps), the number of skipped steps, and which checkpoint is the best.
    """

    def __init__(self, trainer: Any, checkpoints: Path) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            kept = read_json(resumed_checkpoint(args, state) / _SUMS)
            # Names of the Trainer's own, which has no other way to set them.
            self._trainer._tr_loss += kept["loss"]
            self._trainer._globalstep_last_logged = kept["last_logged_step"]
            self._trainer.skipped_steps = kept["skipped_steps"]
            self._trainer.finished = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
            state.best_model_checkpoint = kept["best"] and str(self._checkpoints / kept["best"])
            for callback in self._trainer.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback):
                    vars(callback).update(state.stateful_callbacks["EarlyStoppingCallback"]["attributes"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The log has the mean over the processes, and so has every one of them after a resumption.
        mean = self._trainer.accelerator.reduce(self._trainer._tr_loss, reduction="mean")
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
        self._trainer.accelerator.wait_for_everyone()  # every process writes its part
        if state.is_world_process_zero:
            kept = {
                "loss": float(mean),
                "last_logged_step": self._trainer._globalstep_last_logged,
                "skipped_steps": self._trainer.skipped_steps,
                "best": best,
                "engine": engine_of(self._trainer),
            }
            staged = checkpoint_being_written(args, state)
            write_json(staged / _SUMS, kept)
            seal(staged, self._checkpoints, best)
        if best:  # the trainer knows it by the place that it has written it to
            state.best_model_checkpoint = str(self._checkpoints / best)
        self._trainer.accelerator.wait_for_everyone()


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finishes the step, saves a checkpoint, then stops. A second signal stops at once.

    It must be the last callback, so that the others' state is in the checkpoint by the time it stops. Of several
    processes all stop at the same step, whichever was told to.
    """

    def __init__(self) -> None:
        self._asked = self._stopping = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        with suppress(ValueError):  # only the main thread may set handlers; elsewhere a caller has its own way to stop
            self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._asked and error[0] is None:  # too late for a checkpoint of its own: the last step's is there
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if is_main_process():  # written directly: the handler may have come in the middle of a print
            os.write(2, b"\nbadit: finishing the step and saving; press Ctrl-C again to stop now\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stopping = any_of_all(self._asked)
        control.should_save |= self._stopping

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopping:
            raise KeyboardInterrupt


def checkpoint_being_written(args: Any, state: Any) -> Path:
    """The folder of the trainer's checkpoint of the present step."""
    return Path(args.output_dir) / f"{_PREFIX}{state.global_step}"


def resumed_checkpoint(args: Any, state: Any) -> Path:
    """The folder that a resumed training starts from: the one in the trainer's arguments, else its own of this step."""
    given = args.resume_from_checkpoint
    return Path(given) if isinstance(given, str) and Path(given).is_dir() else checkpoint_being_written(args, state)


def _folders(checkpoints: Path) -> list[Path]:
    """By their steps."""
    folders = [folder for folder in checkpoints.glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(folder.name.removeprefix(_PREFIX))


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but the seal, by its path within the folder."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path != folder / SEAL:
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
