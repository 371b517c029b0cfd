"""The built-in suite: small tasks in plain English whose abilities are known, made by the project with a fixed seed.

Because the abilities that each task needs are written down, what an analysis says about shared abilities can be held
against the truth. Nothing has to be downloaded.
"""

from __future__ import annotations

from functools import lru_cache

from badit.data.schema import Task
from badit.data.suite import tasks as _tasks  # importing the module registers its generators
from badit.data.suite.registry import ABILITIES, TEST_INSTANCES, TRAIN_INSTANCES, generated_tasks

__all__ = ["ABILITIES", "TEST_INSTANCES", "TRAIN_INSTANCES", "builtin_tasks"]


def builtin_tasks() -> list[Task]:
    """The suite, sorted by name: per task 160 training and 40 test instances and 2 demonstrations, no input twice."""
    return list(_generated())


@lru_cache(maxsize=1)
def _generated() -> tuple[Task, ...]:
    return generated_tasks(_tasks.REGISTRY)
