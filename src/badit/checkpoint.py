"""Checkpoints that are whole or not there: written aside, sealed with every file's SHA-256, then renamed into place.

The trainer writes into ``checkpoints/partial/``. Once all that belongs to a checkpoint is there, it is sealed and
becomes ``checkpoints/checkpoint-STEP``. Whatever ends a run, and whenever, the last sealed checkpoint is untouched.

A seal finds damage, not malice: who can write the files can write the seal. So nothing of a checkpoint is unpickled
except by torch's loader of plain tensors and numbers (``weights_only=True``, which transformers uses throughout).
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from badit.errors import BaditError
from badit.files import read_json, replace_folder, write_json
from badit.runs import is_main_process
from badit.training.ranks import wait_for_all

STAGING = "partial"
SEAL = "seal.json"
_PREFIX = "checkpoint-"
_KEPT = 2


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is as it was sealed; the first process says which damaged ones it passes over."""
    for folder in sorted(_folders(checkpoints), key=step_of, reverse=True):
        damage = damage_of(folder)
        if damage is None:
            return folder
        if is_main_process():
            print(f"badit: {folder} is damaged ({damage}); going on from the one before it", file=sys.stderr)
    return None


def damage_of(folder: Path) -> str | None:
    """What of a checkpoint is not as it was sealed, in a few words; None if all of it is."""
    try:
        sealed = read_json(folder / SEAL)
        present = {name for name in _files(folder) if name != SEAL}
        for name in sorted(sealed.keys() | present):
            if name not in present:
                return f"{name} is missing"
            if name not in sealed:
                return f"{name} does not belong to it"
            if _sha256(folder / name) != sealed[name]:
                return f"{name} has changed"
    except BaditError as error:
        return str(error).removeprefix(f"{folder}/")
    except OSError as error:
        return f"cannot be read: {error}"
    return None


def seal(staged: Path, checkpoints: Path) -> None:
    """Seals a folder that is complete, and puts it among the checkpoints, of which it keeps the one before as well."""
    write_json(staged / SEAL, {name: _sha256(staged / name) for name in _files(staged)})
    final = checkpoints / staged.name
    replace_folder(staged, final)
    # Later steps are those of a future that this run, resumed from an earlier one, has not had.
    earlier = sorted((folder for folder in _folders(checkpoints) if step_of(folder) < step_of(final)), key=step_of)
    for folder in _folders(checkpoints):
        if folder != final and folder not in earlier[1 - _KEPT :]:
            shutil.rmtree(folder)


def staging_folder(checkpoints: Path) -> Path:
    """Where the trainer writes; what a former process has left there half done is removed."""
    staging = checkpoints / STAGING
    if is_main_process():
        shutil.rmtree(staging, ignore_errors=True)
    return staging


def refuse_other_engine(checkpoint: Path, engine: str, processes: int) -> None:
    """Each engine keeps weights and optimizer in a form of its own, and DeepSpeed in one for its number of processes.

    Args:
        checkpoint: what is about to be resumed from.
        engine: "FSDP", "DeepSpeed" or, for a single process and DDP, "neither".
        processes: how many train now.

    Raises:
        BaditError: another engine wrote the checkpoint, or DeepSpeed in another number of processes.
    """
    wrote = "neither"
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        wrote = "FSDP"
    elif (checkpoint / "latest").is_file():
        wrote = "DeepSpeed"
    if wrote != engine:
        under = {"neither": "under neither FSDP nor DeepSpeed"}.get(wrote, f"under {wrote}")
        raise BaditError(f"{checkpoint}: was written {under}; start it so again, or remove the folder to begin anew")
    # One file a process: how DeepSpeed divides the optimizer's state.
    parts = len(list(checkpoint.glob("*/*zero_pp_rank_*_optim_states.pt")))
    if engine == "DeepSpeed" and parts not in (0, processes):
        raise BaditError(
            f"{checkpoint}: was written by {parts} processes, and DeepSpeed goes on with no other number than that, "
            f"not with {processes}; start it so again, or remove the folder to begin anew"
        )


class SealCheckpoints(TrainerCallback):
    """Seals what the trainer and the callbacks before this one have written into its output folder."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_all()  # every process writes its part
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"{_PREFIX}{state.global_step}", self._checkpoints)
        wait_for_all()


class TrainerSums(TrainerCallback):
    """Keeps what the trainer would forget: the losses summed up since its last line of the log, and skipped steps.

    Without the former the first line after a resumption would be the mean of fewer steps than in a run that was not
    stopped.
    """

    _FILE = "badit_sums.json"

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            kept = read_json(resumed_checkpoint(args, state) / self._FILE)
            # Names of the Trainer's own, which has no other way to set them.
            self._trainer._tr_loss += kept["loss"]
            self._trainer._globalstep_last_logged = kept["last_logged_step"]
            self._trainer.skipped_steps = kept["skipped_steps"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The log has the mean over the processes, and so has every one of them after a resumption.
        mean = self._trainer.accelerator.reduce(self._trainer._tr_loss, reduction="mean")
        if state.is_world_process_zero:
            kept = {
                "loss": float(mean),
                "last_logged_step": self._trainer._globalstep_last_logged,
                "skipped_steps": self._trainer.skipped_steps,
            }
            write_json(Path(args.output_dir) / f"{_PREFIX}{state.global_step}" / self._FILE, kept)


def resumed_checkpoint(args: Any, state: Any) -> Path:
    """The folder that a resumed training starts from: the one in the trainer's arguments, else its own of this step."""
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).is_dir():
        return Path(given)
    return Path(args.output_dir) / f"{_PREFIX}{state.global_step}"


def _folders(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdecimal()]


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(folder.name.removeprefix(_PREFIX))


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
