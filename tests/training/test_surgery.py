"""Gradient surgery: the combinations against loops, and what the trainer does with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st

from badit.data import AnswerCollator
from badit.errors import BaditError
from badit.surgery import SurgeryTrainer, cagrad, pcgrad, rows_of_task
from baselines import naive
from reference import float64
from training.trainers import StopAt, adapted, examples, make_trainer
from tuner.helpers import randomise

Model = Callable[..., Any]

TASKS = ("cities", "rivers", "hills")
# PEFT 0.19 looks for the model's configuration on disk when it saves; these models never were there.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")


def naive_pcgrad(gradients: Any, orders: list[list[int]]) -> Any:
    """Algorithm 1, with the order in which each gradient meets the others."""
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


def naive_cagrad(gradients: Any, c: float) -> Any:
    """Algorithm 1 for two tasks, times two: the weights by trying ten thousand of them."""
    g = float64(gradients)
    mean = (g[0] + g[1]) / 2
    radius = c * float(mean @ mean) ** 0.5

    def mixed(w: float) -> Any:
        return w * g[0] + (1 - w) * g[1]

    def length(vector: Any) -> float:
        return float(vector @ vector) ** 0.5

    best = min((i / 10000 for i in range(10001)), key=lambda w: mixed(w) @ mean + radius * length(mixed(w)))
    return torch.from_numpy(2 * (mean + radius / length(mixed(best)) * mixed(best)))


def random_gradients(tasks: int, parameters: int, seed: int) -> torch.Tensor:
    return torch.randn(tasks, parameters, generator=torch.Generator().manual_seed(seed))


def with_tasks(count: int = 24, tasks: tuple[str, ...] = TASKS) -> list[dict[str, Any]]:
    return [{**example, "task": tasks[i % len(tasks)]} for i, example in enumerate(examples(count))]


def batch_of(data: list[dict[str, Any]], side: Any = "right") -> dict[str, Any]:
    return AnswerCollator(0, side, with_tasks=True)(data)


def surgery_trainer(model: Any, folder: Path, surgery: Any = "pcgrad", **options: Any) -> SurgeryTrainer:
    return SurgeryTrainer(
        surgery=surgery,
        model=model,
        args=make_trainer(model, folder, []).args,
        train_dataset=with_tasks(),
        data_collator=AnswerCollator(0, with_tasks=True),
        **options,
    )


def labels_in(batch: dict[str, Any]) -> int:
    return int((batch["labels"] != -100).sum())


def step(
    trainer: Any, model: Any, batch: dict[str, Any], accumulation: int = 1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and gradients of one micro-batch from clean gradients."""
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = accumulation  # as the Trainer sets it in its own loop
    loss = trainer.training_step(model, batch, labels_in(batch))
    return loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]


@settings(deadline=None, max_examples=60)
@given(tasks=st.integers(1, 5), parameters=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_pcgrad_equals_the_loops_in_the_seeded_order(tasks: int, parameters: int, seed: int) -> None:
    gradients = random_gradients(tasks, parameters, seed)
    torch.manual_seed(seed)
    found = pcgrad()(gradients)
    torch.manual_seed(seed)
    orders = [torch.randperm(tasks).tolist() for _ in range(tasks)]
    torch.testing.assert_close(found.double(), naive_pcgrad(gradients, orders), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_cagrad_equals_a_search_over_its_weights(seed: int, size: float) -> None:
    gradients = size * random_gradients(2, 4, seed)
    found, expected = cagrad()(gradients) / size, naive_cagrad(gradients, 0.5) / size
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(found, gradients.sum(dim=0) / size, atol=0.05)


@pytest.mark.parametrize("surgery", ["pcgrad", "cagrad"])
def test_gradients_that_are_not_finite_are_left_for_the_trainer_to_see(
    tiny_model: Model, tmp_path: Path, surgery: str
) -> None:
    trainer = surgery_trainer(adapted(tiny_model("llama")), tmp_path, surgery)
    gradients = torch.tensor([[1.0, float("inf")], [-2.0, 1.0]])
    assert trainer._combined(gradients).tolist() == [-1.0, float("inf")]


def test_a_tasks_rows_lose_only_the_padding_behind_them() -> None:
    data = with_tasks(6)
    for side in ("right", "left"):
        batch = batch_of(data, side)
        width = batch["input_ids"].shape[1]
        for task in TASKS:
            rows = [row for row, example in enumerate(data) if example["task"] == task]
            part = rows_of_task(batch, task)
            length = max(len(data[row]["input_ids"]) for row in rows) if side == "right" else width
            assert part.keys() == batch.keys()
            assert part["tasks"] == [task] * len(rows)
            for key in ("input_ids", "attention_mask", "labels"):
                assert torch.equal(part[key], torch.stack([batch[key][row, :length] for row in rows]))
            assert part["attention_mask"].sum() == sum(len(data[row]["input_ids"]) for row in rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_added_up_the_tasks_gradients_are_the_plain_one(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, side: str
) -> None:
    model = randomise(adapted(tiny_model(family), lora_dropout=0.0))
    trainer = surgery_trainer(model, tmp_path)
    batch = batch_of(with_tasks(7), side)
    wanted_loss, wanted = step(make_trainer(model, tmp_path, []), model, batch)
    monkeypatch.setattr(trainer, "_combine", lambda gradients_TP: gradients_TP.sum(dim=0))
    loss, found = step(trainer, model, batch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted_loss)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("surgery", ["pcgrad", "cagrad"])
def test_the_tasks_gradients_are_combined_as_one_vector_each(tiny_model: Model, tmp_path: Path, surgery: str) -> None:
    model = randomise(adapted(tiny_model("llama"), lora_dropout=0.0))
    trainer = surgery_trainer(model, tmp_path, surgery)
    batch = batch_of(with_tasks(7))
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer.current_gradient_accumulation_steps = 1
    rows = []
    for task in TASKS:
        loss = trainer.compute_loss(model.train(), rows_of_task(batch, task), num_items_in_batch=labels_in(batch))
        rows.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)]))
    gradients = torch.stack(rows)
    assert (gradients @ gradients.T).min() < 0, "tasks that agree show nothing"
    torch.manual_seed(3)
    wanted = (pcgrad() if surgery == "pcgrad" else cagrad())(gradients)
    torch.manual_seed(3)
    _, found = step(trainer, model, batch)
    torch.testing.assert_close(torch.cat([gradient.flatten() for gradient in found]), wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(wanted, gradients.sum(dim=0), atol=1e-3)


@pytest.mark.parametrize("surgery", ["pcgrad", "cagrad"])
def test_a_batch_of_one_task_is_a_plain_one(tiny_model: Model, tmp_path: Path, surgery: str) -> None:
    model = randomise(adapted(tiny_model("llama"), lora_dropout=0.1))
    batch = batch_of(with_tasks(4, tasks=("cities",)))
    outcomes = []
    for trainer in (surgery_trainer(model, tmp_path, surgery), make_trainer(model, tmp_path, [])):
        torch.manual_seed(0)
        outcomes.append(step(trainer, model, batch))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True))


