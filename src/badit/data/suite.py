"""The built-in suite: 16 small tasks in plain English, whose inputs have exactly one correct answer.

The abilities that each task requires are listed, so an analysis of shared abilities can be checked against them.
suite.json has each task's answers by input, which benchmarks/suite.py generated with a fixed seed.
"""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from badit.data.tasks import Demonstration, Instance, Task

TRAIN_INSTANCES = 160
DEMONSTRATIONS = 2


def builtin_tasks() -> list[Task]:
    """Returns the suite, sorted by name. A task has 160 training and 40 test instances and 2 demonstrations."""
    content = json.loads((resources.files("badit.data") / "suite.json").read_text(encoding="utf-8"))
    return [_task(name, content["tasks"][name], content["examples"][name]) for name in sorted(content["tasks"])]


def _task(name: str, about: Mapping[str, Any], answers: Mapping[str, str]) -> Task:
    pairs = list(answers.items())
    shown, scored = pairs[:DEMONSTRATIONS], pairs[DEMONSTRATIONS:]
    instances = [Instance(id=f"{name}-{i}", input=text, outputs=(answer,)) for i, (text, answer) in enumerate(scored)]
    return Task(
        name=name,
        demonstrations=tuple(Demonstration(input=text, output=answer) for text, answer in shown),
        train=tuple(instances[:TRAIN_INSTANCES]),
        test=tuple(instances[TRAIN_INSTANCES:]),
        **about,
    )
