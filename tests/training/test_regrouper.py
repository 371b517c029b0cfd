"""Regrouping in a loop of one's own: what Trainer's callback does, and the same after a resumption by accelerate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from badit import BaditError, RegroupCallback, Regrouper
from badit.data import AnswerCollator
from training.trainers import adapted, examples

Model = Callable[..., Any]
PROBE = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
BATCHES = 12


def batches() -> list[dict[str, torch.Tensor]]:
    collate, rows = AnswerCollator(0), examples(BATCHES * 4)
    return [collate(rows[start : start + 4]) for start in range(0, len(rows), 4)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "badit_" in name}


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)


def by_trainer(model: Any, folder: Path, accumulated: int) -> None:
    class InOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return self.accelerator.prepare(DataLoader(batches(), batch_size=None))  # pyright: ignore

    optimizer = optimizer_of(model)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=BATCHES // accumulated,
            gradient_accumulation_steps=accumulated,
            max_grad_norm=0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=batches(),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[RegroupCallback(every=2, stop=1.0, probe=PROBE)],
    )
    trainer.model_accepts_loss_kwargs = False  # the mean over each batch, as the loop below takes it
    trainer.train()


class Loop:
    """A plain loop over the batches, as docs/integrations.md has it."""

    def __init__(self, model: Any, log: Path, accumulated: int = 1) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, optimizer_of(model), DataLoader(batches(), batch_size=None)
        )
        steps = BATCHES // accumulated
        self.regrouper = Regrouper(self.model, steps, every=2, stop=1.0, probe=PROBE, log_path=log)
        self.accelerator.register_for_checkpointing(self.regrouper)

    def run(self, first: int = 0, last: int = BATCHES) -> None:
        for batch in list(self.loader)[first:last]:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.regrouper.after_backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.regrouper.step()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_plain_loop_ends_as_the_trainer_does(tiny_model: Model, tmp_path: Path, accumulated: int) -> None:
    trained = adapted(tiny_model("llama"), lora_dropout=0.0)
    by_trainer(trained, tmp_path, accumulated)
    model = adapted(tiny_model("llama"), lora_dropout=0.0).train()
    loop = Loop(model, tmp_path / "own.jsonl", accumulated)
    loop.run()
    loop.regrouper.finish()
    expected = lines(tmp_path / "regroupings.jsonl")
    assert lines(tmp_path / "own.jsonl") == expected
    assert {line["step"] for line in expected} == set(range(2, BATCHES // accumulated + 1, 2))
    assert any(line["components_moved"] for line in expected), "a test in which nothing moves shows nothing"
    ours, theirs = state_of(model), state_of(trained)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    last = [line for line in expected if line["step"] == loop.regrouper.steps]
    assert loop.regrouper.metrics["components_moved"] == sum(line["components_moved"] for line in last) / len(last)
    measured = [line for line in expected if line.get("intra_degrees") is not None][-len(last) :]
    angle = sum(line["intra_degrees"] for line in measured) / len(measured)
    assert loop.regrouper.metrics["intra_degrees"] == pytest.approx(angle)


def test_a_loop_goes_on_from_accelerates_checkpoint(tiny_model: Model, tmp_path: Path) -> None:
    """In the middle of a window; what the first loop logs after its checkpoint is logged once."""
    model = adapted(tiny_model("llama"), lora_dropout=0.0).train()
    whole = Loop(model, tmp_path / "whole.jsonl")
    whole.run(last=7)
    whole.accelerator.save_state(str(tmp_path / "checkpoint"))
    (tmp_path / "resumed.jsonl").write_text((tmp_path / "whole.jsonl").read_text())
    whole.run(first=7)
    whole.regrouper.finish()
    resumed_model = adapted(tiny_model("llama"), lora_dropout=0.0).train()
    resumed = Loop(resumed_model, tmp_path / "resumed.jsonl")
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert resumed.regrouper.steps == 7
    resumed.run(first=7)
    resumed.regrouper.finish()
    assert lines(tmp_path / "resumed.jsonl") == lines(tmp_path / "whole.jsonl")
    for name, tensor in state_of(model).items():
        assert torch.equal(tensor, state_of(resumed_model)[name]), name


def test_its_state_as_safetensors(tiny_model: Model, tmp_path: Path) -> None:
    loop = Loop(adapted(tiny_model("llama")).train(), tmp_path / "log.jsonl")
    loop.run(last=3)
    loop.regrouper.save(tmp_path)
    other = Loop(adapted(tiny_model("llama")).train(), tmp_path / "other.jsonl")
    other.regrouper.load(tmp_path, steps=3)
    ours, theirs = loop.regrouper.state_dict(), other.regrouper.state_dict()
    assert ours["windows"] == theirs["windows"]
    assert ours["steps"] == theirs["steps"] == 3
    assert all(torch.equal(tensor, theirs["tensors"][name]) for name, tensor in ours["tensors"].items())
    with pytest.raises(BaditError, match="another model"):
        other.regrouper.load_state_dict({**ours, "windows": {}})


def test_bad_input(tiny_model: Model) -> None:
    with pytest.raises(BaditError, match="no trainable BADIT adapter"):
        Regrouper(tiny_model("llama"), 10)
    for total in (0, 1.5, True):
        with pytest.raises(BaditError, match="total_steps"):
            Regrouper(adapted(tiny_model("llama")), total)  # pyright: ignore
