"""A batch of encoded examples as tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from badit.data.prompts import IGNORED_LABEL
from badit.errors import BaditError

if TYPE_CHECKING:
    import torch


class AnswerCollator:
    """Pads encoded examples to the longest of the batch.

    Args:
        pad_token_id: fills `input_ids`. The attention mask hides it, so a tokenizer without a pad token can use 0.
        side: where the padding goes: "right" for training, "left" for batched generation.
        with_tasks: adds `tasks`, the list of the rows' task names, which no model takes: only for a trainer that takes
            it out.
    """

    def __init__(
        self, pad_token_id: int, side: Literal["left", "right"] = "right", *, with_tasks: bool = False
    ) -> None:
        if side not in ("left", "right"):
            raise BaditError(f"side: must be 'left' or 'right', not {side!r:.60}")
        self.pad_token_id = pad_token_id
        self.side = side
        self.with_tasks = with_tasks

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels`, each (batch, longest) of int64; other keys are left out."""
        import torch

        if not examples:
            raise BaditError("examples: the batch is empty; give at least one example")
        rows = {
            "input_ids": ([example["input_ids"] for example in examples], self.pad_token_id),
            "attention_mask": ([[1] * len(example["input_ids"]) for example in examples], 0),
            "labels": ([example["labels"] for example in examples], IGNORED_LABEL),
        }
        longest = max(len(example["input_ids"]) for example in examples)
        batch: dict[str, Any] = {
            key: torch.tensor([self._padded(row, longest, fill) for row in values], dtype=torch.long)
            for key, (values, fill) in rows.items()
        }
        return batch | ({"tasks": [example["task"] for example in examples]} if self.with_tasks else {})

    def _padded(self, row: list[int], length: int, fill: int) -> list[int]:
        padding = [fill] * (length - len(row))
        return row + padding if self.side == "right" else padding + row


def batches_by_task(
    examples: Iterable[Mapping[str, Any]], collate: AnswerCollator, batch_size: int
) -> dict[str, list[dict[str, Any]]]:
    """By the examples' `task`, batches of it alone, in the examples' order."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for example in examples:
        groups[example["task"]].append(example)
    return {
        task: [collate(group[start : start + batch_size]) for start in range(0, len(group), batch_size)]
        for task, group in groups.items()
    }


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device; what is no tensor stays as it is."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
