"""The window of a regrouping: sums over the optimizer steps since the previous one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from badit.support.errors import BaditError, explained
from badit.tuner.badit_layer import BaditLinear, Place
from badit.tuner.distributed import before_step, component_grams, gathered, rank_and_size


def trainable_adapters(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Yields (name, (layer, adapter)) of every trainable BADIT adapter, in the model's order."""
    for layer in model.modules():
        if not isinstance(layer, BaditLinear):
            continue
        for adapter, factor in layer.badit_A.items():
            if factor.requires_grad:
                yield f"{layer.name}.{adapter}", (layer, adapter)


class Windows:
    """The layers' sums, updated before each optimizer step and saved in checkpoints.

    Pass the Trainer's ``optimizer`` if it can take its steps inside the backward pass (DeepSpeed).

    Attributes:
        sums: by ``gram_sum:LAYER``, the Gram matrices (N, N); by ``gate_sums:LAYER``, the gates and
            their count (K + 1,) on this rank.
        steps: by layer, the number of steps in its sums.
        pending: by layer, the log line of a regrouping until it has its angles.
    """

    def __init__(self, layers: Mapping[str, Place], optimizer: Any = None) -> None:
        self.layers = layers
        self.steps = dict.fromkeys(layers, 0)
        self.sums: dict[str, torch.Tensor] = {}
        self.pending: dict[str, dict[str, Any]] = {}
        self._pop_gates()  # earlier sums belong to no window
        self._reads_in_engine = before_step(optimizer, self._read_gradients)

    def after_backward(self) -> None:
        """Reads the gradients of a step. Call it when they are complete, before they are used."""
        if not self._reads_in_engine:
            self._read_gradients()

    def _read_gradients(self) -> None:
        factors = [
            (layer.badit_A[adapter], layer.badit_B[adapter])
            for layer, adapter in self.layers.values()
        ]
        grams = component_grams(factors)
        gates = self._pop_gates()
        sums_of_step = zip(self.layers, grams, gates, strict=True)
        for name, gram_NN, gate_sums in sums_of_step:
            if gram_NN is None:  # a layer without gradients
                continue
            self.steps[name] += 1
            self._add(f"gram_sum:{name}", gram_NN)
            if gate_sums is not None:
                self._add(f"gate_sums:{name}", gate_sums)

    def _add(self, key: str, term: torch.Tensor) -> None:
        if key in self.sums:
            # A sum from a checkpoint is on the CPU.
            term = self.sums[key].to(term.device) + term
        self.sums[key] = term

    def _pop_gates(self) -> list[torch.Tensor | None]:
        """Returns each layer's sums of gates since the last call."""
        return [layer.gate_sums.pop(adapter, None) for layer, adapter in self.layers.values()]

    def mean_grams(self) -> dict[str, np.ndarray]:
        """Returns the mean Gram matrices on the CPU, without those of windows without steps."""
        means = {}
        for name, steps in self.steps.items():
            if steps:
                # In float64, as the solver computes.
                mean_NN = self.sums[f"gram_sum:{name}"] / steps
                means[name] = mean_NN.cpu().double().numpy()
        return means

    def restart(self) -> None:
        """Resets the sums; keeps the pending log lines."""
        self.sums = {}
        self.steps = dict.fromkeys(self.layers, 0)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns tensors and plain values. All ranks must call it, because each has own gates."""
        tensors = {}
        for key in sorted(self.sums):  # in the same order on all ranks
            # safetensors refuses other tensors.
            tensors[key] = self.sums[key].contiguous()
            if key.startswith("gate_sums:"):
                tensors[key] = gathered(tensors[key])
        notes = {
            name: {"steps": steps, "pending": self.pending.get(name, {})}
            for name, steps in self.steps.items()
        }
        return tensors, notes

    def set_state(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        """Restores a state, also one of another number of ranks."""
        if notes.keys() != self.layers.keys():
            raise BaditError(
                "regrouping state: saved with another model or target_modules; resume with the "
                "same ones"
            )
        self.pending = {}
        for name in self.layers:
            self.steps[name] = notes[name]["steps"]
            if notes[name]["pending"]:
                self.pending[name] = notes[name]["pending"]
        self.sums = dict(tensors)
        for key in tensors:
            if key.startswith("gate_sums:"):
                self.sums[key] = _of_rank(tensors[key])
        self._pop_gates()  # earlier sums belong to no window

    def save(self, path: Path, *, write: bool = True) -> None:
        """Writes the state to a safetensors file if ``write``; all ranks must call it."""
        tensors, notes = self.state()
        if write:
            save_file(tensors, path, metadata={"windows": json.dumps(notes)})

    def load(self, path: Path) -> None:
        """Restores a saved state; BaditError if the file is missing, damaged or another model's."""
        fix = (
            "resume from another checkpoint, or pass RegroupCallback(checkpoint=FOLDER) if this "
            "one has moved"
        )
        # Any error, because a damaged file can raise any.
        with explained(path, action="resumed from", fix=fix, any_error=True):
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["windows"])
            self.set_state(load_file(path), notes)


def _of_rank(sums: torch.Tensor) -> torch.Tensor:
    """Returns this rank's sums from those of all ranks (ranks, K + 1)."""
    rank, ranks = rank_and_size()
    if len(sums) == ranks:
        return sums[rank]
    # The number of ranks has changed: an equal share of the total.
    return sums.sum(dim=0) / ranks
