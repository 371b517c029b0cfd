"""The regrouping callback of HF's Trainer, and so of TRL's trainers: a shell over :class:`badit.Regrouper`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from badit.errors import BaditError
from badit.method.grouping import Solver
from badit.training.checkpoints import resumed_checkpoint
from badit.training.probe import OutputProbe
from badit.training.regrouper import Regrouper, check_options

_PAIRS = 2


class RegroupCallback(TrainerCallback):
    """Regroups the components of every trainable BADIT adapter while an HF Trainer runs: see :class:`badit.Regrouper`.

    Args:
        every, start, stop, solver, restarts, seed, rescale: of :class:`badit.Regrouper`.
        probe: a batch (a dict of tensors) on which the change of the output is measured; "auto" takes the prompt (its
            last 16 tokens) of the shortest of the first sixteen training examples. None measures none, which spares
            each regrouping two short forward passes.
        log_path: where a line is written for every layer and regrouping; by default ``regroupings.jsonl`` in the
            trainer's output folder.
        checkpoint: the checkpoint folder that a resumed training starts from, needed only when that is neither the
            arguments' ``resume_from_checkpoint`` nor the trainer's own ``output_dir/checkpoint-STEP``.
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
        probe: Mapping[str, torch.Tensor] | Literal["auto"] | None = "auto",
        log_path: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        check_options(every, start, stop, solver, restarts)
        self._options: dict[str, Any] = {
            "every": every,
            "start": start,
            "stop": stop,
            "solver": solver,
            "restarts": restarts,
            "seed": seed,
            "rescale": rescale,
        }
        if isinstance(probe, str) and probe != "auto":
            raise BaditError(f"regroup.probe must be a batch, 'auto' or None, got {probe!r:.60}")
        self._probe_batch: Mapping[str, torch.Tensor] | Literal["auto"] | None = probe
        self._log_path = log_path
        self._checkpoint = checkpoint
        self.regrouper: Regrouper | None = None
        self._taken: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.regrouper = Regrouper(
            kwargs["model"],
            state.max_steps,
            **self._options,
            probe=_probe(kwargs["model"], self._probe_batch, kwargs.get("train_dataloader")),
            log_path=self._log_path or Path(str(args.output_dir)) / "regroupings.jsonl",
            optimizer=kwargs.get("optimizer"),
        )
        if state.global_step > 0:
            self.regrouper.load(self._checkpoint or resumed_checkpoint(args, state), state.global_step)
        else:
            self.regrouper.open_log()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running.after_backward()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running.steps = state.global_step
        self._running.regroup_if_due()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running.finish()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self._running.save(folder, write=args.should_save)

    def take_metrics(self) -> dict[str, float]:
        """The regrouper's metrics as ``regroup/NAME``, if there has been a regrouping since the last call; else {}.

        For a Trainer's ``log``, which hands them to trackers; badit's own does.
        """
        metrics = {} if self.regrouper is None else self.regrouper.metrics
        if metrics == self._taken:
            return {}
        self._taken = dict(metrics)
        return {f"regroup/{name}": value for name, value in metrics.items()}

    @property
    def _running(self) -> Regrouper:
        if self.regrouper is None:
            raise BaditError("RegroupCallback: the training has not begun; give it to the trainer before train()")
        return self.regrouper


def _probe(
    model: nn.Module, wanted: Mapping[str, torch.Tensor] | Literal["auto"] | None, dataloader: Any
) -> OutputProbe | None:
    if wanted is None:
        return None
    if not isinstance(wanted, str):
        return OutputProbe(model, wanted)
    dataset = getattr(dataloader, "dataset", None)
    if isinstance(dataset, Sized) and len(dataset) and "input_ids" not in _first(dataset):
        pairs = _pairs(dataset, getattr(dataloader, "collate_fn", None))
        return None if pairs is None else OutputProbe(model, pairs)
    return OutputProbe.of(model, dataloader)


def _pairs(dataset: Any, collate: Any) -> dict[str, torch.Tensor] | None:
    """The first pairs of a preference loss's data, such as TRL's DPO, their answers marked by labels; None of others.

    Its batches are the chosen answers' rows and then the rejected ones', which have the same prompts.
    """
    if collate is None or "chosen_ids" not in _first(dataset):
        return None
    batch = collate([dataset[i] for i in range(min(_PAIRS, len(dataset)))])
    rows = {key: batch[key][: len(batch[key]) // 2] for key in ("input_ids", "attention_mask", "completion_mask")}
    labels = rows["input_ids"].masked_fill(rows.pop("completion_mask") == 0, -100)
    return {**rows, "labels": labels}


def _first(dataset: Any) -> Mapping[str, Any]:
    example = dataset[0] if hasattr(dataset, "__getitem__") else {}
    return example if isinstance(example, Mapping) else {}
