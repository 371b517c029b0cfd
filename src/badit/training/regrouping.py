"""DOG during training: regroups the experts' components by their gradients, in any training loop.

Before every optimizer step it adds each layer's cosine Gram matrix of the accumulated, reduced
gradients to a running mean. At regular intervals it solves the grouping on that mean and writes the
N labels of ``expert_of``. Weights stay in place, so the optimizer's moments stay valid. (The cosine
does not depend on loss scaling and clipping.)

A regrouping changes the model's output if a moved component's old and new expert have different
gates. ``rescale`` keeps the change small: it multiplies the component's column of B by the ratio of
these experts' mean gates. With gated='change' it is off, because the initial factors would be
multiplied too; ``reset_smallest`` is the means there (:mod:`badit.method.late_grouping`).

The angles between experts (paper, Fig. 4) are logged with the regroupings.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from badit.method.grouping import expert_angles, group_components, grouping_objective
from badit.method.late_grouping import regroup_smallest
from badit.runs.folder import AnyPath
from badit.support.console import say
from badit.support.errors import BaditError, check
from badit.support.files import append_to_log, rewind_log
from badit.training.checkpoints import checkpoint_being_written, resumed_checkpoint
from badit.training.resets import changes, refuse_other_optimizer, reset_components
from badit.training.windows import Windows, trainable_adapters
from badit.tuner.config import TOP_K_REFUSED, Count, RegroupOptions
from badit.tuner.distributed import gathered, rank_and_size, scale_columns

STATE_FILE = "badit_regroup.safetensors"
_RESCALE_LIMIT = 4.0  # limits the factor of a weight if an expert's mean gate is near zero
_METRICS = (
    "objective_before",
    "objective_after",
    "components_moved",
    "intra_degrees",
    "inter_degrees",
)


class Regrouper:
    """Regroups the components of every trainable BADIT adapter in a custom training loop.

        model.train()
        regrouper = Regrouper(model, total_steps=len(loader) * epochs, every=20)
        for batch in loader:
            model(**batch).loss.backward()
            regrouper.after_backward()    # before the optimizer uses the gradients
            optimizer.step()
            optimizer.zero_grad()
            regrouper.step()
        regrouper.finish()

    With gradient accumulation, make both calls once per optimizer step, not once per batch. With
    several processes, all ranks must make them. For Trainer, use :class:`badit.RegroupCallback`.

    Args:
        model: a model with a trainable BADIT adapter, optionally wrapped for data parallelism.
        total_steps: optimizer steps of the whole run; ``stop`` is a fraction of it.
        log_path: the log file, with one line per layer and regrouping; None for no log.
        optimizer: the optimizer; needed only with ``reset_smallest``, and under DeepSpeed, which
            takes its steps inside the backward pass.
        options: the fields of :class:`RegroupOptions`: every, stop, solver, restarts, rescale,
            reset_smallest.

    The log line of a regrouping is written at the end of the *following* window, because its angles
    are measured on gradients that the grouping was not fitted to. It has step, module,
    objective_before and objective_after (on the Gram matrix that was grouped), components_moved,
    and the angles of the previous and the new grouping.

    Attributes:
        steps: optimizer steps so far.
        due: the steps after which it regroups.
        metrics: means over the layers for the last regrouping: objective_before, objective_after,
            components_moved, and the angles of the grouping before it. Empty before the first
            regrouping.

    Raises:
        BaditError: if an option is out of range or does not fit an adapter, or there is no
            trainable BADIT adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        log_path: AnyPath | None = None,
        optimizer: Any = None,
        **options: Any,
    ) -> None:
        self.options = RegroupOptions(**options)
        if self.options.reset_smallest is not None:
            refuse_other_optimizer(optimizer)
        check("total_steps", total_steps, Count)
        layers = dict(trainable_adapters(model))
        if not layers:
            raise BaditError(
                "there is no trainable BADIT adapter to regroup; add one to the model, or do not "
                "regroup"
            )
        for name, (layer, adapter) in layers.items():
            config = layer.badit_config[adapter]
            if config.top_k is not None and config.top_k < config.num_experts:
                raise BaditError(f"{name}: {TOP_K_REFUSED}")
            self.options.fitted_to(config)

        self.due = self.options.due(total_steps)
        self.steps = 0
        self.metrics: dict[str, float] = {}
        self.windows = Windows(layers, optimizer)
        self._optimizer = optimizer
        self._log: Path | None = None
        rank, _ = rank_and_size()
        if log_path is not None and rank == 0:  # only rank 0 writes
            self._log = Path(log_path)
        self._log_is_open = False

    def after_backward(self) -> None:
        """Reads the gradients of an optimizer step.

        Call it when they are complete, before the step uses them.
        """
        # Only now, because load_state_dict may come first, and then earlier lines stay.
        if not self._log_is_open:
            self.open_log()
        self.windows.after_backward()

    def step(self) -> None:
        """Counts a completed optimizer step and regroups if a regrouping is due."""
        self.steps += 1
        if self.steps in self.due:
            self._regroup()

    def finish(self) -> None:
        """Writes the log lines of the last regrouping, which wait for its angles.

        Call it at the end of training.
        """
        self._write_pending(self.windows.mean_grams())

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: plain values and tensors. All ranks must call it."""
        tensors, notes = self.windows.state()
        return {"steps": self.steps, "windows": notes, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state of the same model and removes the log lines written after it."""
        self.windows.set_state(state["tensors"], state["windows"])
        self.steps = state["steps"]
        self.open_log()

    def open_log(self) -> None:
        """Empties the log, or removes the lines that a resumed run will write again."""
        self._log_is_open = True
        if self._log is None:
            return
        last_step = self.steps
        if self.windows.pending:
            # The lines of the last regrouping are written again.
            last_step = min(line["step"] for line in self.windows.pending.values()) - 1
        rewind_log(self._log, last_step)

    def _regroup(self) -> None:
        grams = self.windows.mean_grams()
        # This window's gradients are new to the last grouping, so they measure its angles.
        self._write_pending(grams)
        # Seeds of step and layer, so that a resumed run draws the same starts.
        for index, (name, gram_NN) in enumerate(grams.items()):
            line = self._regroup_layer(name, gram_NN, seed=[0, self.steps, index])
            self.windows.pending[name] = line
        self.windows.restart()
        self.metrics |= _means(self.windows.pending.values())

    def _regroup_layer(self, name: str, gram_NN: np.ndarray, seed: list[int]) -> dict[str, Any]:
        """Assigns a layer's components to experts and returns the log line, without angles."""
        layer, adapter = self.windows.layers[name]
        # A copy, because on a CPU the array would share memory with the buffer.
        old_N = layer.expert_of(adapter).cpu().numpy().copy()
        # All ranks use rank 0's labels, because rounding may differ between ranks.
        labels_N = gathered(torch.from_numpy(self._grouped(name, gram_NN, old_N, seed)))[0]
        new_N = labels_N.cpu().numpy()

        options = self.options.fitted_to(layer.badit_config[adapter])
        gate_sums = self.windows.sums.get(f"gate_sums:{name}")
        if options.rescale and gate_sums is not None:
            # Unlike gradients, gates are not reduced over the ranks.
            total = gathered(gate_sums).sum(dim=0)
            scale_columns(layer.badit_B[adapter], _scale_of_moved(total, old_N, new_N))
        if options.reset_smallest is not None:
            reset_components(layer, adapter, torch.from_numpy(old_N != new_N), self._optimizer)
        layer.expert_of(adapter).copy_(labels_N)

        return {
            "step": self.steps,
            "module": name,
            "objective_before": grouping_objective(gram_NN, old_N),
            "objective_after": grouping_objective(gram_NN, new_N),
            "components_moved": int((old_N != new_N).sum()),
            "previous_labels": old_N.tolist(),
            "labels": new_N.tolist(),
        }

    def _grouped(
        self, name: str, gram_NN: np.ndarray, current_N: np.ndarray, seed: list[int]
    ) -> np.ndarray:
        """Returns the new labels of a layer's components."""
        options = self.options
        if options.reset_smallest is not None:
            norm_N = changes(*self.windows.layers[name])
            return regroup_smallest(gram_NN, current_N, norm_N, options.reset_smallest)
        return group_components(
            gram_NN, current_N, solver=options.solver, restarts=options.restarts, seed=seed
        )

    def _write_pending(self, grams: Mapping[str, np.ndarray]) -> None:
        """Writes the log lines of the last regrouping, with the angles of the window after it."""
        lines = []
        for name, pending in self.windows.pending.items():
            line = {**pending, "logged_at": self.steps, "window_steps": self.windows.steps[name]}
            if name in grams:  # otherwise no step followed
                line |= _angles(grams[name], line["previous_labels"], "previous_")
                line |= _angles(grams[name], line["labels"])
            lines.append(line)
        self.windows.pending = {}

        if self._log is not None:
            append_to_log(self._log, *lines)
        # The objectives are the last regrouping's; a new one replaces them.
        self.metrics |= _means(lines)


