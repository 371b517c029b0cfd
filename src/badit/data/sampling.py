"""Random choices of instances: held-out sets, limits, and mixtures of tasks.

Choices of a task's instances depend only on the task's name and the seed. `random.Random` hashes a
string seed with SHA-512, so PYTHONHASHSEED has no effect.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import dropwhile
from typing import Any

from badit.data.table import Item
from badit.data.tasks import Instance, Messages, Task, column, select


def hold_out(tasks: Iterable[Task], per_task: int, seed: int) -> list[Task]:
    """Returns the tasks with some training instances moved to `validation`.

    These are `per_task`, but at most a quarter. A task that already has a validation set is
    unchanged. Both sets keep their order. Answers of the same chat are moved together, so that no
    prompt in training contains a held-out answer, except answers with which several chats begin;
    the last chat may exceed `per_task`.
    """
    return [_with_validation(task, per_task, seed) for task in tasks]


def _with_validation(task: Task, per_task: int, seed: int) -> Task:
    if task.validation or not per_task:
        return task

    indices = range(len(task.train))
    chats = _chats(task.train)
    held_out = set[int]()
    # Each task has its own seed, so that other tasks do not change its choice.
    for index in shuffled(indices, f"hold_out/{seed}/{task.name}"):
        chat = chats.get(index, [index])
        # A chat is held out only as a whole, so one that exceeds the quarter is trained.
        if index not in held_out and len(held_out) + len(chat) <= len(indices) // 4:
            held_out.update(chat)
        if len(held_out) >= per_task:
            break

    trained = [index for index in indices if index not in held_out]
    splits = {
        "train": select(task.train, trained),
        "validation": select(task.train, sorted(held_out)),
    }
    return task.model_copy(update=splits)


def _chats(instances: Sequence[Instance]) -> dict[int, list[int]]:
    """Returns by index the indices of the instances of the same chat; empty without chats.

    The first instance of a chat is the shortest beginning of its turns that is an instance. A
    beginning that several chats share, such as a greeting, does not join them.
    """
    histories = column(instances, "history")
    if not any(histories):
        return {}

    # All messages of the user and the answers, to compare chats with their beginnings.
    inputs = column(instances, "input")
    answers = (outputs[0] for outputs in column(instances, "outputs"))
    turns_of_instances: list[tuple[str, ...]] = [
        (*_turns(history), text, answer)
        for history, text, answer in zip(histories, inputs, answers, strict=True)
    ]
    counts = Counter(turns_of_instances)
    chats = defaultdict[Any, list[int]](list)
    for index, turns in enumerate(turns_of_instances):
        # Beginnings of at least a question and its answer.
        beginnings = (turns[:length] for length in range(2, len(turns)))
        # A beginning that occurs more often than the whole belongs to several chats.
        of_this_chat = (start for start in beginnings if 0 < counts[start] <= counts[turns])
        chats[next(of_this_chat, turns)].append(index)
    return {index: chat for chat in chats.values() for index in chat}


def _turns(history: Messages) -> list[str]:
    """Returns the contents of a history from the first user message on."""
    from_user = dropwhile(lambda message: message[0] != "user", history)
    return [content for _, content in from_user]


def limit(tasks: Iterable[Task], train: int | None, test: int | None, seed: int) -> list[Task]:
    """Returns the tasks with at most `train` random training and the first `test` test instances.

    None keeps all instances of a split. With the same seed, a smaller training set is a subset of
    every larger one.
    """
    limited = []
    for task in tasks:
        # Prefixes of one shuffled list, so that a smaller set is a subset of a larger one.
        chosen = shuffled(range(len(task.train)), f"limit/{seed}/{task.name}")[:train]
        # Both sets keep their order.
        splits = {"train": select(task.train, sorted(chosen)), "test": task.test[:test]}
        limited.append(task.model_copy(update=splits))
    return limited


def mixture(tasks: Sequence[Task], seed: int) -> list[int]:
    """Returns the indices of all training instances in random order.

    They are numbered consecutively over the tasks.
    """
    return shuffled(range(sum(len(task.train) for task in tasks)), f"mixture/{seed}")


def quotas(
    tasks: Sequence[Task], *, balanced: bool = False, temperature: float = 1.0
) -> dict[str, int] | None:
    """Returns the number of training instances of each task per epoch.

    Their sum stays about the same. A task with n instances and weight w gets a share
    proportional to w · n^(1/temperature), or to w if ``balanced``. None if each instance is used
    once per epoch.
    """
    power = 1 / temperature
    if balanced:
        power = 0.0
    # Shares by size, so that each instance is used once.
    if power == 1 and len({task.weight for task in tasks}) <= 1:
        return None

    sizes = {task.name: len(task.train) for task in tasks if task.train}
    weights = {task.name: task.weight * sizes[task.name] ** power for task in tasks if task.train}
    count = sum(sizes.values())
    total = sum(weights.values())
    # At least 1, so that no task is left out.
    return {name: max(1, round(count * weight / total)) for name, weight in weights.items()}


def shuffled(items: Iterable[Item], seed: str) -> list[Item]:
    """Returns the items in an order that depends only on the seed."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order
