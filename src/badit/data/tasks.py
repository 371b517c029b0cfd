"""What a task is, which of its instances train, validate and test, and the orders in which tasks are learnt.

Whichever layout a task comes from, inside the library it is a :class:`Task`. Every random choice is drawn from (the
task's name, seed) alone: `random.Random` hashes a string with SHA-512, so no draw depends on PYTHONHASHSEED.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from badit.errors import BaditError, nearest, refuse_unknown

Split = Literal["train", "validation", "test"]
Sampling = Literal["proportional", "balanced"]

# A task's name becomes a file's name, and file systems stop at 255 bytes with the suffix included.
MAX_NAME_CHARACTERS = 120
MAX_NAME_BYTES = 240
# Beyond this share, the validation set would cost more accuracy than the choice made on it can return.
MAX_VALIDATION_SHARE = 4
# The two orders of SAPT (Zhao et al. 2024, arXiv 2401.08295) over its 15 SuperNI tasks, by the tasks' numbers.
SAPT_ORDERS = {
    "sapt-1": (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875),
    "sapt-2": (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875),
}


def file_safe(name: str) -> str:
    """The task's name, if it can name a file in any folder and lead out of none.

    Raises:
        ValueError: it cannot.
    """
    if not name.strip() or name.startswith("."):
        raise ValueError(f"{name!r:.60} cannot be a file name; start it with a letter or a digit")
    if any(character in "/\\" or not character.isprintable() for character in name):
        raise ValueError(f"{name!r:.60} cannot be a file name; leave out slashes and control characters")
    if len(name) > MAX_NAME_CHARACTERS or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{name!r:.60} is too long for a file name; use at most {MAX_NAME_CHARACTERS} characters")
    return name


def _strings(value: object) -> tuple[str, ...]:
    """One string or a list of them: the official files use both for the same field."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ValueError("must be a string or a list of strings")


def _first_string(value: object) -> str:
    strings = _strings(value)
    if not strings:
        raise ValueError("must hold at least one string")
    return strings[0]


def _at_least_one(outputs: tuple[str, ...]) -> tuple[str, ...]:
    if not outputs:
        raise ValueError("must hold at least one answer")
    return outputs


TaskName = Annotated[str, AfterValidator(file_safe)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_strings)]
FirstString = Annotated[str, BeforeValidator(_first_string)]
Outputs = Annotated[Strings, AfterValidator(_at_least_one)]
# The official files and the lines of a .jsonl say "output"; a task in memory says "outputs", for there may be several.
OUTPUT_NAMES = AliasChoices("output", "outputs")


class Instance(BaseModel):
    """One input with its reference answers, at least one.

    An answer may be blank: task511 of the published benchmark has six such training instances, which teach a model to
    stop at once. They are kept, so that results stay comparable with published ones.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    input: str
    outputs: Outputs = Field(validation_alias=OUTPUT_NAMES)


class Demonstration(BaseModel):
    """A solved example that a prompt may show; the official files call these "Positive Examples"."""

    model_config = ConfigDict(frozen=True)

    input: str
    output: FirstString
    explanation: str = ""


def _distinct_ids(instances: tuple[Instance, ...]) -> tuple[Instance, ...]:
    seen: set[str] = set()
    for instance in instances:
        if instance.id in seen:
            raise ValueError(f"two instances have the id {instance.id!r:.60}; give each its own")
        seen.add(instance.id)
    return instances


Instances = Annotated[tuple[Instance, ...], AfterValidator(_distinct_ids)]


class Task(BaseModel):
    """One instruction and its data.

    `name` serves as a file name. `abilities` are known for the built-in suite alone and empty elsewhere.
    Where the definition comes as a list, the first counts, as in the official evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TaskName
    definition: FirstString
    demonstrations: tuple[Demonstration, ...] = ()
    categories: Strings = ()
    domains: Strings = ()
    abilities: tuple[str, ...] = ()
    train: Instances = ()
    validation: Instances = ()
    test: Instances = ()


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
    refuse_unknown("sampling", sampling, get_args(Sampling))
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


def ordered(tasks: Sequence[Task], order: str | Sequence[str]) -> list[Task]:
    """The tasks in the order in which they are to be learnt.

    Args:
        order: a list of all the tasks' names or numbers; "sapt-1" or "sapt-2", which pass over tasks that were not
            loaded; or "seeded-N", the sorted names shuffled by seed N. The BADIT paper's five orders shuffled an
            unsorted listing of a folder and cannot be recovered; seeded-0 … seeded-4 stand in for them.

    Raises:
        BaditError: an unknown order, or one that does not say where a task comes.
    """
    by_name = {task.name: task for task in tasks}
    if not isinstance(order, str):
        names = resolve_names(order, by_name, field="data.order")
    elif order in SAPT_ORDERS:
        by_number = {_number(name): name for name in sorted(by_name)}
        names = [by_number[str(number)] for number in SAPT_ORDERS[order] if str(number) in by_number]
    elif match := re.fullmatch(r"seeded-([0-9]{1,18})", order):
        names = sorted(by_name)
        random.Random(f"order/{int(match[1])}").shuffle(names)
    else:
        hint = nearest(order, [*SAPT_ORDERS, "seeded-0"])
        known = "sapt-1, sapt-2, seeded-N, a list of names"
        raise BaditError(f"data.order: unknown order {order!r:.60}{hint}; known: {known}")
    if missing := [name for name in by_name if name not in names]:
        raise BaditError(
            f"data.order: does not say where task {missing[0]} comes; add it, or leave it out of data.tasks"
        )
    return [by_name[name] for name in names]


def resolve_names(wanted: Sequence[str], names: Iterable[str], *, field: str = "tasks") -> list[str]:
    """Full names for the `wanted` names and number prefixes, such as "task363" or "363", in their order.

    Raises:
        BaditError: one of them fits no task or several, or is there twice; ``field`` opens the message.
    """
    if isinstance(wanted, str):
        raise BaditError(f"{field}: must be a list of names, such as [{wanted!r:.60}], not one string")
    known = sorted(names)
    resolved = [_resolve_one(str(name), known, field) for name in wanted]
    if not resolved:
        raise BaditError(f"{field}: the list is empty; name at least one task or leave it out")
    if repeated := [name for index, name in enumerate(resolved) if name in resolved[:index]]:
        raise BaditError(f"{field}: {repeated[0]!r:.130} is named twice; name it once")
    return resolved


def _resolve_one(wanted: str, known: list[str], field: str) -> str:
    if wanted in known:
        return wanted
    digits = re.fullmatch(r"(?:task)?(\d+)", wanted)
    matches = [name for name in known if digits and _number(name) == digits[1].lstrip("0")]
    if not matches:
        raise BaditError(f"{field}: unknown task {wanted!r:.60}{nearest(wanted, known)}")
    if len(matches) > 1:
        raise BaditError(
            f"{field}: {wanted!r:.60} fits {len(matches)} tasks, such as {matches[0]!r:.130}; give a full name"
        )
    return matches[0]


def _number(name: str) -> str | None:
    """The number in a name such as "task073_commonsenseqa", without leading zeros; None where there is none."""
    match = re.fullmatch(r"task(\d+)(?:_.*)?", name)
    return match[1].lstrip("0") if match else None