def _angles(gram_NN: np.ndarray, labels: list[int], prefix: str = "") -> dict[str, float | None]:
    angles = expert_angles(gram_NN, np.asarray(labels)).defined()
    return {f"{prefix}{field}": value for field, value in angles.items()}


def _means(lines: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the metrics of a regrouping, means over its lines (the layers)."""
    means = {}
    for field in _METRICS:
        # An angle is missing if no step followed, and None if there was no pair.
        values = [line[field] for line in lines if line.get(field) is not None]
        if values:
            means[field] = float(np.mean(values))
    return means


def _scale_of_moved(gate_sums: torch.Tensor, old_N: np.ndarray, new_N: np.ndarray) -> torch.Tensor:
    """Returns the factors of B's columns: the ratio of the old and the new expert's mean gates."""
    # The count is 0 if the layer has seen no prompt.
    mean_K = gate_sums[:-1] / gate_sums[-1].clamp_min(1.0)
    labels_2N = torch.from_numpy(np.stack([old_N, new_N])).to(mean_K.device)
    old_gate_N, new_gate_N = mean_K[labels_2N]
    # ḡ_new · (b ḡ_old / ḡ_new) = ḡ_old b: the component's mean contribution stays.
    ratio_N = old_gate_N / new_gate_N.clamp_min(1e-6)
    ratio_N = ratio_N.clamp(1 / _RESCALE_LIMIT, _RESCALE_LIMIT)
    return torch.where(labels_2N[0] == labels_2N[1], 1.0, ratio_N)


class RegroupCallback(TrainerCallback):
    """Regroups the components of every trainable BADIT adapter in HF's or TRL's trainers.

    Args:
        log_path: the log, one line per layer and regrouping (default: ``regroupings.jsonl`` in the
            output folder).
        checkpoint: the checkpoint folder to resume from; needed only if it is neither the
            arguments' ``resume_from_checkpoint`` nor the trainer's ``output_dir/checkpoint-STEP``.
        options: the fields of :class:`RegroupOptions`: every, stop, solver, restarts, rescale,
            reset_smallest.
    """

    def __init__(
        self, *, log_path: AnyPath | None = None, checkpoint: AnyPath | None = None, **options: Any
    ) -> None:
        RegroupOptions(**options)  # checks them before a model is loaded
        self._options = options
        self._log_path = log_path
        self._checkpoint = checkpoint
        self.regrouper: Any = None  # set when training begins
        self._taken: dict[str, float] = {}

    def on_train_begin(self, args: Any, state, control, **kwargs):
        model = kwargs["model"]
        _refuse_cut_examples(args, model)
        self.regrouper = Regrouper(
            model,
            state.max_steps,
            log_path=self._log_path or Path(args.output_dir) / "regroupings.jsonl",
            optimizer=kwargs.get("optimizer"),
            **self._options,
        )
        # A resumed run needs the sums of the steps since its last regrouping.
        if state.global_step > 0:
            checkpoint = self._checkpoint or resumed_checkpoint(args, state)
            self.regrouper.windows.load(Path(checkpoint) / STATE_FILE)
            self.regrouper.steps = state.global_step
        self.regrouper.open_log()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.regrouper.after_backward()

    def on_step_end(self, *args, **kwargs):
        self.regrouper.step()

    def on_save(self, args, state, control, **kwargs):
        path = checkpoint_being_written(args, state) / STATE_FILE
        self.regrouper.windows.save(path, write=args.should_save)

    def on_train_end(self, args, state, control, **kwargs):
        self.regrouper.finish()
        has_regrouped = any(step <= state.global_step for step in self.regrouper.due)
        if not has_regrouped and state.is_world_process_zero:
            say(f"badit: 0 regroupings in {state.global_step} steps: lower regroup.every")

    def take_metrics(self) -> dict[str, float]:
        """Returns the metrics as ``regroup/NAME`` if they are new since the last call."""
        metrics = {} if self.regrouper is None else self.regrouper.metrics
        if metrics == self._taken:
            return {}
        # A copy, because the regrouper updates its dict in place.
        self._taken = dict(metrics)
        return {f"regroup/{name}": value for name, value in metrics.items()}


def _refuse_cut_examples(args: Any, model: nn.Module) -> None:
    """Raises BaditError if TRL's packing may separate an answer from the prompt that routes it."""
    strategy = getattr(args, "packing_strategy", "")
    # Only TRL's arguments have these fields.
    if not getattr(args, "packing", False) or strategy not in ("wrapped", "bfd_split"):
        return
    for _, (layer, adapter) in trainable_adapters(model):
        if layer.badit_config[adapter].routing == "prompt":
            raise BaditError(
                f"packing_strategy: {strategy} cuts examples, so an answer may be separated from "
                "its prompt; use bfd, or routing='token'"
            )
