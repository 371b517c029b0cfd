"""DOG during training: regroups the experts' components by their gradients, in any training loop.

Before every optimizer step it adds each layer's cosine Gram matrix of the accumulated, reduced gradients to a running
mean. At regular intervals it solves the grouping on that mean and writes the N labels of ``expert_of``. Weights stay in
place, so the optimizer's moments stay valid. (The cosine does not depend on loss scaling and clipping.)

A regrouping changes the model's output if a moved component's old and new expert have different gates. ``rescale``
keeps the change small: it multiplies the component's column of B by the ratio of these experts' mean gates.

The angles between experts (paper, Fig. 4) are logged with the regroupings, or by :class:`AngleLog` if there are none.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from badit.method.grouping import expert_angles, group_components, grouping_objective
from badit.runs.folder import AnyPath
from badit.support.console import say
from badit.support.errors import BaditError, explained
from badit.support.files import append_to_log, rewind_log
from badit.training.checkpoints import checkpoint_being_written, resumed_checkpoint
from badit.tuner.badit_layer import BaditLinear
from badit.tuner.config import TOP_K_REFUSED, Count, RegroupOptions, check
from badit.tuner.distributed import (
    before_step,
    component_grams,
    gathered,
    rank_and_size,
    scale_columns,
)
from badit.tuner.layer import ExpertLinear

STATE_FILE = "badit_regroup.safetensors"
_ANGLES_FILE = "badit_angles.safetensors"
_RESCALE_LIMIT = 4.0  # limits the factor of a weight if an expert's mean gate is near zero

Place = tuple[ExpertLinear, str]  # a layer and the name of one of its adapters


def trainable_adapters(
    model: nn.Module, kind: type[ExpertLinear] = BaditLinear
) -> Iterator[tuple[str, Place]]:
    """Yields (name, (layer, adapter)) of every trainable adapter in layers of class ``kind``, in the model's order."""
    for layer in (module for module in model.modules() if isinstance(module, kind)):
        for adapter, factor in layer.badit_A.items():
            if factor.requires_grad:
                yield f"{layer.name}.{adapter}", (layer, adapter)


