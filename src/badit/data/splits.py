"""Which instances train, which validate, which test: every choice drawn from (task's name, seed) alone.

`random.Random` seeded with a string hashes it with SHA-512, so the draws do not depend on PYTHONHASHSEED.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from badit.data.schema import Instance, Task
from badit.errors import BaditError, nearest

Sampling = Literal["proportional", "balanced"]

# Beyond this share, the validation set would cost more accuracy than the choice made on it can return.
MAX_VALIDATION_SHARE = 4


def hold_out(tasks: Iterable[Task], per_task: int, seed: int) -> list[Task]:
    """Tasks with `per_task` training instances, at most a quarter of them, moved into an empty `validation`.

    A task that has a validation set already is left as it is. Both parts keep the file's order.
    """
    _check_count("per_task", per_task)
    return [task if task.validation else _held_out(task, per_task, seed) for task in tasks]


def _held_out(task: Task, per_task: int, seed: int) -> Task:
    count = min(per_task, len(task.train) // MAX_VALIDATION_SHARE)
    held = set(_draw(len(task.train), count, "hold_out", task.name, seed))
    train = tuple(instance for index, instance in enumerate(task.train) if index not in held)
    validation = tuple(task.train[index] for index in sorted(held))
    return task.model_copy(update={"train": train, "validation": validation})


def limit(tasks: Iterable[Task], train: int | None, test: int | None, seed: int) -> list[Task]:
    """Tasks with at most `train` training instances, drawn by `seed`, and the first `test` test instances.

    The test set is cut as in the official evaluation: by the file's order. None leaves a split whole. A smaller
    training set is part of every larger one of the same seed, so that learning curves compare like with like.
    """
    _check_count("train", train)
    _check_count("test", test)
    limited = []
    for task in tasks:
        size = len(task.train) if train is None else train
        kept = sorted(_draw(len(task.train), size, "limit", task.name, seed))
        update = {"train": tuple(task.train[index] for index in kept), "test": task.test[:test]}
        limited.append(task.model_copy(update=update))
    return limited


def mixture(tasks: Sequence[Task], sampling: Sampling, seed: int) -> list[tuple[str, Instance]]:
    """One epoch's training list of (task's name, instance), shuffled.

    Args:
        sampling: "proportional" takes each instance once. "balanced" takes the same number of every task, the mean
            size, so that the epoch's length stays the same up to rounding: a small task is repeated whole before any
            instance comes once more, a large one is subsampled.
        seed: draws and shuffles; give each epoch its own to see all of a subsampled task.
    """
    if sampling not in get_args(Sampling):
        raise BaditError(f"sampling: unknown {sampling!r:.60}{nearest(sampling, get_args(Sampling))}")
    trained = [task for task in tasks if task.train]
    mean_size = round(sum(len(task.train) for task in trained) / max(len(trained), 1))
    epoch: list[tuple[str, Instance]] = []
    for task in trained:
        repeats, rest = divmod(mean_size, len(task.train)) if sampling == "balanced" else (1, 0)
        indices = [*range(len(task.train))] * repeats + _draw(len(task.train), rest, "mixture", task.name, seed)
        epoch.extend((task.name, task.train[index]) for index in indices)
    random.Random(f"mixture/{seed}").shuffle(epoch)
    return epoch


def _draw(size: int, count: int, purpose: str, name: str, seed: int) -> list[int]:
    """The first `count` of a permutation of range(size), which another count leaves the same."""
    order = list(range(size))
    random.Random(f"{purpose}/{seed}/{name}").shuffle(order)
    return order[:count]


def _check_count(field: str, count: int | None) -> None:
    if count is not None and count < 0:
        raise BaditError(f"{field}: must be 0 or more, not {count}")
