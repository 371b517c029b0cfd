"""Gradient surgery: PCGrad and CAGrad against naive implementations, and in the trainer."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st

from badit.data import AnswerCollator
from badit.training.surgery import SurgeryTrainer, combination, rows_of_task
from baselines import naive
from reference import float64
from refusals import refuses
from training.trainers import adapted, examples, make_trainer
from tuner.helpers import randomise

TASKS = ("cities", "rivers", "hills")


def naive_pcgrad(gradients, orders):
    """Algorithm 1, given the order in which each gradient is projected against the others."""
    g = float64(gradients)
    total = 0.0 * g[0]
    for i, order in enumerate(orders):
        projected = g[i].copy()
        for j in order:
            product = float(projected @ g[j])
            if j != i and product < 0:
                projected = projected - product / float(g[j] @ g[j]) * g[j]
        total = total + projected
    return torch.from_numpy(total)


def naive_cagrad(gradients, c):
    """Algorithm 1 for two tasks, times two, with weights from a grid search over 10,001 values."""
    g, norm = float64(gradients), np.linalg.norm
    mean = g.mean(axis=0)
    mixtures = [w * g[0] + (1 - w) * g[1] for w in np.linspace(0, 1, 10001)]
    best = min(mixtures, key=lambda mixture: mixture @ mean + c * norm(mean) * norm(mixture))
    return torch.from_numpy(2 * (mean + c * norm(mean) / norm(best) * best))


def with_tasks(count=24):
    return [{**example, "task": TASKS[i % 3]} for i, example in enumerate(examples(count))]


def batch_of(data, side="right"):
    return AnswerCollator(0, side, with_tasks=True)(data)


def surgery_trainer(model, folder, surgery="pcgrad"):
    data = {"train_dataset": with_tasks(), "data_collator": AnswerCollator(0, with_tasks=True)}
    return SurgeryTrainer(
        surgery=surgery, model=model, args=make_trainer(model, folder, []).args, **data
    )


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def step(trainer, model, *batches, accumulation=1):
    """The last loss, and the gradients accumulated over the micro-batches."""
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = accumulation  # set by the Trainer in its own loop
    losses = [
        trainer.training_step(model, batch, (batch["labels"] != -100).sum()) for batch in batches
    ]
    return losses[-1], [p.grad.clone() for p in model.parameters() if p.grad is not None]


@given(tasks=st.integers(1, 5), parameters=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_pcgrad_matches_naive_pcgrad_in_the_seeded_order(tasks, parameters, seed):
    gradients = torch.randn(tasks, parameters, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    found = combination("pcgrad")(gradients)
    torch.manual_seed(seed)
    orders = [torch.randperm(tasks).tolist() for _ in range(tasks)]
    torch.testing.assert_close(
        found.double(), naive_pcgrad(gradients, orders), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_cagrad_matches_a_grid_search_over_its_weights(seed, size):
    gradients = size * torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    found, expected = combination("cagrad")(gradients) / size, naive_cagrad(gradients, 0.5) / size
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(found, gradients.sum(dim=0) / size, atol=0.05)


def test_cagrad_keeps_a_gradient_beside_a_small_one():
    found = combination("cagrad")(torch.tensor([[1.0, 0.0], [0.0, 1e-5]]))
    assert found.tolist() == pytest.approx([1.0, 0.5], abs=1e-3)
    assert not combination("cagrad")(torch.full((2, 2), 1e38)).isfinite().any(), (
        "such a step is skipped"
    )


@pytest.mark.parametrize("surgery", ["pcgrad", "cagrad"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_combined_as_one_vector_per_task(tiny_model, tmp_path, surgery, family):
    model = randomise(adapted(tiny_model(family), lora_dropout=0.0))
    trainer = surgery_trainer(model, tmp_path, surgery)
    trained = [p for p in model.parameters() if p.requires_grad]
    for side in ("left", "right"):
        batch = batch_of(with_tasks(7), side)
        trainer.current_gradient_accumulation_steps = 1
        rows, labels = [], (batch["labels"] != -100).sum()
        for task in TASKS:
            loss = trainer.compute_loss(
                model.train(), rows_of_task(batch, task), num_items_in_batch=labels
            )
            rows.append(flat(torch.autograd.grad(loss, trained)))
        gradients = torch.stack(rows)
        assert (gradients @ gradients.T).min() < 0, "at least two tasks must conflict"
        torch.manual_seed(3)
        wanted = combination(surgery)(gradients)
        torch.manual_seed(3)
        loss, found = step(trainer, model, batch)
        assert not loss.requires_grad
        torch.testing.assert_close(flat(found), wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(wanted, gradients.sum(dim=0), atol=1e-3)
        plain_loss, plain = step(make_trainer(model, tmp_path, []), model, batch)
        torch.testing.assert_close(loss, plain_loss)
        torch.testing.assert_close(gradients.sum(dim=0), flat(plain), rtol=1e-4, atol=1e-6)


def test_micro_batch_gradients_add_up(tiny_model, tmp_path):
    model = randomise(adapted(tiny_model("llama"), lora_dropout=0.0))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    trainer = surgery_trainer(model, tmp_path, "cagrad")  # CAGrad has no random order
    batches = [batch_of(with_tasks(10)[:4]), batch_of(with_tasks(10)[4:])]
    first, second = (step(trainer, model, batch, accumulation=2)[1] for batch in batches)
    _, found = step(trainer, model, *batches, accumulation=2)
    torch.testing.assert_close(found, [a + b for a, b in zip(first, second, strict=True)])
    assert model.unused.grad is None


def test_extra_loss_counts_once_per_micro_batch(tiny_model, tmp_path):
    """The mean of the tasks' balance losses on their rows, halved by two micro-batches."""
    batch = batch_of(with_tasks(7))
    losses, extras = {}, []
    for weight in (0.0, 0.5):
        model = naive.adapted(tiny_model("llama"), "goat", balance_weight=weight)
        losses[weight], _ = step(surgery_trainer(model, tmp_path), model, batch, accumulation=2)
    for task in TASKS:
        part = rows_of_task(batch, task)
        model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
        extras.append(model.base_model.extra_loss(part["attention_mask"]).item())
    assert min(extras) > 0.1
    assert (losses[0.5] - losses[0.0]).item() == pytest.approx(sum(extras) / 3 / 2, rel=1e-3)


def test_several_processes_and_a_missing_solver_package_are_refused(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        Accelerator, "distributed_type", property(lambda self: DistributedType.MULTI_CPU)
    )
    refuses(
        "surgery runs in a single process", surgery_trainer, adapted(tiny_model("llama")), tmp_path
    )
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    assert combination("pcgrad")(torch.ones(2, 1)).tolist() == [2.0], "pcgrad needs no solver"
    refuses(
        r"surgery needs torchjd and a solver: pip install 'badit\[surgery\]'", combination, "cagrad"
    )
