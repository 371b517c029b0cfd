"""Fingerprints of a run's inputs, so that it never continues with other data or base weights."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from badit.data.tasks import Task
from badit.runs.folder import RunFolder
from badit.support.console import is_main_process, say
from badit.support.errors import BaditError
from badit.support.files import write_json

# The key of the base model's fingerprint among a run's inputs; all others are tasks.
BASE_MODEL = "the base model"
_SAMPLED = 64  # numbers of a weight that are part of its fingerprint


def task_fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    """Returns a hash of each task's definition, demonstrations and instances."""
    return {f"task {task.name}": task.fingerprint for task in tasks}


def model_fingerprint(model: PreTrainedModel) -> str:
    """Returns a hash of all unquantised weights.

    It covers of each weight the sum of the bits in bfloat16, and up to 64 numbers.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        is_quantised = type(parameter.data) is not torch.Tensor
        if is_quantised or not parameter.is_floating_point():
            continue
        flat = parameter.detach().flatten()
        # In bfloat16, since model.dtype fast may load the same weights in float32 elsewhere.
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].bfloat16().float().cpu()
        # A sum of integers is exact in any order, so it does not depend on the threads.
        total = int(flat.bfloat16().view(torch.int16).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {total}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def keep_inputs(
    folder: RunFolder, fingerprints: Mapping[str, str], allow_changed: bool = False
) -> None:
    """Records fingerprints in environment.json.

    BaditError if an input changed since the run began, unless ``allow_changed``.
    """
    # Other ranks: rank 0 may still have to replace the record of a first attempt that failed.
    if not is_main_process():
        return
    changed = changed_inputs(folder, fingerprints)
    names = ", ".join(changed)
    if changed and not allow_changed:
        fix = "restore the original input, choose another output=FOLDER, or, in badit train, "
        fix += "continue with --allow-changed-inputs"
        raise BaditError(f"{folder.path}: {names} changed since the run began; {fix}")
    if changed and folder.adapter_path.is_dir():  # the record stays that of the training
        say(f"badit: {names} changed since the run was trained; badit evaluate scores it again")
        return

    environment = folder.known_environment
    inputs = {k: v for k, v in environment.get("inputs", {}).items() if k not in changed}
    updated = {**environment, "inputs": {**inputs, **fingerprints}}
    if changed:
        updated["changed_inputs"] = sorted({*environment.get("changed_inputs", ()), *changed})
    if environment and updated != environment:
        write_json(folder.environment_path, updated)


def changed_inputs(folder: RunFolder, fingerprints: Mapping[str, str]) -> list[str]:
    """Returns the names of changed inputs; ``fingerprints`` has all tasks, or the base model."""
    return differing_inputs(folder.known_environment.get("inputs", {}), fingerprints)


def differing_inputs(recorded: Mapping[str, str], fingerprints: Mapping[str, str]) -> list[str]:
    """Returns the names of inputs that differ from recorded ones; [] without a record."""
    # Tasks and the base model are recorded and compared at different times.
    is_base_model = BASE_MODEL in fingerprints
    comparable = {name for name in recorded if (name == BASE_MODEL) == is_base_model}
    if not comparable:
        return []
    names = comparable | fingerprints.keys()
    return sorted(name for name in names if recorded.get(name) != fingerprints.get(name))
