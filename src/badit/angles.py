"""Running Gram matrices of the components' gradients over a window of steps, and the log of the experts' angles.

The angles tell how orthogonal the experts of a mixture stay while it trains (paper, Fig. 4). A regrouping logs them
itself; :class:`AngleLog` does for methods that do not regroup. Both take them on the cosine Gram of the components'
gradients, averaged over a window, so that their curves can be laid side by side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from badit.checkpoint import checkpoint_being_written, resumed_checkpoint
from badit.errors import BaditError
from badit.files import StepLog
from badit.gradients import before_step, component_grams, gathered, own_part
from badit.method import expert_angles
from badit.tuner.layer import BaditLinear, ExpertLinear

ANGLES_FILE = "badit_angles.safetensors"

Layer = TypeVar("Layer", bound=ExpertLinear)


def trainable_adapters(
    model: torch.nn.Module, kind: type[Layer] = BaditLinear
) -> Iterator[tuple[str, tuple[Layer, str]]]:
    """(name, (layer, adapter)) of every adapter that is being trained in layers of a kind, in the model's order."""
    for module in model.modules():
        if isinstance(module, kind):
            for adapter in module.badit_A:
                if module.badit_A[adapter].requires_grad:
                    yield f"{module.name}.{adapter}", (module, adapter)


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
    means = {name: window.gram_sum / window.steps for name, window in windows.items() if window.gram_sum is not None}
    if not means:
        return {}
    device = next(iter(means.values())).device
    flat = torch.cat([mean_NN.flatten().to(device) for mean_NN in means.values()]).cpu().double()
    parts = flat.split([mean_NN.numel() for mean_NN in means.values()])
    return {name: part.view(mean_NN.shape).numpy() for (name, mean_NN), part in zip(means.items(), parts, strict=True)}


def packed(windows: Mapping[str, Window]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The windows as tensors and plain values. All ranks must call it; of the gates they have sums of their own."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    for name, window in windows.items():
        notes[name] = {"steps": window.steps, "pending": window.pending}
        for kind, tensor in (("gram_sum", window.gram_sum), ("gate_sums", window.gates_of_all())):
            if tensor is not None:
                tensors[f"{kind}:{name}"] = tensor.contiguous()
    return tensors, notes


def unpacked(
    tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any], windows: Mapping[str, Window]
) -> dict[str, Window]:
    """What :func:`packed` gave, for the layers of ``windows``.

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


def save_windows(path: Path, windows: Mapping[str, Window], *, write: bool = True) -> None:
    """Writes the windows to a file of a checkpoint, as safetensors with the plain values in its metadata.

    All ranks must call it. Those with ``write`` write.
    """
    tensors, notes = packed(windows)
    if write:
        partial = path.with_name(f"{path.name}.partial")
        save_file(tensors, partial, metadata={"windows": json.dumps(notes)})
        os.replace(partial, path)


def load_windows(path: Path, windows: Mapping[str, Window]) -> dict[str, Window]:
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
        return unpacked(tensors, notes, windows)
    except BaditError as error:
        raise BaditError(f"{path}: {error}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise BaditError(f"{path} is damaged ({error}); resume from another checkpoint") from None


class AngleLog(TrainerCallback):
    """Writes a line for every layer and window: step, module, window_steps, and the angles of
    :class:`badit.method.grouping.ExpertAngles`.

    It leaves out layers with one expert, and those whose experts share their A and so have no components of their own.
    Its sums are in the checkpoints, so that a resumed run logs what it would have logged otherwise.

    Args:
        path: the log.
        every: optimizer steps in a window.
    """

    def __init__(self, path: Path, every: int = 20) -> None:
        self.every = every
        self._log = StepLog(path)
        self._layers: dict[str, tuple[ExpertLinear, str]] = {}
        self._windows: dict[str, Window] = {}
        self._reads_in_engine = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, (layer, adapter) in trainable_adapters(kwargs["model"], ExpertLinear):
            config = layer.badit_config[adapter]
            if config.num_experts > 1 and not config.shares_A:
                self._layers[name] = layer, adapter
        self._windows = {name: Window() for name in self._layers}
        if self._layers and state.global_step:
            self._windows = load_windows(resumed_checkpoint(args, state) / ANGLES_FILE, self._windows)
        if self._layers and state.is_world_process_zero:
            self._log.rewind(state.global_step)
        self._reads_in_engine = before_step(kwargs.get("optimizer"), self._read_gradients)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._reads_in_engine:
            self._read_gradients()

    def _read_gradients(self) -> None:
        places = self._layers.values()
        grams = component_grams([(layer.badit_A[adapter], layer.badit_B[adapter]) for layer, adapter in places])
        for window, gram_NN in zip(self._windows.values(), grams, strict=True):
            if gram_NN is not None:
                window.add(gram_NN, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            if state.is_world_process_zero:  # all processes have the same sums, and one of them writes
                self._write(state.global_step)
            for window in self._windows.values():
                window.restart()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._layers:
            save_windows(checkpoint_being_written(args, state) / ANGLES_FILE, self._windows, write=args.should_save)

    def _write(self, step: int) -> None:
        for name, gram_NN in mean_grams(self._windows).items():
            layer, adapter = self._layers[name]
            angles = expert_angles(gram_NN, layer.expert_of(adapter).cpu().numpy())
            line = {"step": step, "module": name, "window_steps": self._windows[name].steps, **angles.defined()}
            self._log.append(line)
