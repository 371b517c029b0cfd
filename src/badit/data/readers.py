"""Readers of tasks: the built-in suite, the two layouts of Super-NaturalInstructions, and plain .jsonl.

The official collection has some 1,600 files, so a file is read only when its task is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field

from badit.data.suite import builtin_tasks
from badit.data.tasks import (
    Demonstration,
    FirstString,
    Instance,
    Outputs,
    Split,
    Strings,
    Task,
    TaskName,
    resolve_names,
)
from badit.errors import BaditError, explained, refuse_unknown
from badit.files import parse_json, read_text

Format = Literal["auto", "sapt", "superni", "jsonl", "builtin"]
Catalog = Mapping[str, Callable[[], Task]]

# The official evaluation scores the first 100 instances of a test task.
OFFICIAL_TEST_INSTANCES = 100


def load_tasks(source: str | Path, *, tasks: Sequence[str] | None = None, format: Format = "auto") -> list[Task]:
    """The tasks at `source`, sorted by name, or those named in `tasks`, in that order.

    Args:
        source: "builtin" for the built-in suite, or a path to one of
            sapt: a folder of `<task>/train.json` and `<task>/test.json`, each in the Super-NaturalInstructions schema.
                `<task>/dev.json` is not read: in the published release it equals test.json.
            superni: a folder with `tasks/*.json` (or `*.json`) and, in it or next to it, the lists
                `splits/<list>/train_tasks.txt` and `test_tasks.txt` (`default` if there are several). Tasks of the
                first list are for training, those of the second have their first 100 instances in `test`, all others
                are left out. Without lists, the first 100 instances are `test` and the rest `train`.
            jsonl: a .jsonl file or a folder of train.jsonl, validation.jsonl and test.jsonl; a line has "task",
                "instruction", "input" (or none), "output" or "outputs", and may have "id" and "split".
        tasks: full names, or number prefixes such as "task363" or "363" that fit one task only.
        format: the layout; "auto" detects it.

    Raises:
        BaditError: a broken file, an unknown layout, or a task that is not there.
    """
    refuse_unknown("format", format, get_args(Format))
    catalog = _catalog(source, format)
    if not catalog:
        raise BaditError(f"{source}: holds no tasks")
    names = sorted(catalog) if tasks is None else resolve_names(tasks, catalog)
    return [catalog[name]() for name in names]


def _catalog(source: str | Path, format: Format) -> Catalog:
    if source == "builtin" and format in ("auto", "builtin"):
        return {task.name: lambda task=task: task for task in builtin_tasks()}
    if format == "builtin":
        raise BaditError(f"source: must be 'builtin' for the built-in suite, not {str(source)!r:.60}")
    path = Path(source)
    with explained(path, action="read"):
        if not path.exists():
            raise BaditError(f"{path}: no such file or folder; give a path or 'builtin'")
        sapt, lines = sorted(path.glob("*/train.json")), _jsonl_files(path)
        official = sorted((path / "tasks" if (path / "tasks").is_dir() else path).glob("*.json"))
        if format == "sapt" or (format == "auto" and sapt):
            return {file.parent.name: partial(_read_sapt, file.parent) for file in sapt}
        if format == "jsonl" or (format == "auto" and lines):
            return {task.name: lambda task=task: task for task in _read_jsonl(path, lines)}
        if format == "superni" or official:
            lists = _split_lists(path)
            listed = lists["train"] | lists["test"] if lists else {file.stem for file in official}
            return {file.stem: partial(_read_superni, file, lists) for file in official if file.stem in listed}
    raise BaditError(f"{path}: no tasks found; expected <task>/train.json, tasks/*.json or a .jsonl")


def _read_sapt(folder: Path) -> Task:
    test = _read_official(folder / "test.json", folder.name, "test").test
    return _read_official(folder / "train.json", folder.name, "train").model_copy(update={"test": test})


def _read_superni(file: Path, lists: Mapping[str, set[str]] | None) -> Task:
    if lists and file.stem in lists["train"]:
        return _read_official(file, file.stem, "train")
    task = _read_official(file, file.stem, "test")
    rest = () if lists else task.test[OFFICIAL_TEST_INSTANCES:]
    return task.model_copy(update={"train": rest, "test": task.test[:OFFICIAL_TEST_INSTANCES]})


def _split_lists(root: Path) -> dict[str, set[str]] | None:
    """The names in train_tasks.txt and test_tasks.txt; None without split lists."""
    parent = next((base / "splits" for base in (root, root.absolute().parent) if (base / "splits").is_dir()), None)
    if parent is None:
        return None
    folders = [parent / "default"] if (parent / "default").is_dir() else [f for f in parent.iterdir() if f.is_dir()]
    if len(folders) != 1:
        raise BaditError(f"{parent}: has {len(folders)} split lists and no 'default'; keep one")
    lists = {split: set(read_text(folders[0] / f"{split}_tasks.txt").split()) for split in ("train", "test")}
    if both := sorted(lists["train"] & lists["test"]):
        raise BaditError(f"{root}: task {both[0]!r:.60} is in both split lists; keep it in one")
    return lists


class _OfficialInstance(BaseModel):
    id: str | None = None
    input: str
    output: Outputs


class _OfficialTask(BaseModel):
    """A Super-NaturalInstructions file; its other fields (Contributors, Negative Examples, …) are not needed."""

    definition: FirstString = Field(alias="Definition")
    demonstrations: tuple[Demonstration, ...] = Field((), alias="Positive Examples")
    categories: Strings = Field((), alias="Categories")
    domains: Strings = Field((), alias="Domains")
    instances: list[_OfficialInstance] = Field(alias="Instances", min_length=1)


def _read_official(file: Path, name: str, split: Split) -> Task:
    """The task of one official file, all instances in `split`; one without an id gets "<name>-<its index>"."""
    content = parse_json(read_text(file), file=file)
    with explained(file):
        found = _OfficialTask.model_validate(content)
        instances = tuple(
            Instance(id=f"{name}-{index}" if one.id is None else one.id, input=one.input, outputs=one.output)
            for index, one in enumerate(found.instances)
        )
        return Task.model_validate({"name": name, **found.model_dump(exclude={"instances"}), split: instances})


def _not_blank(outputs: tuple[str, ...]) -> tuple[str, ...]:
    if not any(output.strip() for output in outputs):
        raise ValueError("must hold at least one answer that is not blank")
    return outputs


class _Line(BaseModel):
    """A line of a .jsonl file. Unknown keys are refused: a misspelt "input" would otherwise be an empty one."""

    model_config = ConfigDict(extra="forbid")

    task: TaskName
    instruction: str = Field(min_length=1)
    input: str = ""
    # Stricter than an instance of the published benchmark: here a blank answer is a mistake that can be corrected.
    outputs: Annotated[Outputs, AfterValidator(_not_blank)] = Field(validation_alias=AliasChoices("output", "outputs"))
    id: str | None = None
    split: Split | None = None


def _jsonl_files(source: Path) -> dict[Path, Split | None]:
    """The files of a source and the split that each is named for: None for a single file, whose lines name it."""
    if source.is_dir():
        return {file: split for split in get_args(Split) if (file := source / f"{split}.jsonl").is_file()}
    return {source: None} if source.suffix == ".jsonl" else {}


def _read_jsonl(source: Path, files: Mapping[Path, Split | None]) -> list[Task]:
    """All tasks of .jsonl files.

    A line without an id gets "<task>-<its index among the task's lines>"; one without a split is for training unless
    its file's name says otherwise.
    """
    found: dict[str, dict[str, Any]] = {}
    for file, file_split in files.items():
        # Not splitlines(): JSON strings may hold U+2028 and similar characters unescaped.
        for number, text in enumerate(read_text(file).split("\n"), start=1):
            if not text.strip():
                continue
            record = parse_json(text, file=file, first_line=number)
            with explained(place := f"{file}: line {number}"):
                line = _Line.model_validate(record)
            task = found.setdefault(line.task, {"name": line.task, "definition": line.instruction})
            if task["definition"] != line.instruction:
                known = f"task '{line.task}' has another one above; use one instruction per task"
                raise BaditError(f"{place}: instruction: {known}")
            if file_split and line.split and line.split != file_split:
                raise BaditError(f"{place}: split: the file's name says '{file_split}'")
            count = sum(len(task.get(split, ())) for split in get_args(Split))
            identity = line.id if line.id is not None else f"{line.task}-{count}"
            instance = Instance(id=identity, input=line.input, outputs=line.outputs)
            task.setdefault(file_split or line.split or "train", []).append(instance)
    tasks = []
    for name, fields in found.items():
        with explained(f"{source}: task '{name}'"):
            tasks.append(Task.model_validate(fields))
    return tasks
