"""Running Gram matrices of the components' gradients over a window of steps, and the log of the experts' angles.

The angles tell how orthogonal the experts of a mixture stay while it trains (paper, Fig. 4). A regrouping logs them
itself; :class:`AngleLog` does for methods that do not regroup. Both take them on the mean cosine Gram of a window.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from badit.checkpoint import checkpoint_being_written, resumed_checkpoint
from badit.errors import BaditError, explained
from badit.files import StepLog
from badit.gradients import before_step, component_grams, gathered, own_part
from badit.method import expert_angles
from badit.tuner.layer import BaditLinear, ExpertLinear

ANGLES_FILE = "badit_angles.safetensors"

Layer = TypeVar("Layer", bound=ExpertLinear)


def trainable_adapters(model: nn.Module, kind: type[Layer] = BaditLinear) -> Iterator[tuple[str, tuple[Layer, str]]]:
    """(name, (layer, adapter)) of every adapter that is being trained in layers of a kind, in the model's order."""
    for layer in (module for module in model.modules() if isinstance(module, kind)):
        for adapter, factor in layer.badit_A.items():
            if factor.requires_grad:
                yield f"{layer.name}.{adapter}", (layer, adapter)


@dataclass
class Window:
    """One layer's sums since the last regrouping, and that regrouping's log line, which waits for its angles."""

    gram_sum: torch.Tensor | None = None
    steps: int = 0
    gate_sums: torch.Tensor | None = None  # (K + 1), the sums of the gates and their number, on this rank
    pending: dict[str, Any] = field(default_factory=dict)

    def restart(self) -> None:
        """Empties the sums; the pending line stays."""
        self.gram_sum, self.steps, self.gate_sums = None, 0, None

    def gates_of_all(self) -> torch.Tensor | None:
        """The gate sums of every rank (ranks, K + 1); all ranks must ask."""
        return None if self.gate_sums is None else gathered(self.gate_sums)


class Windows(dict[str, Window]):
    """The window of every layer, by its name: filled before each optimizer step, and kept in checkpoints.

    ``layers`` are (layer, adapter) by name; the Trainer's ``optimizer`` may take its steps within the backward pass.
    """

    def __init__(self, layers: Mapping[str, tuple[ExpertLinear, str]], optimizer: Any = None) -> None:
        super().__init__({name: Window() for name in layers})
        self._layers = layers
        self._taken_gates()
        self._reads_in_engine = before_step(optimizer, self._read_gradients)

    def after_backward(self) -> None:
        """Reads the gradients of an optimizer step; to be called when they are complete and before they are used."""
        if not self._reads_in_engine:
            self._read_gradients()

    def _read_gradients(self) -> None:
        factors = [(layer.badit_A[adapter], layer.badit_B[adapter]) for layer, adapter in self._layers.values()]
        found = zip(self.values(), component_grams(factors), self._taken_gates(), strict=True)
        for window, gram_NN, gate_sums in found:
            if gram_NN is not None:
                window.gram_sum = _plus(window.gram_sum, gram_NN)
                window.steps += 1
                window.gate_sums = window.gate_sums if gate_sums is None else _plus(window.gate_sums, gate_sums)

    def _taken_gates(self) -> list[torch.Tensor | None]:
        """Each layer's sums of gates since the last call."""
        places = self._layers.values()
        return [one.gate_sums.pop(adapter, None) if isinstance(one, BaditLinear) else None for one, adapter in places]

    def mean_grams(self) -> dict[str, np.ndarray]:
        """The mean Grams on the CPU; windows without steps are left out."""
        means = {name: window.gram_sum / window.steps for name, window in self.items() if window.gram_sum is not None}
        return {name: mean_NN.cpu().double().numpy() for name, mean_NN in means.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors, and plain values. All ranks must ask for it; of the gates each has sums of its own."""
        sums = {f"gram_sum:{name}": window.gram_sum for name, window in self.items()}
        sums |= {f"gate_sums:{name}": window.gates_of_all() for name, window in self.items()}
        notes = {name: {"steps": window.steps, "pending": window.pending} for name, window in self.items()}
        return {name: tensor.contiguous() for name, tensor in sums.items() if tensor is not None}, notes

    def set_state(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        """Restores what :meth:`state` gave."""
        if notes.keys() != self.keys():
            raise BaditError("the regrouping's state belongs to another model or another choice of target_modules")
        for name, note in notes.items():
            gate_sums = tensors.get(f"gate_sums:{name}")
            own_sums = None if gate_sums is None else own_part(gate_sums)
            self[name] = Window(tensors.get(f"gram_sum:{name}"), note["steps"], own_sums, note["pending"])
        self._taken_gates()  # those of before belong to no window

    def save(self, path: Path, *, write: bool = True) -> None:
        """Writes the state to a safetensors file, on the ranks with ``write``; all must call it."""
        tensors, notes = self.state()
        if write:
            partial = path.with_name(f"{path.name}.partial")
            save_file(tensors, partial, metadata={"windows": json.dumps(notes)})
            partial.replace(path)

    def load(self, path: Path) -> None:
        """Restores the state from a checkpoint's file."""
        if not path.is_file():
            fix = "resume from another checkpoint, or pass RegroupCallback(checkpoint=FOLDER)"
            raise BaditError(f"{path}: is missing, so training cannot continue exactly where it stopped; {fix}")
        with explained(path, action="resumed from", fix="resume from another checkpoint", any_error=True):
            with safe_open(path, framework="pt") as file:
                notes = json.loads((file.metadata() or {})["windows"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            self.set_state(tensors, notes)


def _plus(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    # A total that comes from a checkpoint is on the CPU at first.
    return term if total is None else total.to(term.device) + term


class AngleLog(TrainerCallback):
    """Writes a line per layer and window of ``every`` steps: step, module, window_steps, and ExpertAngles' fields.

    Layers with one expert, and those whose experts share their A, have no angles. The sums are kept in checkpoints, so
    that a resumed run writes the same log.
    """

    def __init__(self, path: Path, every: int = 20) -> None:
        self.every = every
        self._log = StepLog(path)
        self._layers: dict[str, tuple[ExpertLinear, str]] = {}
        self.windows = Windows({})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, (layer, adapter) in trainable_adapters(kwargs["model"], ExpertLinear):
            if layer.badit_config[adapter].num_experts > 1 and not layer.badit_config[adapter].shares_A:
                self._layers[name] = layer, adapter
        self.windows = Windows(self._layers, kwargs.get("optimizer"))
        if self._layers and state.global_step:
            self.windows.load(resumed_checkpoint(args, state) / ANGLES_FILE)
        if self._layers and state.is_world_process_zero:
            self._log.rewind(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.windows.after_backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        # All ranks have the same sums, and one of them writes.
        for name, gram_NN in self.windows.mean_grams().items() if state.is_world_process_zero else ():
            layer, adapter = self._layers[name]
            angles = expert_angles(gram_NN, layer.expert_of(adapter).cpu().numpy()).defined()
            line = {"step": state.global_step, "module": name, "window_steps": self.windows[name].steps}
            self._log.append({**line, **angles})
        for window in self.windows.values():
            window.restart()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._layers:
            self.windows.save(checkpoint_being_written(args, state) / ANGLES_FILE, write=args.should_save)
