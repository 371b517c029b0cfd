"""What the change of the output is measured on: given prompts, or a short one of the training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from badit.data import AnswerCollator
from badit.regroup import OutputProbe
from training.trainers import adapted

Model = Callable[..., Any]


def seen_by(model: Any, probe: OutputProbe) -> list[torch.Tensor]:
    """The token ids that the model runs on when the probe asks it."""
    seen: list[torch.Tensor] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"])

    handle = model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    probe.output()
    handle.remove()
    return seen


def loader(*lengths: tuple[int, int]) -> DataLoader:
    """Examples of prompts and answers of some lengths; every token is the number of its place, from 3."""
    examples = [
        {
            "input_ids": list(range(3, 3 + prompt + answer)),
            "labels": [-100] * prompt + list(range(3 + prompt, 3 + prompt + answer)),
        }
        for prompt, answer in lengths
    ]
    return DataLoader(examples, batch_size=2, collate_fn=AnswerCollator(0))  # pyright: ignore


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([(50, 2), (9, 1), (20, 3)], list(range(3, 12))),
        ([(50, 2), (40, 5)], list(range(27, 43))),  # of 40 tokens the last 16
        ([(14, 1)] * 16 + [(5, 1)], list(range(3, 17))),  # the seventeenth is not looked at
    ],
)
def test_by_default_one_prompt_of_at_most_16_tokens(
    tiny_model: Model, lengths: list[tuple[int, int]], expected: list[int]
) -> None:
    model = adapted(tiny_model("llama"))
    probe = OutputProbe.of(model, loader(*lengths))
    assert probe is not None
    assert [ids.tolist() for ids in seen_by(model, probe)] == [[expected]]


def test_a_given_batch_is_taken_whole_and_without_padding_and_answers(tiny_model: Model) -> None:
    model = adapted(tiny_model("llama"))
    batch = AnswerCollator(0)(
        [
            {"input_ids": list(range(3, 63)), "labels": [-100] * 50 + [5] * 10},
            {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]},
        ]
    )
    seen = seen_by(model, OutputProbe(model, batch))
    assert [ids[0].tolist() for ids in seen] == [list(range(3, 53)), [3, 4]]


def test_there_is_none_without_data_to_index(tiny_model: Model) -> None:
    assert OutputProbe.of(adapted(tiny_model("llama")), None) is None


def test_the_model_is_left_as_it_was(tiny_model: Model) -> None:
    model = adapted(tiny_model("llama")).train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    probe = OutputProbe(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    before = probe.output()
    assert torch.equal(probe.output(), before)  # no dropout
    assert probe.change(before) == 0
    assert [module.training for module in model.modules()] == modes
    assert not before.requires_grad
