"""A small BADIT training that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import TrainerCallback, TrainingArguments

from badit.data import AnswerCollator
from badit.trainer import AnswerTrainer
from badit.tuner import BaditConfig


def examples(count: int = 24) -> list[dict[str, list[int]]]:
    """Prompts and answers of several lengths, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        prompt = torch.randint(3, 100, (3 + i % 5,), generator=generator).tolist()
        answer = torch.randint(3, 100, (1 + i % 4,), generator=generator).tolist()
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, BaditConfig(**{"num_experts": 4, "r": 2, "lora_dropout": 0.1, **options}))


def make_trainer(
    model: Any,
    folder: Path,
    callbacks: list[TrainerCallback],
    *,
    count: int = 24,
    group_by_length: bool = True,
    **options: Any,
) -> AnswerTrainer:
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    arguments |= {"save_steps": 5, "use_cpu": True}
    return AnswerTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{**arguments, **options},
        ),
        train_dataset=examples(count),
        data_collator=AnswerCollator(0),
        callbacks=callbacks,
        group_by_length=group_by_length,
    )


class StopAt(TrainerCallback):
    """Ends the process's training as a kill would, right after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
