"""Tasks, their training, validation and test instances, and the orders of tasks in a sequence.

Random choices of a task's instances depend only on the task's name and the seed. `random.Random` hashes a string seed
with SHA-512, so PYTHONHASHSEED has no effect.
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import dropwhile
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from badit.data.cache import Item, Items
from badit.support.errors import BaditError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# The two orders of SAPT (Zhao et al. 2024, arXiv 2401.08295) for its 15 SuperNI tasks, as task numbers.
SAPT_ORDERS = {
    "sapt-1": (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875),
    "sapt-2": (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875),
}


def file_safe(name: str) -> str:
    """Returns the task's name; ValueError unless it is a valid file name without a path."""
    too_long = (
        len(name) > 120 or len(name.encode()) > 240
    )  # file systems allow 255 bytes, suffix included
    if too_long or not re.match(r"[^.\s]", name) or not name.isprintable() or {*"/\\"} & {*name}:
        fix = "use at most 120 characters (240 bytes), no leading dot or space, __ for a slash, no control character"
        raise ValueError(f"{name!r:.60} cannot be a file name; {fix}")
    return name


TaskName = Annotated[str, AfterValidator(file_safe)]


# The official files use a string or a list of strings for the same field.
def _as_texts(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        raise ValueError("must be a text or a list of texts")
    return (value,) if isinstance(value, str) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]
FirstString = Annotated[
    str,
    BeforeValidator(
        lambda value: next(iter(value), "") if isinstance(value, list | tuple) else value
    ),
]
Outputs = Annotated[Strings, Field(min_length=1)]
Messages = tuple[tuple[str, str], ...]  # (role, content) of each


class Instance(BaseModel, frozen=True):
    """An input with one or more reference answers, which may be blank, as some of the published benchmark are.

    `instruction` replaces the task's definition if instances have different instructions. `history` has the earlier
    messages of a chat as (role, content); `input` is then the message to answer.
    """

    id: str
    input: str
    outputs: Outputs
    instruction: str | None = None
    history: Messages = ()

    @property
    def hash(self) -> int:
        """A 64-bit hash of all fields."""
        fields = (self.id, self.input, self.outputs, self.instruction, self.history)
        return int.from_bytes(hashlib.blake2b(repr(fields).encode(), digest_size=8).digest())


class Demonstration(BaseModel, frozen=True):
    """A solved example for few-shot prompts, called "Positive Example" in the official files."""

    input: str
    output: FirstString
    explanation: str = ""


def _column(instances: Sequence[Instance], name: str) -> list[Any]:
    return (
        instances.column(name)
        if isinstance(instances, Items)
        else [getattr(one, name) for one in instances]
    )


def _selected(instances: Sequence[Instance], indices: Sequence[int]) -> Sequence[Instance]:
    return (
        instances.select(indices)
        if isinstance(instances, Items)
        else tuple(instances[index] for index in indices)
    )


def _distinct_ids(instances: Sequence[Instance]) -> Sequence[Instance]:
    ids = Counter(_column(instances, "id"))
    if len(ids) < len(instances):
        raise ValueError(
            f"two instances have the id {ids.most_common(1)[0][0]!r:.60}; give each its own"
        )
    return instances


# A table has one column for each field of Instance, and a column for its hash.
Instances = Annotated[
    Items | tuple[Instance, ...], Field(union_mode="left_to_right"), AfterValidator(_distinct_ids)
]


class Task(BaseModel, frozen=True, extra="forbid", arbitrary_types_allowed=True):
    """An instruction and its data.

    `name` is also used as a file name. `abilities` is empty except in the built-in suite. If `definition` is a list,
    its first item is used, as in the official evaluation; if it is None, an instance's input is the whole prompt.
    `weight` is a factor on the task's weight in a mixture.
    """

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
    def has_several_instructions(self) -> bool:
        """Whether training instances have instructions other than the definition."""
        return any(text is not None for text in _column(self.train, "instruction"))

    @property
    def fingerprint(self) -> str:
        """A hash of the name, the definition, the demonstrations and all instances."""
        digest = hashlib.sha256(repr((self.name, self.definition, self.demonstrations)).encode())
        for instances in (self.train, self.validation, self.test):
            digest.update(np.asarray(_column(instances, "hash"), dtype=np.uint64).tobytes() + b"|")
        return digest.hexdigest()[:16]


def hold_out(tasks: Iterable[Task], per_task: int, seed: int) -> list[Task]:
    """Returns the tasks with `per_task` training instances, at most a quarter, moved to `validation`.

    A task that already has a validation set is unchanged. Both parts keep their order. Answers of the same chat are
    moved together, so that no prompt in training contains a held-out answer, except answers with which several chats
    begin; the last chat may exceed `per_task`.
    """
    after = []
    for task in tasks:
        if per_task and not task.validation:
            indices, chats, held = range(len(task.train)), _same_chat(task.train), set[int]()
            for index in _shuffled(indices, f"hold_out/{seed}/{task.name}"):
                chat = chats.get(index, [index])
                if (
                    len(held) < per_task
                    and index not in held
                    and len(held) + len(chat) <= len(indices) // 4
                ):
                    held.update(chat)
            parts = {
                "validation": sorted(held),
                "train": [index for index in indices if index not in held],
            }
            task = task.model_copy(
                update={name: _selected(task.train, part) for name, part in parts.items()}
            )
        after.append(task)
    return after


