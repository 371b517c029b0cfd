"""The output of ``badit tasks``: the tasks of a recipe's data, their mixture, and prompts in the model's format."""

from collections import Counter
from operator import attrgetter
from statistics import median
from typing import Any

from badit.data.prompts import encode_examples, prompt_text, token_ids
from badit.models import load_tokenizer
from badit.recipe.schema import Recipe
from badit.support.console import one_line
from badit.support.text import counted, text_table

_MEASURED = (
    1_000  # training instances per task, the first ones, on which the token statistics are computed
)


def preview(recipe: Recipe, count: int) -> str:
    """Returns a table with a row per task: its instances, its share of an epoch, and its definition.

    If ``count`` is not 0, token statistics of every task's training data and its first ``count`` prompts follow. The
    trained tokens are between ⟦ and ⟧.
    """
    tasks = recipe.data.load()
    shares = recipe.data.quotas(tasks) or {task.name: len(task.train) for task in tasks}
    total = max(1, sum(shares.values()))
    rows = []
    for task in tasks:
        sizes = [f"{len(split):,}" for split in (task.train, task.validation, task.test)]
        share = f"{shares.get(task.name, 0) / total:.1%}"
        definition = "several" if task.has_several_instructions else task.definition or "–"
        rows.append([task.name, *sizes, share, " ".join(definition.split())[:60]])
    listed = text_table(
        ["task", "train", "validation", "test", "mixture", "definition"], rows, right={1, 2, 3, 4}
    )
    listed += f"\n\n{counted(len(tasks), 'task')}, all valid"
    if not count:
        return listed
    model, section = recipe.model, recipe.prompt
    tokenizer = load_tokenizer(
        model.name, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    rows, shown = [], []
    for task in tasks:
        instances = list(task.train[:_MEASURED])
        examples = encode_examples(
            tokenizer, [(task, instance) for instance in instances], **section.model_dump()
        )
        texts = [prompt_text(task, instance, section.encoding) for instance in instances]
        prompts = _measured(tokenizer, texts, section.max_source_tokens)
        answers = _measured(
            tokenizer, [instance.outputs[0] for instance in instances], section.max_answer_tokens
        )
        prompt_of = attrgetter("instruction", "input", "history")
        scored, trained = (
            set(map(prompt_of, (*task.test, *task.validation))),
            Counter(map(prompt_of, task.train)),
        )
        known = sum(count for key, count in trained.items() if key in scored)
        rows.append(
            [task.name, *prompts, *answers, str(trained.total() - len(trained)), str(known)]
        )
        for example in examples[:count]:
            ids, start = example["input_ids"], example["prompt_length"]
            text = f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧"
            lines = [
                f"── {task.name}, instance {example['id']}, {len(ids)} tokens",
                *text.split("\n"),
            ]
            shown.append("\n".join(map(one_line, lines)))
    heading = [
        "task",
        "prompt",
        "longest",
        "cut",
        "answer",
        "longest",
        "cut",
        "repeated",
        "in test too",
    ]
    note = (
        f"Tokens of the first {_MEASURED:,} training instances: median, maximum, and how many are truncated (cut). Of "
        "all training instances: how many repeat an earlier input or have an input of the test or validation data."
    )
    return "\n\n".join([listed, text_table(heading, rows), note, *shown])


def _measured(tokenizer: Any, texts: list[str], most: int) -> list[str]:
    """Returns the median and the maximum number of tokens of the texts, and how many exceed ``most``."""
    lengths = [len(ids) for ids in token_ids(tokenizer, texts)] or [0]
    return [
        f"{median(lengths):.0f}",
        str(max(lengths)),
        str(sum(length > most for length in lengths)),
    ]
