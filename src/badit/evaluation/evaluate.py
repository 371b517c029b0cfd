"""Evaluate a model on tasks: prompts, greedy answers, scores; and the answers as files that can be scored again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from badit.data.tasks import file_safe
from badit.errors import BaditError, first_problem, nearest
from badit.files import parse_json, read_text, shown, write_text
from badit.generation import generate_answers
from badit.metrics import Prediction, group_by_task, instance_scores, mean_scores

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from badit.data.tasks import Instance, Task

Split = Literal["validation", "test"]

_PREDICTION = TypeAdapter(Prediction)


def evaluate_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    encode_prompt: Callable[[Task, Instance], list[int]],
    split: Split = "test",
    max_new_tokens: int = 50,
    batch_size: int = 16,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Answer every instance of the tasks' split and score the answers.

    All tasks are decoded together, so that batches hold prompts of like length.

    Args:
        model: a causal language model, with or without PEFT adapters.
        tokenizer: the model's tokenizer.
        tasks: tasks with distinct names.
        encode_prompt: the token ids of an instance's prompt, chat template and truncation included.
        split: which instances to use.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts decoded at a time.
        progress: show a bar on stderr.

    Returns:
        The scores as `mean_scores` gives them, and the predictions, task by task in the order given.

    Raises:
        BaditError: an unknown split, a split without instances, tasks of the same name, or an empty prompt.
    """
    if split not in get_args(Split):
        raise BaditError(f"split: '{split}' is none of {', '.join(get_args(Split))}{nearest(split, get_args(Split))}")
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BaditError(f"tasks: {repeated[0]} is given more than once")
    pairs: list[tuple[Task, Instance]] = []
    for task in tasks:
        instances = getattr(task, split)
        if not instances:
            raise BaditError(f"task {task.name}: has no {split} instances")
        pairs += [(task, instance) for instance in instances]

    prompts = [encode_prompt(task, instance) for task, instance in pairs]
    answers = generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        tasks=[task.name for task, _ in pairs],
    )
    predictions = [
        Prediction(task.name, instance.id, answer, tuple(instance.outputs), str(tokenizer.decode(prompt)))
        for (task, instance), prompt, answer in zip(pairs, prompts, answers, strict=True)
    ]
    return mean_scores(instance_scores(group_by_task(predictions))), predictions


def write_predictions(folder: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write `<task>.jsonl` for each task, one prediction a line. Other files in the folder are left alone.

    Each file appears complete or not at all, also when the process is killed.

    Raises:
        BaditError: a task's name that cannot serve as a file name.
    """
    groups = group_by_task(predictions)
    for task in groups:
        try:
            file_safe(task)
        except ValueError as error:
            raise BaditError(f"task {error}") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for task, group in groups.items():
        lines = (json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in group)
        write_text(folder / f"{task}.jsonl", "".join(lines))


def read_predictions(folder: str | Path) -> list[Prediction]:
    """All predictions in a folder that `write_predictions` wrote, by task name, then in their written order.

    Raises:
        BaditError: no such files, or a line that is not a prediction.
    """
    files = sorted(Path(folder).glob("[!.]*.jsonl"))
    if not files:
        raise BaditError(f"predictions {shown(Path(folder))}: no .jsonl files there")
    return [
        _parse(line, file, number)
        for file in files
        for number, line in enumerate(read_text(file).split("\n"), start=1)
        if line
    ]


def _parse(line: str, file: Path, number: int) -> Prediction:
    fields = parse_json(line, file=file, first_line=number)
    try:
        return _PREDICTION.validate_python(fields)
    except ValidationError as error:
        location, problem = first_problem(error)
        where = ": ".join([f"{shown(file)}: line {number}", *map(str, location)])
        raise BaditError(f"{where}: {problem}; evaluate again") from None
