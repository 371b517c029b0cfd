"""Tasks and their training, validation and test instances."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from badit.data.table import TableItems

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def _file_safe(name: str) -> str:
    """Returns the task's name; ValueError unless it is a valid file name without a path."""
    # File systems allow 255 bytes, suffix included.
    is_too_long = len(name) > 120 or len(name.encode()) > 240
    starts_badly = name[:1] in ("", ".") or name[:1].isspace()
    if is_too_long or starts_badly or not name.isprintable() or {*"/\\"} & {*name}:
        raise ValueError(
            f"{name!r:.60} cannot be a file name; use at most 120 characters (240 bytes), "
            "no leading dot or space, __ for a slash, no control character"
        )
    return name


def _as_texts(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError("must be a text or a list of texts")
    return value


def _first_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return next(iter(value), "")
    return value


# A task's name is also the name of files.
TaskName = Annotated[str, AfterValidator(_file_safe)]
# The official files use a string or a list of strings for the same field.
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]
FirstString = Annotated[str, BeforeValidator(_first_text)]
Outputs = Annotated[Strings, Field(min_length=1)]
Messages = tuple[tuple[str, str], ...]  # (role, content) of each


class Instance(BaseModel, frozen=True):
    """An input with one or more reference answers.

    Answers may be blank, as some of the published benchmark are. `instruction` replaces the task's
    definition if instances have different instructions. `history` has the earlier messages of a
    chat as (role, content); `input` is then the message to answer. `rejected` is the answer of
    preference data that is worse than the first of `outputs`.
    """

    id: str
    input: str
    outputs: Outputs
    instruction: str | None = None
    history: Messages = ()
    rejected: str | None = None

    @property
    def hash(self) -> int:
        """A 64-bit hash of all fields."""
        # Runs record the fingerprints of tasks, so it must not change.
        fields: tuple[Any, ...] = (
            self.id,
            self.input,
            self.outputs,
            self.instruction,
            self.history,
        )
        if self.rejected is not None:
            fields += (self.rejected,)
        return int.from_bytes(hashlib.blake2b(repr(fields).encode(), digest_size=8).digest())


class Demonstration(BaseModel, frozen=True):
    """A solved example for few-shot prompts, called "Positive Example" in the official files."""

    input: str
    output: FirstString
    explanation: str = ""


def column(instances: Sequence[Instance], name: str) -> list[Any]:
    """Returns the values of one field of the instances, or their ``hash``."""
    if isinstance(instances, TableItems):
        return instances.column(name)
    return [getattr(instance, name) for instance in instances]


def select(instances: Sequence[Instance], indices: Sequence[int]) -> Sequence[Instance]:
    """Returns the instances at these indices, of the same kind of sequence."""
    if isinstance(instances, TableItems):
        return instances.select(indices)
    return tuple(instances[index] for index in indices)


def _refuse_repeated_ids(instances: Sequence[Instance]) -> Sequence[Instance]:
    counts = Counter(column(instances, "id"))
    if len(counts) < len(instances):
        repeated = counts.most_common(1)[0][0]
        raise ValueError(f"two instances have the id {repeated!r:.60}; give each its own")
    return instances


# A table has one column for each field of Instance, and a column for its hash.
Instances = Annotated[
    TableItems | tuple[Instance, ...],
    Field(union_mode="left_to_right"),
    AfterValidator(_refuse_repeated_ids),
]


class Task(BaseModel, frozen=True, extra="forbid", arbitrary_types_allowed=True):
    """An instruction and its data.

    `name` is also used as a file name. `abilities` is empty except in the built-in suite. If
    `definition` is a list, its first item is used, as in the official evaluation; if it is None, an
    instance's input is the whole prompt. `weight` is a factor on the task's weight in a mixture.
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
        return any(text is not None for text in column(self.train, "instruction"))

    @property
    def has_preferences(self) -> bool:
        """Whether an instance has a rejected answer."""
        return any(
            text is not None
            for split in SPLITS
            for text in column(getattr(self, split), "rejected")
        )

    @property
    def fingerprint(self) -> str:
        """A hash of the name, the definition, the demonstrations and all instances."""
        # The hashes of instances are in their table, so that large data need not be read.
        digest = hashlib.sha256(repr((self.name, self.definition, self.demonstrations)).encode())
        for instances in (self.train, self.validation, self.test):
            # The separator distinguishes splits: moving an instance to another one is a change.
            digest.update(np.asarray(column(instances, "hash"), dtype=np.uint64).tobytes() + b"|")
        return digest.hexdigest()[:16]
