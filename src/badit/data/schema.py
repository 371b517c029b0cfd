"""What a task is: one instruction, its demonstrations, and the instances of its three splits.

The field names of Super-NaturalInstructions (github.com/allenai/natural-instructions) are read by `task_from_superni`;
inside the library a task has the plain names below, whichever layout it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from badit.errors import BaditError
from badit.files import shown

Split = Literal["train", "validation", "test"]

# A task's name becomes a file's name, and file systems stop at 255 bytes with the suffix included.
MAX_NAME_CHARACTERS = 120
MAX_NAME_BYTES = 240


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


TaskName = Annotated[str, AfterValidator(file_safe)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_strings)]
FirstString = Annotated[str, BeforeValidator(_first_string)]
Outputs = Annotated[tuple[str, ...], BeforeValidator(_strings), AfterValidator(_at_least_one)]
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


# Official files have many more fields (Contributors, Source, Negative Examples, …); none of them is needed here.
_OFFICIAL_NAMES = {
    "definition": "Definition",
    "demonstrations": "Positive Examples",
    "categories": "Categories",
    "domains": "Domains",
}


def task_from_superni(record: object, *, name: str, split: Split, file: Path) -> Task:
    """The task of one Super-NaturalInstructions file, with all the file's instances in `split`.

    An instance without an id gets "<name>-<its index>".

    Raises:
        BaditError: a needed field is missing or has another type; `file`, instance and field are named.
    """
    if not isinstance(record, dict):
        raise BaditError(f"{shown(file)}: must hold one JSON object, not a {type(record).__name__}")
    instances = record.get("Instances")
    if not isinstance(instances, list) or not instances:
        raise BaditError(f"{shown(file)}: field 'Instances': must be a list of at least one instance")
    fields = {ours: record[theirs] for ours, theirs in _OFFICIAL_NAMES.items() if theirs in record}
    fields[split] = [_with_id(instance, f"{name}-{index}") for index, instance in enumerate(instances)]
    try:
        return Task.model_validate({"name": name, **fields})
    except ValidationError as error:
        location, problem = first_problem(error)
        raise BaditError(f"{shown(file)}: {_place(location, split, instances)}{problem}") from None


def _with_id(instance: object, made_up: str) -> object:
    if isinstance(instance, dict) and instance.get("id") is None:
        return {**instance, "id": made_up}
    return instance


def _place(location: tuple[int | str, ...], split: Split, instances: list[object]) -> str:
    """Where in an official file a problem lies, in that file's own words."""
    field, *rest = location
    if field == split and rest:
        index = int(rest[0])
        instance = instances[index]
        named = isinstance(instance, dict) and isinstance(instance.get("id"), str)
        identity = f" (id {instance['id']!r:.60})" if isinstance(instance, dict) and named else ""
        return f"instance {index}{identity}: " + "".join(f"field '{part}': " for part in rest[1:2])
    official = "Instances" if field == split else _OFFICIAL_NAMES.get(str(field), str(field))
    return f"field '{official}': " + "".join(f"{part}: " for part in rest)


def first_problem(error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    """Where the first problem lies and what it is, on one line and without pydantic's own prefixes."""
    problem = error.errors(include_url=False, include_input=False)[0]
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    return problem["loc"], message[:1].lower() + message[1:]
