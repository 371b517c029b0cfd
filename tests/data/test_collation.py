from __future__ import annotations

import pytest
import torch

from badit.data import AnswerCollator, batches_by_task, on_device
from badit.errors import BaditError

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1, "task": "a"},
    {"input_ids": [8], "labels": [8], "prompt_length": 0, "task": "b"},
]


def test_padding_on_either_side():
    right, left = AnswerCollator(9)(EXAMPLES), AnswerCollator(0, side="left")(EXAMPLES)
    assert right.keys() == left.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.long for tensor in right.values())
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]


def test_batches_by_task():
    batches = batches_by_task([*EXAMPLES, *EXAMPLES, EXAMPLES[0]], AnswerCollator(0, with_tasks=True), 2)
    assert {task: [batch["tasks"] for batch in group] for task, group in batches.items()} == {
        "a": [["a", "a"], ["a"]],
        "b": [["b", "b"]],
    }
    moved = on_device(batches["b"][0], torch.device("meta"))
    assert (moved["input_ids"].device.type, moved["tasks"]) == ("meta", ["b", "b"])


def test_bad_use_is_refused():
    with pytest.raises(BaditError, match="side"):
        AnswerCollator(0, side="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BaditError, match="empty"):
        AnswerCollator(0)([])
