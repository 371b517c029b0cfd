"""A batch of encoded examples as tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from badit.data.prompts import IGNORED_LABEL
from badit.errors import BaditError

if TYPE_CHECKING:
    import torch


@dataclass
class AnswerCollator:
    """Pads encoded examples to the longest of the batch.

    Args:
        pad_token_id: fills `input_ids`. The attention mask hides it, so a tokenizer without a pad token can use 0.
        side: of the padding: "right" for training, "left" for batched generation.
        with_tasks: adds `tasks`, the rows' task names, for a trainer that removes them before the model is called.
    """

    pad_token_id: int
    side: Literal["left", "right"] = "right"
    with_tasks: bool = field(default=False, kw_only=True)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels`, each (batch, longest) of int64; other keys are left out."""
        import torch

        if not examples:
            raise BaditError("examples: the batch is empty; give at least one example")

        def padded(rows: Iterable[list[int]], fill: int) -> torch.Tensor:
            tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, True, fill, padding_side=self.side)

        batch: dict[str, Any] = {
            "input_ids": padded((example["input_ids"] for example in examples), self.pad_token_id),
            "attention_mask": padded(([1] * len(example["input_ids"]) for example in examples), 0),
            "labels": padded((example["labels"] for example in examples), IGNORED_LABEL),
        }
        return batch | ({"tasks": [example["task"] for example in examples]} if self.with_tasks else {})


def batches_by_task(
    examples: Iterable[Mapping[str, Any]], collate: AnswerCollator, batch_size: int
) -> dict[str, list[dict[str, Any]]]:
    """Batches of one task each, by the examples' `task`, in the examples' order."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for example in examples:
        groups[example["task"]].append(example)
    return {
        task: [collate(group[start : start + batch_size]) for start in range(0, len(group), batch_size)]
        for task, group in groups.items()
    }


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device; other values are unchanged."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
