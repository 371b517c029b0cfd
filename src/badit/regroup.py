"""DOG during training: regroups the experts' components by their gradients, in any training loop.

Before every optimizer step it adds each layer's cosine Gram of the accumulated, reduced gradients to a running mean;
every so many steps it solves the grouping on that mean and writes the N labels of ``expert_of``. No weight moves, so
the optimizer's moments stay valid. (The cosine does not depend on loss scaling and clipping.)

A regrouping changes the model's output as far as the gates of the two experts differ. ``rescale`` keeps the change
small: a moved component's column of B is multiplied by the ratio of the mean gates of its old and its new expert.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from badit.angles import Windows, trainable_adapters
from badit.checkpoint import checkpoint_being_written, resumed_checkpoint
from badit.errors import BaditError, say
from badit.files import StepLog
from badit.gradients import of_first, rank, scale_columns
from badit.method import expert_angles, group_components, grouping_objective
from badit.method.grouping import Solver
from badit.tuner.config import COUNT, COUNT_OR_ZERO, FRACTION, Rule, check_options, is_number, one_of, option
from badit.tuner.layer import BaditLinear

TOP_K_REFUSED = (
    "regrouping would move components into experts that top_k switches off; leave top_k out, or do not regroup"
)
STATE_FILE = "badit_regroup.safetensors"
# A mean gate near zero (top_k can starve an expert) must not make a weight explode.
_RESCALE_LIMIT = 4.0


_EVERY = Rule(
    "a whole number of steps or a fraction of the run",
    lambda value: is_number(value) and value > 0 and (value < 1 or value == int(value)),
)


@dataclass(frozen=True)
class RegroupOptions:
    """When and how to regroup; each regrouping uses the mean Gram of the steps since the last."""

    every: float = option(20, "Optimizer steps between regroupings, or below 1 the fraction of the run.", _EVERY)
    stop: float = option(0.9, "Fraction of the run after which nothing is regrouped.", FRACTION)
    solver: Solver = option(
        "swap", "'swap': balanced k-means, then exact swaps; 'paper': the paper's iteration.", one_of("swap", "paper")
    )
    restarts: int = option(10, "Further random starts of the solver.", COUNT_OR_ZERO)
    rescale: bool = option(True, "Multiply moved components by the ratio of their experts' mean gates.")

    #: As in the released code: once per epoch of ten, in the first half of the training.
    PAPER: ClassVar[dict[str, Any]] = {"every": 0.1, "stop": 0.5, "solver": "paper", "restarts": 10, "rescale": False}

    def __post_init__(self) -> None:
        check_options(self, "regroup.")

    def due(self, total_steps: int) -> range:
        """The steps of a run after which it regroups."""
        every = int(self.every) if self.every >= 1 else max(1, round(self.every * total_steps))
        return range(every, math.floor(self.stop * total_steps) + 1, every)


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
        total_steps: optimizer steps of the whole run, of which ``stop`` is a fraction.
        log_path: a file that gets a line for every layer and regrouping; None writes none.
        optimizer: needed under DeepSpeed only, whose engine takes its steps within the backward pass.
        options: of :class:`RegroupOptions`: every, stop, solver, restarts, rescale.

    A regrouping's line is written at the end of the *following* window, since its angles are measured on gradients
    that the grouping has not seen: step, module, objective_before and _after (on the Gram that was grouped),
    components_moved, and the angles of the previous and the new grouping.

    Attributes:
        steps: optimizer steps so far.
        due: the steps after which it regroups.
        metrics: of the last regrouping, the means over the layers: objective_before, objective_after and
            components_moved, and the angles of the grouping until then. Empty before the first.

    Raises:
        BaditError: an option out of its range, or no trainable BADIT adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        log_path: str | os.PathLike[str] | None = None,
        optimizer: Any = None,
        **options: Any,
    ) -> None:
        self.options = RegroupOptions(**options)
        COUNT.check("total_steps", total_steps)
        self._layers: dict[str, tuple[BaditLinear, str]] = dict(trainable_adapters(model))
        if not self._layers:
            raise BaditError("there is no trainable BADIT adapter to regroup; add one to the model, or do not regroup")
        for name, (layer, adapter) in self._layers.items():
            config = layer.badit_config[adapter]
            if config.top_k is not None and config.top_k < config.num_experts:
                raise BaditError(f"{name}: {TOP_K_REFUSED}")
        self.due = self.options.due(total_steps)
        self.steps = 0
        self.metrics: dict[str, float] = {}
        self.windows = Windows(self._layers, optimizer)
        # Of several processes the first writes.
        self._log = StepLog(Path(log_path), step_key="logged_at") if log_path is not None and rank() == 0 else None
        self._log_is_open = False

    def after_backward(self) -> None:
        """Reads the gradients of an optimizer step; to be called when they are complete and before they are used."""
        self.windows.after_backward()

    def step(self) -> None:
        """Counts an optimizer step that has been taken, and regroups if one is due."""
        self.steps += 1
        if self.steps in self.due:
            self._regroup()

    def finish(self) -> None:
        """Writes the lines of the last regrouping, which wait for its angles. To be called at the training's end."""
        self._write_pending(self.windows.mean_grams())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: plain values and tensors. Of several processes all must ask for it."""
        tensors, notes = self.windows.state()
        return {"steps": self.steps, "windows": notes, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of the same model; the log loses what was written after it."""
        self.windows.set_state(state["tensors"], state["windows"])
        self.steps = state["steps"]
        self.open_log()

    def open_log(self) -> None:
        """Empties the log, or drops from it what a resumed training is about to write again."""
        self._log_is_open = True
        if self._log is not None:
            # A run that ended after its last checkpoint has completed the lines that this checkpoint has as pending.
            begun = [window.pending for window in self.windows.values() if window.pending]
            self._log.rewind(self.steps, [{key: line[key] for key in ("step", "module")} for line in begun])

    def _regroup(self) -> None:
        grams = self.windows.mean_grams()
        self._write_pending(grams)
        for name, new_N in self._solve(grams).items():
            layer, adapter = self._layers[name]
            old_N = _labels(layer, adapter)
            gates = self.windows[name].gates_of_all() if self.options.rescale else None
            if gates is not None:
                _rescale_moved(layer, adapter, old_N, new_N, gates.sum(dim=0))
            layer.expert_of(adapter).copy_(torch.from_numpy(new_N))
            self.windows[name].pending = {
                "step": self.steps,
                "module": name,
                "objective_before": grouping_objective(grams[name], old_N),
                "objective_after": grouping_objective(grams[name], new_N),
                "components_moved": int((old_N != new_N).sum()),
                "previous_labels": old_N.tolist(),
                "labels": new_N.tolist(),
            }
        for window in self.windows.values():
            window.restart()
        fields = ("objective_before", "objective_after", "components_moved")
        self.metrics |= _means([window.pending for window in self.windows.values()], fields)

    def _solve(self, grams: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every layer's new labels; all processes take the first one's, as rounding may differ between them."""
        solver, restarts = self.options.solver, self.options.restarts
        labels = {}
        for index, (name, gram_NN) in enumerate(grams.items()):
            old_N = _labels(*self._layers[name])
            new_N = group_components(gram_NN, old_N, solver=solver, restarts=restarts, seed=[0, self.steps, index])
            labels[name] = of_first(torch.from_numpy(new_N)).numpy()
        return labels

    def _write_pending(self, grams: Mapping[str, np.ndarray]) -> None:
        """Completes the lines of the last regrouping with the angles of the window that followed it."""
        lines = []
        for name, window in self.windows.items():
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
        self.metrics |= _means(lines, ("intra_degrees", "inter_degrees"))


class RegroupCallback(TrainerCallback):
    """Regroups the components of every trainable BADIT adapter while an HF Trainer (or one of TRL's) runs.

    Args:
        log_path: where a line is written for every layer and regrouping; by default ``regroupings.jsonl`` in the
            trainer's output folder.
        checkpoint: the checkpoint folder that a resumed training starts from, needed only when that is neither the
            arguments' ``resume_from_checkpoint`` nor the trainer's own ``output_dir/checkpoint-STEP``.
        options: of :class:`RegroupOptions`: every, stop, solver, restarts, rescale.
    """

    def __init__(
        self,
        *,
        log_path: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        RegroupOptions(**options)
        self._options, self._log_path, self._checkpoint = options, log_path, checkpoint
        self.regrouper: Any = None  # until the training begins
        self._taken: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        wrapped = getattr(args, "packing", False) and getattr(args, "packing_strategy", "") == "wrapped"
        if wrapped and any(one.badit_config[name].routing == "prompt" for _, (one, name) in trainable_adapters(model)):
            raise BaditError(
                "packing_strategy: wrapped rows are cut anywhere, so an answer may have lost its prompt; use bfd, or "
                "routing='token'"
            )
        self.regrouper = Regrouper(
            model,
            state.max_steps,
            **self._options,
            log_path=self._log_path or Path(args.output_dir) / "regroupings.jsonl",
            optimizer=kwargs.get("optimizer"),
        )
        if state.global_step > 0:
            checkpoint = Path(self._checkpoint or resumed_checkpoint(args, state))
            self.regrouper.windows.load(checkpoint / STATE_FILE)
            self.regrouper.steps = state.global_step
        self.regrouper.open_log()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.after_backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.steps = state.global_step - 1
        self.regrouper.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.finish()
        if not any(step <= state.global_step for step in self.regrouper.due[:1]) and state.is_world_process_zero:
            say(f"badit: 0 regroupings in {state.global_step} steps: lower regroup.every")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.windows.save(checkpoint_being_written(args, state) / STATE_FILE, write=args.should_save)

    def take_metrics(self) -> dict[str, float]:
        """The regrouper's metrics as ``regroup/NAME``, if there has been a regrouping since the last call; else {}.

        For a Trainer's ``log``, which passes them to trackers; badit's own does.
        """
        metrics = {} if self.regrouper is None else self.regrouper.metrics
        if metrics == self._taken:
            return {}
        self._taken = dict(metrics)
        return {f"regroup/{name}": value for name, value in metrics.items()}


def _means(lines: Iterable[Mapping[str, Any]], fields: Iterable[str]) -> dict[str, float]:
    """The means of fields over a regrouping's lines, those without a value left out."""
    found = {field: [line[field] for line in lines if line.get(field) is not None] for field in fields}
    return {field: float(np.mean(values)) for field, values in found.items() if values}


def _labels(layer: BaditLinear, adapter: str) -> np.ndarray:
    """A copy of ``expert_of``: on a CPU the array would otherwise be the buffer itself and change with it."""
    return layer.expert_of(adapter).cpu().numpy().copy()


@torch.no_grad()
def _rescale_moved(
    layer: BaditLinear, adapter: str, old_N: np.ndarray, new_N: np.ndarray, gate_sums: torch.Tensor
) -> None:
    mean_K = gate_sums[:-1] / gate_sums[-1].clamp_min(1.0)
    old, new = torch.from_numpy(old_N).to(mean_K.device), torch.from_numpy(new_N).to(mean_K.device)
    ratio_N = (mean_K[old] / mean_K[new].clamp_min(1e-6)).clamp(1 / _RESCALE_LIMIT, _RESCALE_LIMIT)
    scale_columns(layer.badit_B[adapter], torch.where(old == new, 1.0, ratio_N))
