"""How much a regrouping changes what the model says, on a few fixed prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import nn

from badit.generation import evaluation_mode
from badit.tuner.prompt import before_first_label

# One short prompt tells how far the output moves; more would be the dearest part of a regrouping.
_CANDIDATES, _TOKENS = 16, 16


class OutputProbe:
    """A model and fixed prompts; compares the logits that start an answer before and after a change."""

    def __init__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
        device = next(model.parameters()).device
        self._model = model
        # One prompt at a time and unpadded: the last position is then the answer's start whatever the padding side.
        self._prompts = [prompt.to(device) for prompt in _prompts(batch)]
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
        last_only = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._options = {"use_cache": False, **({"logits_to_keep": 1} if last_only else {})}

    @classmethod
    def of(cls, model: nn.Module, dataloader: Any) -> OutputProbe | None:
        """On the last 16 prompt tokens of the shortest of the data loader's first examples.

        None where the data set cannot be indexed.
        """
        dataset, collate = getattr(dataloader, "dataset", None), getattr(dataloader, "collate_fn", None)
        if collate is None or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__") or not len(dataset):
            return None
        candidates: list[Any] = [dataset[i] for i in range(min(_CANDIDATES, len(dataset)))]  # pyright: ignore
        shortest = min(candidates, key=lambda example: len(example["input_ids"]))
        return cls(model, {"input_ids": _prompts(collate([shortest]))[0][:, -_TOKENS:]})

    @torch.no_grad()
    def output(self) -> torch.Tensor:
        """The centred logits of every prompt's last position, (prompts, vocabulary), in evaluation mode."""
        with evaluation_mode(self._model):
            rows = [self._model(input_ids=prompt, **self._options).logits[:, -1] for prompt in self._prompts]
        logits = torch.cat(rows).float()
        return logits - logits.mean(dim=-1, keepdim=True)  # the softmax does not see a common shift

    def change(self, before: torch.Tensor) -> float:
        """‖after − before‖ / ‖before‖."""
        return float((self.output() - before).norm() / before.norm().clamp_min(1e-12))


def _prompts(batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    input_ids = batch["input_ids"]
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if "attention_mask" in batch:
        kept &= batch["attention_mask"].bool()
    if "labels" in batch:
        kept &= before_first_label(batch["labels"])
    return [row[keep][None] for row, keep in zip(input_ids, kept, strict=True)]
