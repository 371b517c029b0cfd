"""DOG during training: a callback for HF's Trainer (and so for TRL's) that regroups the experts' components.

Before every optimizer step it adds each layer's cosine Gram of the accumulated, reduced gradients to a running mean;
every so many steps it solves the grouping on that mean and writes the N labels of ``expert_of``. No weight moves, so
the optimizer's moments stay right. (The cosine is free of loss scaling and clipping, so fp16's scaled gradients do.)

A regrouping changes the model's output as far as the gates of the two experts differ. ``rescale`` keeps the change
small: a moved component's column of B is multiplied by the ratio of the mean gates of its old and its new expert.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from badit.errors import BaditError
from badit.method import expert_angles, group_components, grouping_objective
from badit.method.grouping import Solver
from badit.peft.base_layer import ExpertLayer
from badit.peft.layer import BaditLayer
from badit.runs import StepLog
from badit.training.checkpoints import resumed_checkpoint
from badit.training.gradients import before_step, component_grams, scale_columns
from badit.training.probe import OutputProbe
from badit.training.ranks import communicating_device, several
from badit.training.regroup_state import STATE_FILE, Window, load_state, mean_grams, save_state

# A mean gate near zero (top_k can starve an expert) must not blow a weight up.
_RESCALE_LIMIT = 4.0

Layer = TypeVar("Layer", bound=ExpertLayer)


class RegroupCallback(TrainerCallback):
    """Regroups the components of every trainable BADIT adapter while an HF Trainer runs.

    Args:
        every: optimizer steps between regroupings; each one uses the mean Gram of the steps since the last.
        start, stop: fractions of the run before and after which nothing is regrouped.
        solver, restarts, seed: of :func:`badit.method.group_components`.
        rescale: multiply moved components by the ratio of the mean gates (see the module's text).
        probe: a batch (a dict of tensors) on which the change of the output is measured; by default the prompt
            (its last 32 tokens) of the shortest of the first sixteen training examples.
        log_path: where a line is written for every layer and regrouping; by default ``regroupings.jsonl`` in the
            trainer's output folder.
        checkpoint: the checkpoint folder that a resumed training starts from, needed only when that is neither the
            arguments' ``resume_from_checkpoint`` nor the trainer's own ``output_dir/checkpoint-STEP``.

    A regrouping's line is written at the end of the *following* window, since its angles are measured on gradients
    that the grouping has not seen: step, module, objective_before and _after (on the Gram that was grouped),
    components_moved, output_change (relative, of the whole step), and the angles of the previous and the new grouping.
    """

    def __init__(
        self,
        every: int = 20,
        start: float = 0.0,
        stop: float = 0.9,
        *,
        solver: Solver = "swap",
        restarts: int = 10,
        seed: int = 0,
        rescale: bool = True,
        probe: Mapping[str, torch.Tensor] | None = None,
        log_path: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise BaditError(f"regroup.every must be a whole number of at least 1 step, got {every!r}")
        if not 0 <= start <= stop <= 1:
            raise BaditError(f"regroup.start and stop must satisfy 0 ≤ start ≤ stop ≤ 1, got {start} and {stop}")
        if solver not in ("swap", "paper"):
            raise BaditError(f"regroup.solver must be 'swap' or 'paper', got {solver!r}")
        if not isinstance(restarts, int) or restarts < 0:
            raise BaditError(f"regroup.restarts must be a whole number of at least 0, got {restarts!r}")
        self.every, self.start, self.stop = every, start, stop
        self.solver: Solver = solver
        self.restarts, self.seed, self.rescale = restarts, seed, rescale
        self._probe_batch = probe
        self._log_path = log_path
        self._checkpoint = checkpoint
        self._windows: dict[str, Window] = {}
        self._layers: dict[str, tuple[BaditLayer, str]] = {}
        self._log: StepLog | None = None
        self._reads_in_engine = False
        self._probe: OutputProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self._layers = dict(trainable_adapters(model))
        if not self._layers:
            raise BaditError(
                "RegroupCallback found no trainable BADIT adapter; add one to the model or drop the callback"
            )
        self._windows = {name: Window() for name in self._layers}
        self._probe = OutputProbe.of(model, self._probe_batch, kwargs.get("train_dataloader"))
        path = Path(self._log_path or Path(str(args.output_dir)) / "regroupings.jsonl")
        # One rank writes.
        self._log = StepLog(path, step_key="logged_at") if state.is_world_process_zero else None
        if state.global_step > 0:
            folder = Path(self._checkpoint or resumed_checkpoint(args, state))
            self._windows = load_state(folder / STATE_FILE, self._windows)
        if self._log is not None:
            # A run that ended after its last checkpoint has completed the lines that this checkpoint has as pending.
            begun = [window.pending for window in self._windows.values() if window.pending]
            self._log.rewind(state.global_step, [{key: line[key] for key in ("step", "module")} for line in begun])
        for layer, adapter in self._layers.values():
            layer.gate_sums.pop(adapter, None)
        self._reads_in_engine = before_step(kwargs.get("optimizer"), self._read_gradients)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._reads_in_engine:
            self._read_gradients()

    def _read_gradients(self) -> None:
        places = self._layers.values()
        grams = component_grams([(layer.badit_A[adapter], layer.badit_B[adapter]) for layer, adapter in places])
        for (name, (layer, adapter)), gram_NN in zip(self._layers.items(), grams, strict=True):
            gate_sums = layer.gate_sums.pop(adapter, None)
            if gram_NN is not None:
                self._windows[name].add(gram_NN, gate_sums)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        due = step % self.every == 0
        if due and math.ceil(self.start * state.max_steps) <= step <= math.floor(self.stop * state.max_steps):
            self._regroup(step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write_pending(state.global_step, mean_grams(self._windows))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_FILE
        save_state(path, self._windows, write=args.should_save)

    def _regroup(self, step: int) -> None:
        grams = mean_grams(self._windows)
        self._write_pending(step, grams)
        labels = self._solve(step, grams)
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
                "step": step,
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

    def _solve(self, step: int, grams: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        labels = {
            name: group_components(
                gram_NN,
                _labels(*self._layers[name]),
                solver=self.solver,
                restarts=self.restarts,
                seed=[self.seed, step, index],
            )
            for index, (name, gram_NN) in enumerate(grams.items())
        }
        return _as_on_first_rank(labels)

    def _write_pending(self, step: int, grams: Mapping[str, np.ndarray]) -> None:
        """Completes the lines of the last regrouping with the angles of the window that followed it."""
        for name, window in self._windows.items():
            if not window.pending:
                continue
            line = {**window.pending, "logged_at": step, "window_steps": window.steps}
            for prefix, key in (("previous_", "previous_labels"), ("", "labels")):
                if name in grams:
                    angles = expert_angles(grams[name], np.asarray(line[key]))
                    line |= {f"{prefix}{field}": value for field, value in angles.defined().items()}
            if self._log is not None:
                self._log.append(line)
            window.pending = {}


def trainable_adapters(
    model: torch.nn.Module, kind: type[Layer] = BaditLayer
) -> Iterator[tuple[str, tuple[Layer, str]]]:
    """(name, (layer, adapter)) of every adapter that is being trained in layers of a kind, in the model's order."""
    for module in model.modules():
        if isinstance(module, kind):
            for adapter in module.badit_A:
                if module.badit_A[adapter].requires_grad:
                    yield f"{module.name}.{adapter}", (module, adapter)


def _labels(layer: BaditLayer, adapter: str) -> np.ndarray:
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
    layer: BaditLayer, adapter: str, old_N: np.ndarray, new_N: np.ndarray, gate_sums: torch.Tensor
) -> None:
    mean_K = gate_sums[:-1] / gate_sums[-1].clamp_min(1.0)
    old, new = torch.from_numpy(old_N).to(mean_K.device), torch.from_numpy(new_N).to(mean_K.device)
    ratio_N = (mean_K[old] / mean_K[new].clamp_min(1e-6)).clamp(1 / _RESCALE_LIMIT, _RESCALE_LIMIT)
    scale_columns(layer.badit_B[adapter], torch.where(old == new, 1.0, ratio_N))
