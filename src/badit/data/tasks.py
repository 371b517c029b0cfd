"""Tasks, their training, validation and test instances, and the orders in which tasks are learnt.

Every random draw depends on (task name, seed) alone; `random.Random` hashes a string with SHA-512, so PYTHONHASHSEED
has no influence.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from badit.data.cache import Item, Table
from badit.errors import BaditError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# The two orders of SAPT (Zhao et al. 2024, arXiv 2401.08295) over its 15 SuperNI tasks, by the tasks' numbers.
SAPT_ORDERS = {
    "sapt-1": (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875),
    "sapt-2": (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875),
}


def file_safe(name: str) -> str:
    """The task's name; raises ValueError unless it can name a file in any folder and leads out of none."""
    too_long = len(name) > 120 or len(name.encode()) > 240  # file systems allow 255 bytes, suffix included
    if too_long or not re.match(r"[^.\s]", name) or not name.isprintable() or {*"/\\"} & {*name}:
        fix = "use at most 120 characters, no leading dot, no slash and no control character"
        raise ValueError(f"{name!r:.60} cannot be a file name; {fix}")
    return name


TaskName = Annotated[str, AfterValidator(file_safe)]
# The official files use a string or a list of strings for the same field.
Strings = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
FirstString = Annotated[
    str, BeforeValidator(lambda value: next(iter(value), "") if isinstance(value, list | tuple) else value)
]
Outputs = Annotated[Strings, Field(min_length=1)]
Messages = tuple[tuple[str, str], ...]  # (role, content) of each


