from __future__ import annotations

import pytest
import torch

from badit.data import AnswerCollator, example_length
from badit.errors import BaditError

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1, "task": "a"},
    {"input_ids": [8], "labels": [8], "prompt_length": 0, "task": "b"},
]


def test_right_padding():
    batch = AnswerCollator(9)(EXAMPLES)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_left_padding():
    batch = AnswerCollator(0, side="left")(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]


def test_bad_use_is_refused():
    with pytest.raises(BaditError, match="side"):
        AnswerCollator(0, side="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BaditError, match="empty"):
        AnswerCollator(0)([])


def test_the_length_counts_prompt_and_answer():
    assert [example_length(example) for example in EXAMPLES] == [3, 1]
