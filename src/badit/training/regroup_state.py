"""What regrouping, and the log of angles, remember between steps and in checkpoints: sums over a window of steps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from badit.errors import BaditError
from badit.training.ranks import gathered, own_part

STATE_FILE = "badit_regroup.safetensors"
ANGLES_FILE = "badit_angles.safetensors"


class Window:
    """One layer's sums since the last regrouping, and that regrouping's line, which waits for its angles."""

    def __init__(self) -> None:
        self.gram_sum: torch.Tensor | None = None
        self.steps = 0
        self.gate_sums: torch.Tensor | None = None
        self.pending: dict[str, Any] = {}

    def add(self, gram_NN: torch.Tensor, gate_sums: torch.Tensor | None) -> None:
        """Adds one optimizer step: its Gram, and the (K + 1) sums of gates and their number on this rank."""
        # Sums that come from a checkpoint are on the CPU at first.
        self.gram_sum = gram_NN if self.gram_sum is None else self.gram_sum.to(gram_NN.device) + gram_NN
        self.steps += 1
        if gate_sums is not None:
            former = self.gate_sums
            self.gate_sums = gate_sums if former is None else former.to(gate_sums.device) + gate_sums

    def restart(self) -> None:
        """Empties the sums; the pending line stays."""
        self.gram_sum, self.steps, self.gate_sums = None, 0, None

    def gates_of_all(self) -> torch.Tensor | None:
        """The gate sums of every rank (ranks, K + 1); all ranks must ask."""
        return None if self.gate_sums is None else gathered(self.gate_sums)


def mean_grams(windows: Mapping[str, Window]) -> dict[str, np.ndarray]:
    """The windows' mean Grams on the CPU, in one copy for all layers; windows without steps are left out."""
    full = {name: window for name, window in windows.items() if window.gram_sum is not None}
    if not full:
        return {}
    means = [window.gram_sum / window.steps for window in full.values() if window.gram_sum is not None]
    flat = torch.cat([mean_NN.flatten().to(means[0].device) for mean_NN in means]).cpu().double()
    parts = flat.split([mean_NN.numel() for mean_NN in means])
    return {name: part.view(mean_NN.shape).numpy() for name, part, mean_NN in zip(full, parts, means, strict=True)}


def packed_windows(windows: Mapping[str, Window]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The windows as tensors and plain values. All ranks must call it; of the gates they have sums of their own."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    for name, window in windows.items():
        notes[name] = {"steps": window.steps, "pending": window.pending}
        for kind, tensor in (("gram_sum", window.gram_sum), ("gate_sums", window.gates_of_all())):
            if tensor is not None:
                tensors[f"{kind}:{name}"] = tensor.contiguous()
    return tensors, notes


def unpacked_windows(
    tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any], windows: Mapping[str, Window]
) -> dict[str, Window]:
    """What :func:`packed_windows` gave, for the layers of ``windows``.

    Raises:
        BaditError: it is of other layers.
    """
    if notes.keys() != windows.keys():
        raise BaditError("the regrouping's state belongs to another model or another choice of target_modules")
    loaded = {}
    for name in windows:
        window = loaded[name] = Window()
        window.steps, window.pending = notes[name]["steps"], notes[name]["pending"]
        window.gram_sum = tensors.get(f"gram_sum:{name}")
        if (sums := tensors.get(f"gate_sums:{name}")) is not None:
            window.gate_sums = own_part(sums)
    return loaded


def save_state(path: Path, windows: Mapping[str, Window], *, write: bool = True) -> None:
    """Writes the windows to a file of a checkpoint, as safetensors with the pending lines in its metadata.

    All ranks must call it. Those with ``write`` write.
    """
    tensors, notes = packed_windows(windows)
    if not write:
        return
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={"windows": json.dumps(notes)})
    os.replace(partial, path)


def load_state(path: Path, windows: Mapping[str, Window]) -> dict[str, Window]:
    """The windows as a checkpoint's file has them.

    Raises:
        BaditError: the file is missing or damaged, or of another model.
    """
    if not path.is_file():
        raise BaditError(
            f"{path} is missing, so training cannot go on exactly where it stopped: resume from another checkpoint, "
            "or pass RegroupCallback(checkpoint=FOLDER) if the checkpoint lies elsewhere"
        )
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {})["windows"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BaditError(f"{path} is damaged ({error}); resume from another checkpoint") from None
    try:
        return unpacked_windows(tensors, notes, windows)
    except BaditError as error:
        raise BaditError(f"{path}: {error}") from None
