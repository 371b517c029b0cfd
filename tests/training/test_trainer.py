"""The answer-only loss against a naive one, and the order of the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from badit.data import AnswerCollator
from badit.errors import BaditError
from badit.trainer import EpochSampler, logits_only_at
from training.trainers import adapted, examples, make_trainer
from tuner.helpers import randomise

Model = Callable[..., Any]
FAMILIES = ["llama", "gemma2", "gpt2"]


def naive_loss(model: Any, batch: dict[str, torch.Tensor], items: int) -> torch.Tensor:
    """Every logit computed, then the mean negative log-likelihood of the answers' tokens, one by one."""
    logits = model(**batch).logits
    total = torch.zeros(())
    for row in range(len(batch["labels"])):
        for position in range(1, batch["labels"].shape[1]):
            label = batch["labels"][row, position]
            if label != -100:
                total = total - F.log_softmax(logits[row, position - 1].float(), dim=-1)[label]
    return total / items


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_equal_the_naive_ones(
    tiny_model: Model, tmp_path: Path, family: str, side: Any
) -> None:
    model = randomise(adapted(tiny_model(family), lora_dropout=0.0)).eval()
    trainer = make_trainer(model, tmp_path, [])
    batch = dict(AnswerCollator(0, side=side)(examples(5)))
    items = int((batch["labels"] != -100).sum())

    expected = naive_loss(model, batch, items)
    wanted = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_logits_are_computed_only_at_labels(tiny_model: Model, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"))
    trainer = make_trainer(model, tmp_path, [])
    batch = dict(AnswerCollator(0)(examples(5)))
    _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape == (1, int((batch["labels"] != -100).sum()), 100)
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape, "the hook is gone"


def test_accumulated_batches_weigh_tokens_equally(tiny_model: Model, tmp_path: Path) -> None:
    """Two batches of two, accumulated, step as one batch of four does."""
    states = []
    for batch, accumulation in ((4, 1), (2, 2)):
        model = adapted(tiny_model("llama"), lora_dropout=0.0)
        trainer = make_trainer(
            model,
            tmp_path / str(batch),
            [],
            count=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            save_strategy="no",
            optim="sgd",
        )
        trainer.train()
        states.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-7)


def test_a_model_without_an_output_layer_is_refused(tiny_model: Model) -> None:
    model = tiny_model("llama").model
    with (
        pytest.raises(BaditError, match="only causal language models"),
        logits_only_at(model, *torch.zeros(2, 1).long()),
    ):
        pass


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_every_example_comes_once_in_batches_led_by_the_longest(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    sampler = EpochSampler(lengths, batch_size=batch_size, seed=seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(sampler)
    if len(lengths) >= 16 * batch_size and len(lengths) % batch_size == 0:
        assert lengths[order[0]] == max(lengths)


def test_the_order_depends_on_seed_and_epoch() -> None:
    sampler = EpochSampler(list(range(100)), batch_size=4, seed=0)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = EpochSampler(list(range(100)), batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert len({tuple(order) for order in orders}) == 3


def test_grouping_by_length_saves_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 500, (512,), generator=generator).tolist()

    def padded(batch_size: int | None) -> int:
        order = list(EpochSampler(lengths, batch_size=batch_size, seed=0))
        return sum(8 * max(lengths[i] for i in order[start : start + 8]) for start in range(0, len(order), 8))

    assert padded(8) - sum(lengths) < 0.2 * (padded(None) - sum(lengths))


def test_of_several_gpus_one_process_uses_one_and_says_so_once(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [adapted(tiny_model("llama")) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for model in models:
        trainer = make_trainer(model, tmp_path, [], use_cpu=False, max_steps=1, save_strategy="no")
        assert trainer.args.train_batch_size == 4
        trainer.train()
    assert (
        capsys.readouterr().err.count(
            "badit: training on one of 2 GPUs; to use all of them: "
            "accelerate launch --multi_gpu --num_processes 2 -m badit train RECIPE"
        )
        == 1
    )