class Instance(BaseModel):
    """One input with its reference answers, at least one.

    An answer may be blank: task511 of the published benchmark has six such training instances. They are kept, so that
    results stay comparable with published ones.

    `instruction` stands in place of the task's definition where a task has several wordings. `history` holds the
    earlier messages of a chat, (role, content) each; `input` is then the message to be answered.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    input: str
    outputs: Outputs
    instruction: str | None = None
    history: Messages = ()

    @property
    def hash(self) -> int:
        """Of all of it, 64 bits."""
        fields = (self.id, self.input, self.outputs, self.instruction, self.history)
        return int.from_bytes(hashlib.blake2b(repr(fields).encode(), digest_size=8).digest())


class Demonstration(BaseModel):
    """A solved example that a prompt may show; the official files call these "Positive Examples"."""

    model_config = ConfigDict(frozen=True)

    input: str
    output: FirstString
    explanation: str = ""


def _column(instances: Sequence[Instance], name: str) -> list[Any]:
    return instances.column(name) if isinstance(instances, Table) else [getattr(one, name) for one in instances]


def _selected(instances: Sequence[Instance], indices: Sequence[int]) -> Sequence[Instance]:
    return instances.select(indices) if isinstance(instances, Table) else tuple(instances[index] for index in indices)


def _distinct_ids(instances: Sequence[Instance]) -> Sequence[Instance]:
    ids = Counter(_column(instances, "id"))
    if len(ids) < len(instances):
        raise ValueError(f"two instances have the id {ids.most_common(1)[0][0]!r:.60}; give each its own")
    return instances


# In a table they have a column for each of an instance's fields, and for its hash.
Instances = Annotated[Table | tuple[Instance, ...], Field(union_mode="left_to_right"), AfterValidator(_distinct_ids)]


class Task(BaseModel):
    """One instruction and its data.

    `name` serves as a file name. `abilities` are known for the built-in suite only and are empty elsewhere. If the
    definition is a list, the first one is used, as in the official evaluation; if it is None, an instance's input is
    the whole prompt. `weight` is a factor on its weight in a mixture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: TaskName
    definition: FirstString | None
    demonstrations: tuple[Demonstration, ...] = ()
    categories: Strings = ()
    domains: Strings = ()
    abilities: tuple[str, ...] = ()
    weight: float = 1.0
    train: Instances = ()
    validation: Instances = ()
    test: Instances = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the definition, the demonstrations and all instances."""
        digest = hashlib.sha256(repr((self.name, self.definition, self.demonstrations)).encode())
        for instances in (self.train, self.validation, self.test):
            digest.update(np.asarray(_column(instances, "hash"), dtype=np.uint64).tobytes() + b"|")
        return digest.hexdigest()[:16]


def hold_out(tasks: Iterable[Task], per_task: int, seed: int) -> list[Task]:
    """Tasks with `per_task` training instances, at most a quarter of them, moved into an empty `validation`.

    A task that already has a validation set is unchanged. Both parts keep the file's order.
    """
    after = []
    for task in tasks:
        count = 0 if task.validation else min(per_task, len(task.train) // 4)
        drawn = _shuffled(range(len(task.train)), f"hold_out/{seed}/{task.name}")
        held, train = (_selected(task.train, sorted(part)) for part in (drawn[:count], drawn[count:]))
        after.append(task.model_copy(update={"train": train, "validation": task.validation or held}))
    return after


def limit(tasks: Iterable[Task], train: int | None, test: int | None, seed: int) -> list[Task]:
    """Tasks with at most `train` training instances, drawn by `seed`, and the first `test` test instances.

    None keeps a split whole. A smaller training set is a subset of every larger one of the same seed.
    """
    limited = []
    for task in tasks:
        kept = sorted(_shuffled(range(len(task.train)), f"limit/{seed}/{task.name}")[:train])
        limited.append(task.model_copy(update={"train": _selected(task.train, kept), "test": task.test[:test]}))
    return limited


def mixture(tasks: Sequence[Task], seed: int) -> list[int]:
    """The indices of all training instances, which are counted through the tasks, in random order."""
    return _shuffled(range(sum(len(task.train) for task in tasks)), f"mixture/{seed}")


def quotas(tasks: Sequence[Task], *, balanced: bool = False, temperature: float = 1.0) -> dict[str, int] | None:
    """How many training instances of each task an epoch has, of as many in all as there are.

    A task of n instances and weight w weighs w · n^(1/temperature), or w if the tasks are ``balanced``. None where each
    instance is to be seen once.
    """
    sizes = {task.name: len(task.train) for task in tasks if task.train}
    power = 0.0 if balanced else 1 / temperature
    if power == 1 and len({task.weight for task in tasks}) <= 1:
        return None
    weights = {task.name: task.weight * sizes[task.name] ** power for task in tasks if task.train}
    count, total = sum(sizes.values()), sum(weights.values())
    return {name: max(1, round(count * weight / total)) for name, weight in weights.items()}


def _shuffled(items: Iterable[Item], seed: str) -> list[Item]:
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def ordered(tasks: Sequence[Task], order: str | Sequence[str]) -> list[Task]:
    """The tasks in the order in which they are to be learnt.

    Args:
        order: a list of all the tasks' names or numbers; "sapt-1" or "sapt-2", which skip tasks that were not loaded;
            or "seeded-N", the sorted names shuffled by seed N. seeded-0 … seeded-4 stand in for the BADIT paper's five
            orders, which cannot be recovered.
    """
    by_name = {task.name: task for task in tasks}
    if not isinstance(order, str):
        names = resolve_names(order, by_name, field="data.order")
    elif order in SAPT_ORDERS:
        by_number = {_number(name): name for name in sorted(by_name)}
        names = [by_number[str(number)] for number in SAPT_ORDERS[order] if str(number) in by_number]
    elif match := re.fullmatch(r"seeded-([0-9]{1,18})", order):
        names = _shuffled(sorted(by_name), f"order/{int(match[1])}")
    else:
        known = f"{nearest(order, [*SAPT_ORDERS, 'seeded-0'])}; known: sapt-1, sapt-2, seeded-N, a list of names"
        raise BaditError(f"data.order: unknown order {order!r:.60}{known}")
    if missing := by_name.keys() - names:
        raise BaditError(f"data.order: has no place for task {min(missing)}; add it, or leave it out of data.tasks")
    return [by_name[name] for name in names]


def resolve_names(wanted: Sequence[str], names: Iterable[str], *, field: str = "tasks") -> list[str]:
    """Full names for the `wanted` names and number prefixes, such as "task363" or "363", in their order."""
    if isinstance(wanted, str):
        raise BaditError(f"{field}: must be a list of names, such as [{wanted!r:.60}], not one string")
    known, resolved = sorted(names), []
    for name in map(str, wanted):
        digits = re.fullmatch(r"(?:task)?(\d+)", name)
        matches = [each for each in known if digits and _number(each) == digits[1].lstrip("0")]
        matches = [name] if name in known else matches
        if not matches:
            raise BaditError(f"{field}: unknown task {name!r:.60}{nearest(name, known)}")
        if len(matches) > 1:
            such = f"such as {matches[0]!r:.130}; give a full name"
            raise BaditError(f"{field}: {name!r:.60} fits {len(matches)} tasks, {such}")
        if matches[0] in resolved:
            raise BaditError(f"{field}: {matches[0]!r:.130} is named twice; name it once")
        resolved += matches
    if not resolved:
        raise BaditError(f"{field}: the list is empty; name at least one task or leave it out")
    return resolved


def _number(name: str) -> str | None:
    """The number in a name such as "task073_commonsenseqa", without leading zeros."""
    match = re.fullmatch(r"task(\d+)(?:_.*)?", name)
    return match[1].lstrip("0") if match else None