def _same_chat(instances: Sequence[Instance]) -> dict[int, list[int]]:
    """Returns by index the indices of the instances of the same chat; empty without chats.

    The first instance of a chat is the shortest beginning of its turns that is an instance. A beginning that several
    chats share, such as a greeting, does not join them.
    """
    chats = defaultdict[Any, list[int]](list)
    if not any(histories := _column(instances, "history")):
        return {}
    chat_turns = []
    texts, outputs = (_column(instances, name) for name in ("input", "outputs"))
    for history, text, answers in zip(histories, texts, outputs, strict=True):
        turns = [content for _, content in dropwhile(lambda message: message[0] != "user", history)]
        chat_turns.append((*turns, text, answers[0]))
    counts = Counter(chat_turns)
    for index, turns in enumerate(chat_turns):
        starts = (turns[:count] for count in range(2, len(turns)))
        chats[
            next((start for start in starts if 0 < counts[start] <= counts[turns]), turns)
        ].append(index)
    return {index: chat for chat in chats.values() for index in chat}


def limit(tasks: Iterable[Task], train: int | None, test: int | None, seed: int) -> list[Task]:
    """Returns the tasks with at most `train` random training instances and the first `test` test instances.

    None keeps all instances of a split. With the same seed, a smaller training set is a subset of every larger one.
    """
    limited = []
    for task in tasks:
        kept = sorted(_shuffled(range(len(task.train)), f"limit/{seed}/{task.name}")[:train])
        limited.append(
            task.model_copy(update={"train": _selected(task.train, kept), "test": task.test[:test]})
        )
    return limited


def mixture(tasks: Sequence[Task], seed: int) -> list[int]:
    """Returns the indices of all training instances, numbered consecutively over the tasks, in random order."""
    return _shuffled(range(sum(len(task.train) for task in tasks)), f"mixture/{seed}")


def quotas(
    tasks: Sequence[Task], *, balanced: bool = False, temperature: float = 1.0
) -> dict[str, int] | None:
    """Returns the number of training instances of each task per epoch; their sum stays about the same.

    A task with n instances and weight w gets a share proportional to w · n^(1/temperature), or to w if ``balanced``.
    None if each instance is used once per epoch.
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
    """Returns the tasks in training order.

    ``order`` is a list of the names or numbers of all tasks; "sapt-1" or "sapt-2", without the tasks that are not
    loaded; or "seeded-N", the sorted names shuffled with seed N. seeded-0 to seeded-4 replace the BADIT paper's five
    orders, which cannot be recovered.
    """
    by_name = {task.name: task for task in tasks}
    if not isinstance(order, str):
        names = resolve_names(order, by_name, field="data.order")
    elif order in SAPT_ORDERS:
        by_number = {_number(name): name for name in sorted(by_name)}
        names = [
            by_number[str(number)] for number in SAPT_ORDERS[order] if str(number) in by_number
        ]
    elif match := re.fullmatch(r"seeded-([0-9]{1,18})", order):
        names = _shuffled(sorted(by_name), f"order/{int(match[1])}")
    else:
        known = f"{nearest(order, [*SAPT_ORDERS, 'seeded-0'])}; known: sapt-1, sapt-2, seeded-N, a list of names"
        raise BaditError(f"data.order: unknown order {order!r:.60}{known}")
    if missing := by_name.keys() - names:
        raise BaditError(
            f"data.order: does not contain task {min(missing)}; add it, or remove it from data.tasks"
        )
    return [by_name[name] for name in names]


def resolve_names(
    wanted: Sequence[str], names: Iterable[str], *, field: str = "tasks"
) -> list[str]:
    """Returns the full names of the `wanted` names or number prefixes, such as "task363" or "363", in their order."""
    if isinstance(wanted, str):
        raise BaditError(
            f"{field}: must be a list of names, such as [{wanted!r:.60}], not one string"
        )
    known, resolved = sorted(names), []
    for name in map(str, wanted):
        digits = re.fullmatch(r"(?:task)?(\d+)", name)
        numbered = [each for each in known if digits and _number(each) == digits[1].lstrip("0")]
        matches = [name] if name in known else numbered
        if not matches:
            among = f"{nearest(name, known)}; known: {', '.join(known):.300}"
            raise BaditError(f"{field}: unknown task {name!r:.60}{among}")
        if len(matches) > 1:
            fix = f"give a full name, such as {matches[0]!r:.130}"
            raise BaditError(f"{field}: {name!r:.60} matches {len(matches)} tasks; {fix}")
        if matches[0] in resolved:
            raise BaditError(f"{field}: {matches[0]!r:.130} is listed twice; list it once")
        resolved += matches
    if not resolved:
        raise BaditError(f"{field}: the list is empty; add a task or omit the list")
    return resolved


def _number(name: str) -> str | None:
    """Returns the number of a name such as "task073_commonsenseqa", without leading zeros; None if it has none."""
    match = re.fullmatch(r"task(\d+)(?:_.*)?", name)
    return match[1].lstrip("0") if match else None
