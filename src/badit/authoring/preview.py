"""``badit tasks``: the tasks of a recipe, their mixture, and prompts in the model's format."""

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from statistics import median
from typing import Any

from badit.data import Task
from badit.data.encoding import encode_examples, sequences, token_ids
from badit.data.prompts import prompt_text
from badit.models import load_tokenizer
from badit.recipe.schema import PromptSection, Recipe
from badit.support.console import one_line
from badit.support.text import counted, text_table

_MEASURED = 1_000  # training instances per task, the first ones, whose tokens are counted
_DEFINITION = 60  # characters of a task's definition
_prompt_of = attrgetter("instruction", "input", "history")


def preview(recipe: Recipe, count: int) -> str:
    """Returns a table with a row per task: its instances, its share of an epoch, its definition.

    If ``count`` is not 0, token statistics of every task's training data and its first ``count``
    prompts follow. The trained tokens are between ⟦ and ⟧.
    """
    tasks = recipe.data.load()
    listed = f"{_task_table(recipe, tasks)}\n\n{counted(len(tasks), 'task')}, all valid"
    preferences = [task.name for task in tasks if task.has_preferences]
    if preferences:
        listed += f"; {len(preferences)} with preferences: train them with training.objective=dpo"
    if not count:
        return listed
    model = recipe.model
    tokenizer = load_tokenizer(
        model.name, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    rows = [_token_row(tokenizer, task, recipe.prompt) for task in tasks]
    heading = ["task", "prompt", "longest", "cut", "answer", "longest", "cut"]
    heading += ["repeated", "in test too"]
    note = (
        f"Tokens of the first {_MEASURED:,} training instances, without the chat template: median, "
        "maximum, and how many are truncated (cut). Of all training instances: how many repeat an "
        "earlier input or have an input of the test or validation data."
    )
    prompts = []
    for task in tasks:
        prompts += _prompts(tokenizer, task, recipe.prompt, count)
    return "\n\n".join([listed, text_table(heading, rows), note, *prompts])


def _task_table(recipe: Recipe, tasks: Sequence[Task]) -> str:
    shares = recipe.data.quotas(tasks) or {task.name: len(task.train) for task in tasks}
    total = max(1, sum(shares.values()))
    rows = []
    for task in tasks:
        sizes = [f"{len(split):,}" for split in (task.train, task.validation, task.test)]
        share = f"{shares.get(task.name, 0) / total:.1%}"
        definition = task.definition or "–"
        if task.has_several_instructions:
            definition = "several"
        rows.append([task.name, *sizes, share, " ".join(definition.split())[:_DEFINITION]])
    heading = ["task", "train", "validation", "test", "mixture", "definition"]
    return text_table(heading, rows, right={1, 2, 3, 4})


def _token_row(tokenizer: Any, task: Task, section: PromptSection) -> list[str]:
    """Returns the token statistics of a task's training data, and its repeated inputs."""
    instances = list(task.train[:_MEASURED])
    prompts = [prompt_text(task, instance, section.encoding) for instance in instances]
    answers = [instance.outputs[0] for instance in instances]
    answers += [instance.rejected for instance in instances if instance.rejected is not None]
    scored = {_prompt_of(instance) for instance in (*task.test, *task.validation)}
    trained = Counter(map(_prompt_of, task.train))
    repeated = trained.total() - len(trained)
    shared = sum(count for prompt, count in trained.items() if prompt in scored)
    return [
        task.name,
        *_lengths(tokenizer, prompts, section.max_source_tokens),
        *_lengths(tokenizer, answers, section.max_answer_tokens),
        str(repeated),
        str(shared),
    ]


def _lengths(tokenizer: Any, texts: list[str], limit: int) -> list[str]:
    """Returns the median and maximum number of tokens, and how many texts exceed ``limit``."""
    # A task may have no training instances, of which there is no median.
    lengths = [len(ids) for ids in token_ids(tokenizer, texts)] or [0]
    cut = sum(length > limit for length in lengths)
    return [f"{median(lengths):.0f}", str(max(lengths)), str(cut)]


def _prompts(tokenizer: Any, task: Task, section: PromptSection, count: int) -> list[str]:
    """Returns the texts of a task's first prompts, with the trained tokens between ⟦ and ⟧."""
    pairs = [(task, instance) for instance in task.train[:count]]
    texts = []
    examples = encode_examples(tokenizer, pairs, **section.model_dump())
    for number, example in enumerate(sequences(examples)):
        ids = example["input_ids"]
        start = example["prompt_length"]
        text = f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧"
        heading = f"── {task.name}, instance {example['id']}, {len(ids)} tokens"
        if number >= len(examples):
            heading += ", rejected"
        # Lines are escaped one by one, so that line breaks of the prompt stay.
        texts.append("\n".join(map(one_line, [heading, *text.split("\n")])))
    return texts
