"""The built-in suite of 16 small tasks."""

import json
from pathlib import Path

from badit.data.tasks import Task

_TRAINING_INSTANCES = 160  # per task; the others are test instances


def builtin_tasks() -> list[Task]:
    """Returns the built-in suite: 16 small tasks in plain English.

    Every input has exactly one correct answer. They are sorted by name. A task has 160 training
    and 40 test instances and 2 demonstrations. suite.json, which benchmarks/suite.py generates with
    a fixed seed, lists the abilities that each task requires.
    """
    suite = json.loads(Path(__file__).with_name("suite.json").read_text(encoding="utf-8"))
    tasks = []
    for name, fields in sorted(suite["tasks"].items()):
        examples = [
            {"input": text, "output": answer} for text, answer in suite["examples"][name].items()
        ]
        instances = [
            {"id": f"{name}-{i}", "input": example["input"], "outputs": example["output"]}
            for i, example in enumerate(examples[2:])
        ]
        # The order in suite.json decides the splits, so they are the same everywhere.
        splits = {
            "demonstrations": examples[:2],
            "train": instances[:_TRAINING_INSTANCES],
            "test": instances[_TRAINING_INSTANCES:],
        }
        tasks.append(Task(name=name, **fields, **splits))
    return tasks
