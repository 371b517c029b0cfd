"""From a recipe to what a run works with: tasks, method, base model, and the encoding of instances."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from badit.data import Instance, Task, encode_example, hold_out, limit, load_tasks, mixture, ordered
from badit.errors import BaditError
from badit.methods import Method, build_method
from badit.models import load_base_model
from badit.recipe import Recipe, expand_source
from badit.runs import RunFolder
from badit.training.precision import SettledDtype, settled_dtype, warn_of_slow_dtype

Split = Literal["test", "validation"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
            way_out = {
                "test": "evaluation.split=validation data.validation_per_task=10 scores held-out training instances",
                "validation": "set data.validation_per_task to hold some out of its training instances",
            }
            raise BaditError(f"data: task {task.name} has no {split} instances; {way_out[split]}")
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
    prompt = recipe.prompt
    return encode_example(
        tokenizer,
        task,
        instance,
        encoding=prompt.encoding,
        max_source_tokens=prompt.max_source_tokens,
        max_answer_tokens=prompt.max_answer_tokens,
        chat_template=prompt.chat_template,
        with_answer=answer,
    )


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
    warn_of_slow_dtype(dtype, device())
    return model, tokenizer


def model_dtype(recipe: Recipe) -> SettledDtype:
    """The dtype of a recipe's base model on this process's device."""
    return settled_dtype(recipe.model.dtype, device())


def device() -> torch.device:
    """The accelerator of this process, by its local rank where several share a machine; else the processor."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding is masked everywhere, so a tokenizer without a padding token gets any id, and is left as it is."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