class Windows:
    """The layers' sums since the last regrouping, updated before each optimizer step and saved in checkpoints.

    Pass the Trainer's ``optimizer`` if it can take its steps inside the backward pass (DeepSpeed).
    """

    def __init__(self, layers: Mapping[str, Place], optimizer: Any = None) -> None:
        self.layers, self.steps = layers, dict.fromkeys(layers, 0)
        # "gram_sum:LAYER" (N, N), and "gate_sums:LAYER" (K + 1): the sums of the gates and their count, on this rank.
        self.sums: dict[str, torch.Tensor] = {}
        self.pending: dict[
            str, dict[str, Any]
        ] = {}  # by layer, the log line of a regrouping until it has its angles
        self._pop_gates()
        self._reads_in_engine = before_step(optimizer, self._read_gradients)

    def after_backward(self) -> None:
        """Reads the gradients of an optimizer step. Call it when they are complete and before they are used."""
        if not self._reads_in_engine:
            self._read_gradients()

    def _read_gradients(self) -> None:
        factors = [
            (layer.badit_A[adapter], layer.badit_B[adapter])
            for layer, adapter in self.layers.values()
        ]
        for name, gram_NN, gates in zip(
            self.layers, component_grams(factors), self._pop_gates(), strict=True
        ):
            if gram_NN is not None:
                self.steps[name] += 1
                for key, term in ((f"gram_sum:{name}", gram_NN), (f"gate_sums:{name}", gates)):
                    if term is not None:  # a sum from a checkpoint is on the CPU
                        self.sums[key] = (
                            self.sums[key].to(term.device) + term if key in self.sums else term
                        )

    def restart(self) -> None:
        """Resets the sums; keeps the pending log lines."""
        self.sums, self.steps = {}, dict.fromkeys(self.layers, 0)

    def _pop_gates(self) -> list[torch.Tensor | None]:
        """Returns each layer's sums of gates since the last call."""
        places = self.layers.values()
        return [
            one.gate_sums.pop(adapter, None) if isinstance(one, BaditLinear) else None
            for one, adapter in places
        ]

    def mean_grams(self) -> dict[str, np.ndarray]:
        """Returns the mean Gram matrices on the CPU, without those of windows without steps."""
        means = {
            name: self.sums[f"gram_sum:{name}"] / steps
            for name, steps in self.steps.items()
            if steps
        }
        return {name: mean_NN.cpu().double().numpy() for name, mean_NN in means.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns tensors and plain values. All ranks must call it, because each rank has its own sums of gates."""
        tensors = {
            key: self.sums[key].contiguous() for key in sorted(self.sums)
        }  # in the same order on all ranks
        tensors |= {
            key: gathered(sums) for key, sums in tensors.items() if key.startswith("gate_sums:")
        }
        return tensors, {
            name: {"steps": n, "pending": self.pending.get(name, {})}
            for name, n in self.steps.items()
        }

    def set_state(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        if notes.keys() != self.layers.keys():
            raise BaditError(
                "regrouping state: saved with another model or target_modules; resume with the same ones"
            )
        rank, ranks = rank_and_size()
        self.steps = {name: notes[name]["steps"] for name in self.layers}
        self.pending = {
            name: notes[name]["pending"] for name in self.layers if notes[name]["pending"]
        }
        self.sums = dict(tensors)
        for key, of_ranks in tensors.items():
            if key.startswith(
                "gate_sums:"
            ):  # an equal share of the sum if the number of ranks has changed
                self.sums[key] = (
                    of_ranks[rank] if len(of_ranks) == ranks else of_ranks.sum(dim=0) / ranks
                )
        self._pop_gates()  # drops earlier sums, which belong to no window

    def save(self, path: Path, *, write: bool = True) -> None:
        """Writes the state to a safetensors file on ranks with ``write``; all ranks must call it."""
        tensors, notes = self.state()
        if write:
            save_file(tensors, path, metadata={"windows": json.dumps(notes)})

    def load(self, path: Path) -> None:
        fix = "resume from another checkpoint, or pass RegroupCallback(checkpoint=FOLDER) if this one has moved"
        with explained(path, action="resumed from", fix=fix, any_error=True):
            with safe_open(path, framework="pt") as file:
                notes = json.loads((file.metadata() or {})["windows"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            self.set_state(tensors, notes)


class Regrouper:
    """Regroups the components of every trainable BADIT adapter of a model in a custom training loop.

        model.train()
        regrouper = Regrouper(model, total_steps=len(loader) * epochs, every=20)
        for batch in loader:
            model(**batch).loss.backward()
            regrouper.after_backward()    # before the optimizer uses the gradients
            optimizer.step()
            optimizer.zero_grad()
            regrouper.step()
        regrouper.finish()

    With gradient accumulation, make both calls once per optimizer step, not once per batch. With several processes, all
    ranks must make them. For Trainer, use :class:`badit.RegroupCallback`.

    Args:
        model: a model with a trainable BADIT adapter, optionally wrapped for data parallelism.
        total_steps: optimizer steps of the whole run; ``stop`` is a fraction of it.
        log_path: the log file, with one line per layer and regrouping; None for no log.
        optimizer: the optimizer; needed only under DeepSpeed, which takes its steps inside the backward pass.
        options: the fields of :class:`RegroupOptions`: every, stop, solver, restarts, rescale.

    The log line of a regrouping is written at the end of the *following* window, because its angles are measured on
    gradients that the grouping was not fitted to. It has step, module, objective_before and objective_after (on the
    Gram matrix that was grouped), components_moved, and the angles of the previous and the new grouping.

    Attributes:
        steps: optimizer steps so far.
        due: the steps after which it regroups.
        metrics: means over the layers for the last regrouping: objective_before, objective_after, components_moved,
            and the angles of the grouping before it. Empty before the first regrouping.

    Raises:
        BaditError: if an option is out of range, there is no trainable BADIT adapter, or an adapter uses top_k.
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
        check("total_steps", total_steps, Count)
        layers = dict(trainable_adapters(model))
        if not layers:
            raise BaditError(
                "there is no trainable BADIT adapter to regroup; add one to the model, or do not regroup"
            )
        for name, (layer, adapter) in layers.items():
            config = layer.badit_config[adapter]
            if config.top_k is not None and config.top_k < config.num_experts:
                raise BaditError(f"{name}: {TOP_K_REFUSED}")
        self.due = self.options.due(total_steps)
        self.steps = 0
        self.metrics: dict[str, float] = {}
        self.windows = Windows(layers, optimizer)
        self._log = (
            Path(log_path) if log_path is not None and rank_and_size()[0] == 0 else None
        )  # only rank 0 writes
        self._log_is_open = False

    def after_backward(self) -> None:
        """Reads the gradients of an optimizer step; call it when they are complete, before the step uses them."""
        if not self._log_is_open:
            self.open_log()
        self.windows.after_backward()

    def step(self) -> None:
        """Counts a completed optimizer step and regroups if a regrouping is due."""
        self.steps += 1
        if self.steps in self.due:
            self._regroup()

    def finish(self) -> None:
        """Writes the log lines of the last regrouping, which wait for its angles. Call it at the end of training."""
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
        if self._log is not None:
            # The lines of the last regrouping and of later ones are written again.
            pending = [line["step"] for line in self.windows.pending.values()]
            rewind_log(self._log, pending[0] - 1 if pending else self.steps)

    def _regroup(self) -> None:
        grams = self.windows.mean_grams()
        self._write_pending(grams)
        solver, restarts = self.options.solver, self.options.restarts
        for index, (name, gram_NN) in enumerate(grams.items()):
            (layer, adapter), gate_sums = (
                self.windows.layers[name],
                self.windows.sums.get(f"gate_sums:{name}"),
            )
            # A copy, because on a CPU the array would share memory with the buffer.
            old_N = layer.expert_of(adapter).cpu().numpy().copy()
            new_N = group_components(
                gram_NN, old_N, solver=solver, restarts=restarts, seed=[0, self.steps, index]
            )
            # All ranks use rank 0's labels, because rounding may differ between ranks.
            new_N = gathered(torch.from_numpy(new_N))[0].cpu().numpy()
            if self.options.rescale and gate_sums is not None:
                of_all_ranks = gathered(gate_sums).sum(dim=0)
                scale_columns(layer.badit_B[adapter], _scale_of_moved(of_all_ranks, old_N, new_N))
            layer.expert_of(adapter).copy_(torch.from_numpy(new_N))
            self.windows.pending[name] = {
                "step": self.steps,
                "module": name,
                "objective_before": grouping_objective(gram_NN, old_N),
                "objective_after": grouping_objective(gram_NN, new_N),
                "components_moved": int((old_N != new_N).sum()),
                "previous_labels": old_N.tolist(),
                "labels": new_N.tolist(),
            }
        self.windows.restart()
        self.metrics |= _means([*self.windows.pending.values()])

    def _write_pending(self, grams: Mapping[str, np.ndarray]) -> None:
        """Writes the log lines of the last regrouping, with the angles of the window that followed it."""
        lines = []
        for name, pending in self.windows.pending.items():
            line = {**pending, "logged_at": self.steps, "window_steps": self.windows.steps[name]}
            for prefix in ("previous_", "") if name in grams else ():
                angles = expert_angles(grams[name], np.asarray(line[f"{prefix}labels"])).defined()
                line |= {f"{prefix}{field}": value for field, value in angles.items()}
            lines.append(line)
        self.windows.pending = {}
        if self._log is not None:
            append_to_log(self._log, *lines)
        self.metrics |= _means(
            lines
        )  # the objectives are the last regrouping's; a new one replaces them


class RegroupCallback(TrainerCallback):
    """Regroups the components of every trainable BADIT adapter during training with HF's or TRL's trainers.

    Args:
        log_path: the log, one line per layer and regrouping (default: ``regroupings.jsonl`` in the output folder).
        checkpoint: the checkpoint folder to resume from; needed only if it is neither the arguments'
            ``resume_from_checkpoint`` nor the trainer's ``output_dir/checkpoint-STEP``.
        options: the fields of :class:`RegroupOptions`: every, stop, solver, restarts, rescale.
    """

    def __init__(
        self, *, log_path: AnyPath | None = None, checkpoint: AnyPath | None = None, **options: Any
    ) -> None:
        RegroupOptions(**options)
        self._options, self._log_path, self._checkpoint = options, log_path, checkpoint
        self.regrouper: Any = None  # set when training begins
        self._taken: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        cut = getattr(args, "packing", False) and getattr(args, "packing_strategy", "") in (
            "wrapped",
            "bfd_split",
        )
        if cut and any(
            one.badit_config[name].routing == "prompt"
            for _, (one, name) in trainable_adapters(model)
        ):
            problem = f"{args.packing_strategy} cuts examples, so an answer may be separated from its prompt"
            raise BaditError(f"packing_strategy: {problem}; use bfd, or routing='token'")
        log_path, optimizer = (
            self._log_path or Path(args.output_dir) / "regroupings.jsonl",
            kwargs.get("optimizer"),
        )
        self.regrouper = Regrouper(
            model, state.max_steps, log_path=log_path, optimizer=optimizer, **self._options
        )
        if state.global_step > 0:
            self.regrouper.windows.load(
                Path(self._checkpoint or resumed_checkpoint(args, state)) / STATE_FILE
            )
            self.regrouper.steps = state.global_step
        self.regrouper.open_log()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.after_backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.finish()
        if (
            not any(step <= state.global_step for step in self.regrouper.due[:1])
            and state.is_world_process_zero
        ):
            say(f"badit: 0 regroupings in {state.global_step} steps: lower regroup.every")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regrouper.windows.save(
            checkpoint_being_written(args, state) / STATE_FILE, write=args.should_save
        )

    def take_metrics(self) -> dict[str, float]:
        """Returns the regrouper's metrics as ``regroup/NAME``, for trackers, if they are new since the last call."""
        metrics = {} if self.regrouper is None else self.regrouper.metrics
        if metrics == self._taken:
            return {}
        self._taken = dict(metrics)
        return {f"regroup/{name}": value for name, value in metrics.items()}


class AngleLog(TrainerCallback):
    """Logs a line per layer and window of ``every`` steps: step, module, window_steps and fields of ExpertAngles."""

    def __init__(self, path: Path, every: int = 20) -> None:
        self._log, self.every, self.windows = path, every, Windows({})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.windows = Windows(
            dict(trainable_adapters(kwargs["model"], ExpertLinear)), kwargs.get("optimizer")
        )
        if state.global_step:
            self.windows.load(resumed_checkpoint(args, state) / _ANGLES_FILE)
        if state.is_world_process_zero:
            rewind_log(self._log, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.windows.after_backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        # All ranks have the same sums; only rank 0 writes.
        for name, gram_NN in (
            self.windows.mean_grams().items() if state.is_world_process_zero else ()
        ):
            layer, adapter = self.windows.layers[name]
            angles = expert_angles(gram_NN, layer.expert_of(adapter).cpu().numpy()).defined()
            line = {
                "step": state.global_step,
                "module": name,
                "window_steps": self.windows.steps[name],
            }
            append_to_log(self._log, {**line, **angles})
        self.windows.restart()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.windows.save(
            checkpoint_being_written(args, state) / _ANGLES_FILE, write=args.should_save
        )


def _means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the metrics of a regrouping, means over its lines (the layers); missing values are ignored."""
    fields = (
        "objective_before",
        "objective_after",
        "components_moved",
        "intra_degrees",
        "inter_degrees",
    )
    found = {
        field: [line[field] for line in lines if line.get(field) is not None] for field in fields
    }
    return {field: float(np.mean(values)) for field, values in found.items() if values}


def _scale_of_moved(gate_sums: torch.Tensor, old_N: np.ndarray, new_N: np.ndarray) -> torch.Tensor:
    mean_K = gate_sums[:-1] / gate_sums[-1].clamp_min(1.0)
    old, new = torch.from_numpy(old_N).to(mean_K.device), torch.from_numpy(new_N).to(mean_K.device)
    ratio_N = (mean_K[old] / mean_K[new].clamp_min(1e-6)).clamp(1 / _RESCALE_LIMIT, _RESCALE_LIMIT)
    return torch.where(old == new, 1.0, ratio_N)