def test_micro_batches_add_up_in_the_trainable_parameters_alone(tiny_model: Model, tmp_path: Path) -> None:
    model = randomise(adapted(tiny_model("llama"), lora_dropout=0.0))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    trainer = surgery_trainer(model, tmp_path, "cagrad")  # which has no random order
    trainer.current_gradient_accumulation_steps = 2
    data = with_tasks(10)
    model.zero_grad()
    alone = []
    for batch in (batch_of(data[:4]), batch_of(data[4:])):
        trainer.training_step(model, batch, labels_in(batch_of(data)))
        alone.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for batch in (batch_of(data[:4]), batch_of(data[4:])):
        trainer.training_step(model, batch, labels_in(batch_of(data)))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad} - {"unused"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, alone[0][name] + alone[1][name])


def test_a_methods_own_loss_counts_once_a_micro_batch(tiny_model: Model, tmp_path: Path) -> None:
    """The mean over the tasks of the balance loss on their rows, halved by accumulation over two micro-batches."""
    batch = batch_of(with_tasks(7))
    losses, extras = {}, []
    for weight in (0.0, 0.5):
        model = naive.adapted(tiny_model("llama"), "goat", balance_weight=weight)
        trainer = surgery_trainer(model, tmp_path)
        losses[weight], _ = step(trainer, model, batch, accumulation=2)
        assert trainer.current_gradient_accumulation_steps == 2
    for task in TASKS:
        part = rows_of_task(batch, task)
        model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
        extras.append(model.base_model.extra_loss(part["attention_mask"]).item())
    assert min(extras) > 0.1
    assert (losses[0.5] - losses[0.0]).item() == pytest.approx(sum(extras) / 3 / 2, rel=1e-3)


def test_training_changes_the_adapter_alone_and_resumes_to_the_same(tiny_model: Model, tmp_path: Path) -> None:
    states = []
    for stop in (None, 7):
        folder = tmp_path / str(stop)
        model = adapted(tiny_model("llama"))
        before = {name: p.clone() for name, p in model.named_parameters()}
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                surgery_trainer(model, folder, callbacks=[StopAt(stop)]).train()
            model = adapted(tiny_model("llama"))
        surgery_trainer(model, folder).train(resume_from_checkpoint=stop is not None)
        states.append(dict(model.named_parameters()))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


def test_what_it_cannot_do_is_refused(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_model("llama"))
    with pytest.raises(BaditError, match="surgery must be one of 'pcgrad', 'cagrad', got 'mgda'"):
        surgery_trainer(model, tmp_path, "mgda")
    batch = AnswerCollator(0)(examples(3))
    with pytest.raises(BaditError, match=r"tasks: missing from the batch; collate with AnswerCollator\(..., with_task"):
        surgery_trainer(model, tmp_path).training_step(model, batch, 5)
    args = make_trainer(model, tmp_path, []).args
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.MULTI_CPU))
    with pytest.raises(BaditError, match="surgery runs in a single process"):
        SurgeryTrainer(model=model, args=args, surgery="pcgrad")


@pytest.mark.parametrize("surgery", ["pcgrad", "cagrad"])
def test_without_torchjd_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, surgery: Any) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(BaditError, match=r"surgery needs torchjd and a solver: pip install 'badit\[surgery\]'"):
        SurgeryTrainer(surgery=surgery)


def test_without_its_solver_only_cagrad_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    assert pcgrad()(torch.ones(2, 1)).tolist() == [2.0]
    with pytest.raises(BaditError, match=r"pip install 'badit\[surgery\]'"):
        cagrad()
