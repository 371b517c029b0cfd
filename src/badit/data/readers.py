"""Where tasks come from: the built-in suite, the two layouts of Super-NaturalInstructions, and plain .jsonl.

A reader first lists the names it can offer and reads a file only when its task is asked for: the official collection
(github.com/allenai/natural-instructions) has some 1,600 files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from badit.data.suite import builtin_tasks
from badit.data.tasks import OUTPUT_NAMES, Instance, Outputs, Split, Task, TaskName, resolve_names
from badit.errors import BaditError, explained, first_problem, nearest, refuse_unknown
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
                `<task>/dev.json` is not read: in the published release it equals test.json, so that a choice made on
                it would be made on the test set. `validation` stays empty; `hold_out` fills it from `train`.
            superni: a folder with `tasks/*.json` (or `*.json`) and, in it or next to it, the lists
                `splits/<list>/train_tasks.txt` and `test_tasks.txt` (`default` if there are several). A task of the
                first list has all its instances in `train`, one of the second its first 100 in `test`, and one in
                neither is left out. Without lists, the first 100 instances are `test` and the rest `train`.
            jsonl: a .jsonl file or a folder of train.jsonl, validation.jsonl and test.jsonl; a line has "task",
                "instruction", "input" (or none), "output" or "outputs", and may have "id" and "split".
        tasks: full names, or number prefixes such as "task363" or "363" where one task alone has the number.
        format: the layout; "auto" looks.

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
        return _already_read(builtin_tasks())
    if format == "builtin":
        raise BaditError(f"source: must be 'builtin' for the built-in suite, not {str(source)!r:.60}")
    path = Path(source)
    with explained(path, action="read"):
        if not path.exists():
            raise BaditError(f"{path}: no such file or folder; give a path or 'builtin'")
        if format == "sapt" or (format == "auto" and any(path.glob("*/train.json"))):
            return _sapt(path)
        if format == "jsonl" or (format == "auto" and _jsonl_files(path)):
            return _already_read(_tasks_from_jsonl(path))
        if format == "superni" or _superni_files(path):
            return _superni(path)
    raise BaditError(f"{path}: no tasks found; expected <task>/train.json, tasks/*.json or a .jsonl")


def _already_read(tasks: Iterable[Task]) -> Catalog:
    return {task.name: lambda task=task: task for task in tasks}


def _sapt(root: Path) -> Catalog:
    def read(folder: Path) -> Task:
        test = _read_official(folder / "test.json", folder.name, "test").test
        return _read_official(folder / "train.json", folder.name, "train").model_copy(update={"test": test})

    return {file.parent.name: partial(read, file.parent) for file in root.glob("*/train.json")}


def _superni_files(root: Path) -> list[Path]:
    return sorted((root / "tasks" if (root / "tasks").is_dir() else root).glob("*.json"))


def _superni(root: Path) -> Catalog:
    lists = _split_lists(root)

    def read(file: Path) -> Task:
        if lists and file.stem in lists["train"]:
            return _read_official(file, file.stem, "train")
        task = _read_official(file, file.stem, "test")
        rest = () if lists else task.test[OFFICIAL_TEST_INSTANCES:]
        return task.model_copy(update={"train": rest, "test": task.test[:OFFICIAL_TEST_INSTANCES]})

    listed = lists["train"] | lists["test"] if lists else None
    return {file.stem: partial(read, file) for file in _superni_files(root) if listed is None or file.stem in listed}


def _split_lists(root: Path) -> dict[str, set[str]] | None:
    """The names in train_tasks.txt and test_tasks.txt, or None where there are no split lists."""
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


# Official files have many more fields (Contributors, Source, Negative Examples, …); none of them is needed here.
_OFFICIAL_NAMES = {
    "definition": "Definition",
    "demonstrations": "Positive Examples",
    "categories": "Categories",
    "domains": "Domains",
}


def _read_official(file: Path, name: str, split: Split) -> Task:
    """The task of one Super-NaturalInstructions file, with all the file's instances in `split`.

    An instance without an id gets "<name>-<its index>".

    Raises:
        BaditError: a needed field is missing or has another type; `file`, instance and field are named.
    """
    record = parse_json(read_text(file), file=file)
    if not isinstance(record, dict):
        raise BaditError(f"{file}: must hold one JSON object, not a {type(record).__name__}")
    instances = record.get("Instances")
    if not isinstance(instances, list) or not instances:
        raise BaditError(f"{file}: field 'Instances': must be a list of at least one instance")
    fields = {ours: record[theirs] for ours, theirs in _OFFICIAL_NAMES.items() if theirs in record}
    fields[split] = [
        {**instance, "id": f"{name}-{index}"} if isinstance(instance, dict) and instance.get("id") is None else instance
        for index, instance in enumerate(instances)
    ]
    try:
        return Task.model_validate({"name": name, **fields})
    except ValidationError as error:
        location, problem = first_problem(error)
        raise BaditError(f"{file}: {_official_place(location, split, instances)}{problem}") from None


def _official_place(location: tuple[int | str, ...], split: Split, instances: list[Any]) -> str:
    """Where in an official file a problem lies, in that file's own words."""
    field, *rest = location
    if field == split and rest:
        index = int(rest[0])
        identity = instances[index].get("id") if isinstance(instances[index], dict) else None
        named = f" (id {identity!r:.60})" if isinstance(identity, str) else ""
        return f"instance {index}{named}: " + "".join(f"field '{part}': " for part in rest[1:2])
    official = "Instances" if field == split else _OFFICIAL_NAMES.get(str(field), str(field))
    return f"field '{official}': " + "".join(f"{part}: " for part in rest)


