"""Tasks from .jsonl: one instance a line, with its task's name and instruction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from badit.data.schema import OUTPUT_NAMES, Instance, Outputs, Split, Task, TaskName, first_problem
from badit.errors import BaditError, nearest
from badit.files import parse_json, read_text, shown

SPLITS: tuple[Split, ...] = get_args(Split)


def _not_blank(outputs: tuple[str, ...]) -> tuple[str, ...]:
    if not any(output.strip() for output in outputs):
        raise ValueError("must hold at least one answer that is not blank")
    return outputs


class _Line(BaseModel):
    # Unknown keys are refused: a misspelt "input" would otherwise read as an empty one.
    model_config = ConfigDict(extra="forbid")

    task: TaskName
    instruction: str = Field(min_length=1)
    input: str = ""
    # Stricter than an instance of the published benchmark: here a blank answer is a slip that can be mended.
    outputs: Annotated[Outputs, AfterValidator(_not_blank)] = Field(validation_alias=OUTPUT_NAMES)
    id: str | None = None
    split: Split | None = None


_KEYS = ("task", "instruction", "input", "output", "outputs", "id", "split")


def jsonl_files(source: Path) -> dict[Path, Split | None]:
    """The files of a source and the split each is named for: None for a single file, whose lines say it themselves."""
    if source.is_dir():
        return {file: split for split in SPLITS if (file := source / f"{split}.jsonl").is_file()}
    return {source: None} if source.suffix == ".jsonl" else {}


def tasks_from_jsonl(source: Path) -> list[Task]:
    """All tasks of a .jsonl file, or of a folder's train.jsonl, validation.jsonl and test.jsonl.

    A line without an id gets "<task>-<its index among the task's lines>"; one without a split is for training unless
    its file's name says otherwise.

    Raises:
        BaditError: a broken line, a task with two instructions, or two equal ids in a task's split.
    """
    instructions: dict[str, str] = {}
    instances: dict[str, dict[Split, list[Instance]]] = {}
    for file, file_split in jsonl_files(source).items():
        for number, line in _lines(file):
            if instructions.setdefault(line.task, line.instruction) != line.instruction:
                raise BaditError(
                    f"{shown(file)}: line {number}: field 'instruction': task '{line.task}' has another one above;"
                    " use one instruction a task"
                )
            if file_split and line.split and line.split != file_split:
                raise BaditError(f"{shown(file)}: line {number}: field 'split': the file's name says '{file_split}'")
            splits = instances.setdefault(line.task, {split: [] for split in SPLITS})
            identity = line.id if line.id is not None else f"{line.task}-{sum(map(len, splits.values()))}"
            instance = Instance(id=identity, input=line.input, outputs=line.outputs)
            splits[file_split or line.split or "train"].append(instance)
    return [_task(source, name, instructions[name], splits) for name, splits in instances.items()]


def _task(source: Path, name: str, instruction: str, splits: dict[Split, list[Instance]]) -> Task:
    try:
        return Task.model_validate({"name": name, "definition": instruction, **splits})
    except ValidationError as error:
        location, problem = first_problem(error)
        raise BaditError(f"{shown(source)}: task '{name}': split '{location[0]}': {problem}") from None


def _lines(file: Path) -> Iterator[tuple[int, _Line]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, text in enumerate(read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        record = parse_json(text, file=file, first_line=number)
        try:
            yield number, _Line.model_validate(record)
        except ValidationError as error:
            location, problem = first_problem(error)
            field = f"field {location[0]!r:.60}: " if location else ""
            hint = nearest(str(location[0]), _KEYS) if location and location[0] not in _KEYS else ""
            raise BaditError(f"{shown(file)}: line {number}: {field}{problem}{hint}") from None
