"""Steps whose loss or gradient is not finite: skipped and counted, until there are too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from badit.errors import BaditError
from badit.training.gradients import local_gradient, steps_in_backward
from badit.training.ranks import any_of_all

_NAMED = 8


class SkipNonFinite(TrainerCallback):
    """Drops the gradients of such a step, so that neither weights nor moments nor Gram matrices ever see them.

    It must come before the callbacks that read gradients. A single infinity may be an instance's or the precision's; a
    run that keeps meeting them is broken, and going on would only hide it.

    Args:
        trainer: keeps the step's micro-batches and their losses, and the number of skipped steps.
        limit: steps that may be skipped in a run.
    """

    def __init__(self, trainer: Any, limit: int) -> None:
        self._trainer = trainer
        self._limit = limit

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        micro_batches = self._trainer.take_micro_batches()
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        gradients = [local_gradient(parameter) for parameter in parameters]
        tensors = [loss for loss, _ in micro_batches] + [gradient for gradient in gradients if gradient is not None]
        # One answer to wait for, not one a tensor.
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
        if not any_of_all(not bool(finite)):
            return
        self._trainer.skipped_steps += 1
        # DeepSpeed has taken the step by now, so that there is nothing left to skip.
        limit = 0 if steps_in_backward(kwargs["optimizer"]) else self._limit
        if self._trainer.skipped_steps > limit:
            raise BaditError(
                f"training: the loss or its gradient is not finite in step {state.global_step + 1}, after "
                f"{limit} skipped steps; the batch has {named(micro_batches, self._trainer.train_dataset)}; "
                "look at these, or lower training.learning_rate"
            )
        for parameter in parameters:
            parameter.grad = None  # optimizers pass over parameters without a gradient


def named(
    micro_batches: Sequence[tuple[torch.Tensor, Mapping[str, Any]]], examples: Sequence[Mapping[str, Any]]
) -> str:
    """The instances of the micro-batches with a loss that is not finite (of all, where only gradients are not)."""
    bad = [inputs for loss, inputs in micro_batches if not bool(loss.isfinite())]
    rows = {
        (task, tuple(ids[mask.bool()].tolist()))
        for inputs in bad or [inputs for _, inputs in micro_batches]
        for task, ids, mask in zip(inputs["tasks"], inputs["input_ids"], inputs["attention_mask"], strict=True)
    }
    names = [
        f"{example['task']}/{example['id']}"
        for example in examples
        if (example["task"], tuple(example["input_ids"])) in rows
    ]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"instance{'s' if len(names) > 1 else ''} {', '.join(names[:_NAMED])}{more}"
