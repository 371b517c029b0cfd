"""Small trainings, callbacks that watch or stop them, and comparisons of their weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from badit.data import AnswerCollator
from badit.methods import AdapterMethod
from badit.recipe import Recipe
from badit.run import Run
from badit.train import fit
from badit.trainer import AnswerTrainer
from badit.tuner import BaditConfig, hooks_of

QUIET: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}


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


def make_trainer(model: Any, folder: Path, callbacks: list[TrainerCallback], *, count: int = 24, **options: Any) -> Any:
    """By default, twelve steps of four examples."""
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_steps": 5}
    arguments |= {"output_dir": str(folder), "remove_unused_columns": False, **QUIET, **options}
    data = {"train_dataset": examples(count), "data_collator": AnswerCollator(0)}
    return AnswerTrainer(model, TrainingArguments(**arguments), callbacks=callbacks, **data)


def on(event: str, function: Callable[[Any, dict[str, Any]], Any]) -> TrainerCallback:
    """A callback that calls ``function(state, keywords)`` at an event, such as "on_step_end"."""

    def call(self: Any, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        function(state, {**keywords, "args": args})

    return type("Callback", (TrainerCallback,), {event: call})()


class StopAt(TrainerCallback):
    """Ends the process's training as a kill would, right after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@contextmanager
def with_callbacks(*added: TrainerCallback, kind: type = AdapterMethod, folder: str = "") -> Iterator[None]:
    """Within, runs also have these callbacks; with ``folder``, only those in a folder of that name."""
    own: Any = kind.callbacks  # pyright: ignore

    def all_callbacks(self: Any, run: Run) -> list[TrainerCallback]:
        return [*own(self, run), *(added if folder in ("", run.path.name) else [])]

    with patch.object(kind, "callbacks", all_callbacks):
        yield


def fit_until(step: int, recipe: Recipe, **options: Any) -> Run:
    """A run that was stopped after a step."""
    with with_callbacks(StopAt(step), **options), pytest.raises(KeyboardInterrupt):
        fit(recipe, progress=False)
    return Run.at(recipe.output)


def learned(run: Run) -> dict[str, torch.Tensor]:
    """The tensors of a run's adapter."""
    (path,) = run.adapter_path.glob("*.safetensors")
    return load_file(path)


@torch.no_grad()
def logits(model: Any, task: str = "rivers") -> torch.Tensor:
    """For a fixed prompt of a task, in eval mode."""
    training = model.training
    ids = torch.arange(5, 15)[None]
    with hooks_of(model).rows_of([task]):
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(training)
    return found


def change_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A function that rewrites a safetensors file."""

    def rewrite(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(change(tensors), path, metadata={"format": "pt"})

    return rewrite


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "badit_" in name}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
