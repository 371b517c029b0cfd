"""From a recipe to what a run works with: tasks, method, base model, and the encoding of instances."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from badit.data import Instance, Task, encode_example, hold_out, limit, load_tasks, mixture
from badit.errors import BaditError
from badit.models import load_base_model
from badit.recipe import Recipe, expand_source
from badit.training.methods import Method, build_method

Split = Literal["test", "validation"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass
class Plan:
    """What a recipe comes to before any model is loaded."""

    recipe: Recipe
    tasks: list[Task]
    method: Method

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
    if not any(task.train for task in tasks):
        raise BaditError("data: no task has training instances")
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


def base_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A recipe's base model and tokenizer."""
    section = recipe.model
    return load_base_model(
        section.name,
        dtype=section.dtype,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
