"""From a recipe to what a run works with: tasks, method, base model, and the encoding of instances."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from badit.data import Instance, Task, encode_example, hold_out, limit, load_tasks, mixture, ordered
from badit.errors import BaditError
from badit.models import load_base_model
from badit.recipe import Recipe, expand_source
from badit.runs import RunFolder
from badit.training.method import Method
from badit.training.methods import build_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["test", "validation"]
SettledDtype = Literal["auto", "float32", "bfloat16", "float16"]

# A 16-bit type takes from half of float32's time, on processors with instructions for it, to forty times, without.
_SLOW = 3.0


@dataclasses.dataclass
class Stage:
    """A stretch of training with a result of its own: the whole of a mixed run, one task of a sequential one."""

    folder: RunFolder
    tasks: list[Task]


@dataclasses.dataclass
class Plan:
    """What a recipe comes to before any model is loaded. A sequential recipe has its tasks in their order."""

    recipe: Recipe
    tasks: list[Task]
    method: Method

    @property
    def sequential(self) -> bool:
        return self.recipe.data.order is not None

    @property
    def stages(self) -> list[Stage]:
        run = RunFolder(self.recipe.output)
        if not self.sequential:
            return [Stage(run, self.tasks)]
        return [Stage(run.stage(i, task.name), [task]) for i, task in enumerate(self.tasks, start=1)]

    @property
    def training_instances(self) -> int:
        return len(mixture(self.tasks, self.recipe.data.sampling, self.recipe.data.seed))

    @property
    def test_instances(self) -> int:
        return sum(len(getattr(task, self.recipe.evaluation.split)) for task in self.tasks)


def make_plan(recipe: Recipe, *, split: Split | None = None) -> Plan:
    """Validates the method and reads the tasks, which must have instances in ``split`` (default: the recipe's own).

    Raises:
        BaditError: a bad option, or bad data.
    """
    data = recipe.data
    method = build_method(recipe.method)
    method.refuse_recipe(recipe)
    tasks = load_tasks(expand_source(data.source), tasks=data.tasks, format=data.format)
    tasks = hold_out(tasks, data.validation_per_task, data.seed)
    tasks = limit(tasks, data.train_per_task, data.test_per_task, data.seed)
    split = split or recipe.evaluation.split
    for task in tasks:
        if not getattr(task, split):
            fix = {
                "test": "evaluation.split=validation data.validation_per_task=10 scores held-out training instances",
                "validation": "set data.validation_per_task to hold some out of its training instances",
            }
            raise BaditError(f"data: task {task.name} has no {split} instances; {fix[split]}")
    if data.order is not None:
        tasks = ordered(tasks, data.order)
    untrained = [task.name for task in tasks if not task.train]
    if len(untrained) == len(tasks):
        raise BaditError("data: no task has training instances")
    if data.order is not None and untrained:
        raise BaditError(f"data: task {untrained[0]} has no training instances and so no place in a sequence")
    return Plan(recipe, tasks, method)


def encoded(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, task: Task, instance: Instance, *, answer: bool = True
) -> dict[str, Any]:
    """One instance in the recipe's prompt format, as token ids and labels."""
    return encode_example(tokenizer, task, instance, with_answer=answer, **recipe.prompt.model_dump())


def base_model(recipe: Recipe, *, dtype: SettledDtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A recipe's base model, in its own dtype or another one and on this process's device, and its tokenizer."""
    section = recipe.model
    dtype = dtype or model_dtype(recipe)
    model, tokenizer = load_base_model(
        section.name,
        dtype=dtype,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        quantisation=section.quantisation,
        device=device(),
    )
    _warn_of_slow_dtype(dtype, device())
    return model, tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding is masked everywhere, so a tokenizer without a padding token gets any id, and is left as it is."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def device() -> torch.device:
    """The accelerator of this process, by its local rank where several share a machine; else the processor."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def model_dtype(recipe: Recipe) -> SettledDtype:
    """The dtype of a recipe's base model on this process's device."""
    return fast_dtype(device()) if recipe.model.dtype == "fast" else recipe.model.dtype


def fast_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """bfloat16, unless this is a processor that computes in it slowly: then float32."""
    return "float32" if device.type == "cpu" and slowdown("bfloat16") > _SLOW else "bfloat16"


@cache
def slowdown(dtype: str) -> float:
    """The time of this processor's matrix product in a dtype ("bfloat16", "float16"), over that in float32.

    The best of three rounds of a few milliseconds each, measured once per process.
    """
    seconds = {}
    for name in (dtype, "float32"):
        x, weight = (torch.ones(size, 512, dtype=getattr(torch, name)) for size in (64, 512))
        rounds = []
        for _ in range(3):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            rounds.append(time.perf_counter() - started)
        seconds[name] = min(rounds)
    return seconds[dtype] / seconds["float32"]


@cache
def _warn_of_slow_dtype(dtype: str, device: torch.device) -> None:
    """Says on stderr, once per process, that this processor computes in a model's dtype slowly, and what to set."""
    if device.type == "cpu" and dtype in ("bfloat16", "float16") and (ratio := slowdown(dtype)) > _SLOW:
        print(
            f"badit: this processor has no instructions for {dtype} and takes {ratio:.0f} times as long as in float32; "
            "model.dtype=float32 is faster here",
            file=sys.stderr,
        )
