"""Padding, and batches by task."""

from __future__ import annotations

import pytest
import torch

from badit.data import AnswerCollator, batches_by_task, on_device
from badit.errors import BaditError

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1, "task": "a"},
    {"input_ids": [8], "labels": [8], "prompt_length": 0, "task": "b"},
]
PADDED = {
    "right": {"input_ids": [8, 9, 9], "attention_mask": [1, 0, 0], "labels": [8, -100, -100]},
    "left": {"input_ids": [9, 9, 8], "attention_mask": [0, 0, 1], "labels": [-100, -100, 8]},
}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side):
    batch = AnswerCollator(9, side)(EXAMPLES)
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert {key: tensor[0].tolist() for key, tensor in batch.items()} == {
        "input_ids": [5, 6, 7],
        "attention_mask": [1, 1, 1],
        "labels": [-100, 6, 7],
    }
    assert {key: tensor[1].tolist() for key, tensor in batch.items()} == PADDED[side]
    with pytest.raises(BaditError, match="empty"):
        AnswerCollator(0, side)([])


def test_batches_by_task():
    batches = batches_by_task([*EXAMPLES, *EXAMPLES, EXAMPLES[0]], AnswerCollator(0, with_tasks=True), 2)
    assert {task: [batch["tasks"] for batch in group] for task, group in batches.items()} == {
        "a": [["a", "a"], ["a"]],
        "b": [["b", "b"]],
    }
    moved = on_device(batches["b"][0], torch.device("meta"))
    assert (moved["input_ids"].device.type, moved["tasks"]) == ("meta", ["b", "b"])