def _not_blank(outputs: tuple[str, ...]) -> tuple[str, ...]:
    if not any(output.strip() for output in outputs):
        raise ValueError("must hold at least one answer that is not blank")
    return outputs


class _Line(BaseModel):
    """A line of a .jsonl file."""

    # Unknown keys are refused: a misspelt "input" would otherwise read as an empty one.
    model_config = ConfigDict(extra="forbid")

    task: TaskName
    instruction: str = Field(min_length=1)
    input: str = ""
    # Stricter than an instance of the published benchmark: here a blank answer is a slip that can be corrected.
    outputs: Annotated[Outputs, AfterValidator(_not_blank)] = Field(validation_alias=OUTPUT_NAMES)
    id: str | None = None
    split: Split | None = None


_KEYS = ("task", "instruction", "input", "output", "outputs", "id", "split")


def _jsonl_files(source: Path) -> dict[Path, Split | None]:
    """The files of a source and the split each is named for: None for a single file, whose lines say it themselves."""
    if source.is_dir():
        return {file: split for split in get_args(Split) if (file := source / f"{split}.jsonl").is_file()}
    return {source: None} if source.suffix == ".jsonl" else {}


def _tasks_from_jsonl(source: Path) -> Iterator[Task]:
    """All tasks of a .jsonl file, or of a folder's train.jsonl, validation.jsonl and test.jsonl.

    A line without an id gets "<task>-<its index among the task's lines>"; one without a split is for training unless
    its file's name says otherwise.

    Raises:
        BaditError: a broken line, a task with two instructions, or two equal ids in a task's split.
    """
    instructions: dict[str, str] = {}
    instances: dict[str, dict[Split, list[Instance]]] = {}
    for file, file_split in _jsonl_files(source).items():
        for number, line in _lines(file):
            if instructions.setdefault(line.task, line.instruction) != line.instruction:
                raise BaditError(
                    f"{file}: line {number}: field 'instruction': task '{line.task}' has another one above;"
                    " use one instruction per task"
                )
            if file_split and line.split and line.split != file_split:
                raise BaditError(f"{file}: line {number}: field 'split': the file's name says '{file_split}'")
            splits = instances.setdefault(line.task, {split: [] for split in get_args(Split)})
            identity = line.id if line.id is not None else f"{line.task}-{sum(map(len, splits.values()))}"
            instance = Instance(id=identity, input=line.input, outputs=line.outputs)
            splits[file_split or line.split or "train"].append(instance)
    for name, splits in instances.items():
        with explained(f"{source}: task '{name}'"):
            yield Task.model_validate({"name": name, "definition": instructions[name], **splits})


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
            raise BaditError(f"{file}: line {number}: {field}{problem}{hint}") from None
