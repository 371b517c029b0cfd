"""DOG during training: regroups the experts' components by their gradients, in any training loop.

Before every optimizer step it adds each layer's cosine Gram of the accumulated, reduced gradients to a running mean;
every so many steps it solves the grouping on that mean and writes the N labels of ``expert_of``. No weight moves, so
the optimizer's moments stay right. (The cosine is free of loss scaling and clipping, so fp16's scaled gradients do.)

A regrouping changes the model's output as far as the gates of the two experts differ. ``rescale`` keeps the change
small: a moved component's column of B is multiplied by the ratio of the mean gates of its old and its new expert.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from badit.errors import BaditError
from badit.files import StepLog
from badit.method import expert_angles, group_components, grouping_objective
from badit.method.grouping import Solver
from badit.training.gradients import before_step, component_grams, scale_columns
from badit.training.probe import OutputProbe
from badit.training.ranks import communicating_device, is_first, several
from badit.training.regroup_state import (
    STATE_FILE,
    Window,
    load_state,
    mean_grams,
    packed_windows,
    save_state,
    unpacked_windows,
)
from badit.tuner.layer import BaditLinear, ExpertLinear

# A mean gate near zero (top_k can starve an expert) must not blow a weight up.
_RESCALE_LIMIT = 4.0

Layer = TypeVar("Layer", bound=ExpertLinear)


class Regrouper:
    """Regroups the components of every trainable BADIT adapter of a model, in a training loop of one's own.

        regrouper = Regrouper(model, total_steps=len(loader) * epochs, every=20)
        for batch in loader:
            model(**batch).loss.backward()
            regrouper.after_backward()    # before the optimizer uses the gradients
            optimizer.step()
            optimizer.zero_grad()
            regrouper.step()
        regrouper.finish()

    With gradients accumulated over several batches the two calls belong to optimizer steps, not to batches; of several
    processes all must make them. Trainer has :class:`badit.RegroupCallback` instead.

    Args:
        model: with a trainable BADIT adapter, perhaps wrapped for data parallelism.
        total_steps: optimizer steps of the whole run, which ``start`` and ``stop`` are fractions of.
        every: optimizer steps between regroupings; each one uses the mean Gram of the steps since the last.
        start, stop: fractions of the run before and after which nothing is regrouped.
        solver, restarts, seed: of :func:`badit.method.group_components`.
        rescale: multiply moved components by the ratio of the mean gates (see the module's text).
        probe: a batch (a dict of tensors) on which the change of the output is measured; None measures none.
        log_path: a file that gets a line for every layer and regrouping; None writes none.
        optimizer: needed under DeepSpeed only, whose engine takes its steps within the backward pass.

    A regrouping's line is written at the end of the *following* window, since its angles are measured on gradients
    that the grouping has not seen: step, module, objective_before and _after (on the Gram that was grouped),
    components_moved, output_change (relative, of the whole step), and the angles of the previous and the new grouping.

    Attributes:
        steps: optimizer steps so far.
        metrics: of the last regrouping, the means over the layers: objective_before, objective_after,
            components_moved and output_change, and the angles of the grouping until then. Empty before the first.

    Raises:
        BaditError: an option out of its range, or no trainable BADIT adapter.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        total_steps: int,
        every: int = 20,
        start: float = 0.0,
        stop: float = 0.9,
        *,
        solver: Solver = "swap",
        restarts: int = 10,
        seed: int = 0,
        rescale: bool = True,
        probe: Mapping[str, torch.Tensor] | OutputProbe | None = None,
        log_path: str | os.PathLike[str] | None = None,
        optimizer: Any = None,
    ) -> None:
        check_options(every, start, stop, solver, restarts)
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise BaditError(f"total_steps must be a whole number of at least 1 step, got {total_steps!r}")
        self._layers: dict[str, tuple[BaditLinear, str]] = dict(trainable_adapters(model))
        if not self._layers:
            raise BaditError("there is no trainable BADIT adapter to regroup; add one to the model, or do not regroup")
        self.every = every
        self._first, self._last = math.ceil(start * total_steps), math.floor(stop * total_steps)
        self.solver: Solver = solver
        self.restarts, self.seed, self.rescale = restarts, seed, rescale
        self.steps = 0
        self.metrics: dict[str, float] = {}
        self._windows = {name: Window() for name in self._layers}
        self._probe = probe if probe is None or isinstance(probe, OutputProbe) else OutputProbe(model, probe)
        # One rank writes.
        self._log = StepLog(Path(log_path), step_key="logged_at") if log_path is not None and is_first() else None
        self._log_is_open = False
        for layer, adapter in self._layers.values():
            layer.gate_sums.pop(adapter, None)
        self._reads_in_engine = before_step(optimizer, self._read_gradients)

    def after_backward(self) -> None:
        """Reads the gradients of an optimizer step; to be called when they are complete and before they are used."""
        if not self._reads_in_engine:
            self._read_gradients()

    def step(self) -> None:
        """Counts an optimizer step that has been taken, and regroups if one is due."""
        self.steps += 1
        self.regroup_if_due()

    def regroup_if_due(self) -> None:
        """Regroups if a regrouping is due after the steps so far."""
        if self.steps % self.every == 0 and self._first <= self.steps <= self._last:
            self._regroup()

    def finish(self) -> None:
        """Writes the lines of the last regrouping, which wait for its angles. To be called at the training's end."""
        self._write_pending(mean_grams(self._windows))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: plain values and tensors. Of several processes all must ask for it."""
        tensors, notes = packed_windows(self._windows)
        return {"steps": self.steps, "windows": notes, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where the training stood when the state was asked for; its log loses what was written after that.

        Raises:
            BaditError: the state is of another model.
        """
        self._take_up(unpacked_windows(state["tensors"], state["windows"], self._windows), state["steps"])

    def save(self, folder: str | os.PathLike[str], *, write: bool = True) -> None:
        """Writes the state into a checkpoint's folder, as safetensors.

        Of several processes all must call it; those with ``write`` write.
        """
        save_state(Path(folder) / STATE_FILE, self._windows, write=write)

    def load(self, folder: str | os.PathLike[str], steps: int) -> None:
        """Takes up where the training stood after ``steps`` optimizer steps, by what :meth:`save` wrote then.

        Raises:
            BaditError: the state is missing, damaged or of another model.
        """
        self._take_up(load_state(Path(folder) / STATE_FILE, self._windows), steps)

    def _take_up(self, windows: dict[str, Window], steps: int) -> None:
        self._windows, self.steps = windows, steps
        for layer, adapter in self._layers.values():
            layer.gate_sums.pop(adapter, None)
        self.open_log()

    def open_log(self) -> None:
        """Empties the log, or drops from it what a resumed training is about to write again."""
        self._log_is_open = True
        if self._log is not None:
            # A run that ended after its last checkpoint has completed the lines that this checkpoint has as pending.
            begun = [window.pending for window in self._windows.values() if window.pending]
            self._log.rewind(self.steps, [{key: line[key] for key in ("step", "module")} for line in begun])

    def _read_gradients(self) -> None:
        places = self._layers.values()
        grams = component_grams([(layer.badit_A[adapter], layer.badit_B[adapter]) for layer, adapter in places])
        for (name, (layer, adapter)), gram_NN in zip(self._layers.items(), grams, strict=True):
            gate_sums = layer.gate_sums.pop(adapter, None)
            if gram_NN is not None:
                self._windows[name].add(gram_NN, gate_sums)

    def _regroup(self) -> None:
        grams = mean_grams(self._windows)
        self._write_pending(grams)
        labels = self._solve(grams)
        before = self._probe.output() if self._probe else None
        for name, new_N in labels.items():
            layer, adapter = self._layers[name]
            old_N = _labels(layer, adapter)
            window = self._windows[name]
            gates = window.gates_of_all() if self.rescale else None
            if gates is not None:
                _rescale_moved(layer, adapter, old_N, new_N, gates.sum(dim=0))
            layer.expert_of(adapter).copy_(torch.from_numpy(new_N))
            window.pending = {
                "step": self.steps,
                "module": name,
                "objective_before": grouping_objective(grams[name], old_N),
                "objective_after": grouping_objective(grams[name], new_N),
                "components_moved": int((old_N != new_N).sum()),
                "previous_labels": old_N.tolist(),
                "labels": new_N.tolist(),
            }
        change = None if self._probe is None or before is None else self._probe.change(before)
        for name in self._windows:
            self._windows[name].restart()
            if name in labels:
                self._windows[name].pending["output_change"] = change
        self.metrics |= _means([window.pending for window in self._windows.values()], _MEASURED_AT_ONCE)

    def _solve(self, grams: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        labels = {
            name: group_components(
                gram_NN,
                _labels(*self._layers[name]),
                solver=self.solver,
                restarts=self.restarts,
                seed=[self.seed, self.steps, index],
            )
            for index, (name, gram_NN) in enumerate(grams.items())
        }
        return _as_on_first_rank(labels)

    def _write_pending(self, grams: Mapping[str, np.ndarray]) -> None:
        """Completes the lines of the last regrouping with the angles of the window that followed it."""
        lines = []
        for name, window in self._windows.items():
            if not window.pending:
                continue
            line = {**window.pending, "logged_at": self.steps, "window_steps": window.steps}
            for prefix, key in (("previous_", "previous_labels"), ("", "labels")):
                if name in grams:
                    angles = expert_angles(grams[name], np.asarray(line[key]))
                    line |= {f"{prefix}{field}": value for field, value in angles.defined().items()}
            lines.append(line)
            window.pending = {}
        if not self._log_is_open:
            self.open_log()
        if self._log is not None:
            for line in lines:
                self._log.append(line)
        self.metrics |= _means(lines, _MEASURED_AFTERWARDS)


_MEASURED_AT_ONCE = ("objective_before", "objective_after", "components_moved", "output_change")
_MEASURED_AFTERWARDS = ("intra_degrees", "inter_degrees")


def _means(lines: Iterable[Mapping[str, Any]], fields: Iterable[str]) -> dict[str, float]:
    """The means of fields over a regrouping's lines, those without a value left out."""
    found = {field: [line[field] for line in lines if line.get(field) is not None] for field in fields}
    return {field: float(np.mean(values)) for field, values in found.items() if values}


def check_options(every: Any, start: float, stop: float, solver: str, restarts: Any) -> None:
    """Raises BaditError for options of a regrouping that make no sense."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise BaditError(f"regroup.every must be a whole number of at least 1 step, got {every!r}")
    if not 0 <= start <= stop <= 1:
        raise BaditError(f"regroup.start and stop must satisfy 0 ≤ start ≤ stop ≤ 1, got {start} and {stop}")
    if solver not in ("swap", "paper"):
        raise BaditError(f"regroup.solver must be 'swap' or 'paper', got {solver!r}")
    if not isinstance(restarts, int) or restarts < 0:
        raise BaditError(f"regroup.restarts must be a whole number of at least 0, got {restarts!r}")


def trainable_adapters(
    model: torch.nn.Module, kind: type[Layer] = BaditLinear
) -> Iterator[tuple[str, tuple[Layer, str]]]:
    """(name, (layer, adapter)) of every adapter that is being trained in layers of a kind, in the model's order."""
    for module in model.modules():
        if isinstance(module, kind):
            for adapter in module.badit_A:
                if module.badit_A[adapter].requires_grad:
                    yield f"{module.name}.{adapter}", (module, adapter)


def _labels(layer: BaditLinear, adapter: str) -> np.ndarray:
    """A copy of ``expert_of``: on a CPU the array would otherwise be the buffer itself and change with it."""
    return layer.expert_of(adapter).cpu().numpy().copy()


def _as_on_first_rank(labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All ranks saw the same reduced gradients; taking rank 0's labels keeps them equal on any hardware."""
    if not several() or not labels:
        return labels
    flat = torch.from_numpy(np.concatenate(list(labels.values()))).to(communicating_device())
    torch.distributed.broadcast(flat, src=0)
    ends = np.cumsum([len(labels_N) for labels_N in labels.values()])[:-1]
    return dict(zip(labels, np.split(flat.cpu().numpy(), ends), strict=True))


@torch.no_grad()
def _rescale_moved(
    layer: BaditLinear, adapter: str, old_N: np.ndarray, new_N: np.ndarray, gate_sums: torch.Tensor
) -> None:
    mean_K = gate_sums[:-1] / gate_sums[-1].clamp_min(1.0)
    old, new = torch.from_numpy(old_N).to(mean_K.device), torch.from_numpy(new_N).to(mean_K.device)
    ratio_N = (mean_K[old] / mean_K[new].clamp_min(1e-6)).clamp(1 / _RESCALE_LIMIT, _RESCALE_LIMIT)
    scale_columns(layer.badit_B[adapter], torch.where(old == new, 1.0, ratio_N))
