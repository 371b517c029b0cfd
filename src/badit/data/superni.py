"""Reads folders in the two layouts of Super-NaturalInstructions, of which one is SAPT's.

The official collection has about 1,600 files; only those of the selected tasks are read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from badit.data.files import files_in, starts_with_list
from badit.data.orders import resolve_names
from badit.data.records import Row, build_tasks
from badit.data.source import SUFFIXES, Source
from badit.data.tasks import Demonstration, FirstString, Outputs, Split, Strings, Task
from badit.support.errors import BaditError, explained
from badit.support.files import parse_json, read_text

# The official evaluation scores the first 100 instances of a test task.
OFFICIAL_TEST_INSTANCES = 100


class _TaskFile(NamedTuple):
    """A file of a task, the split of its first 100 instances, and that of the others."""

    task: str
    path: Path
    first: Split
    others: Split | None  # None: not used


class _OfficialInstance(BaseModel):
    id: str | None = None
    input: str
    output: Outputs


class _OfficialTask(BaseModel):
    """A file's content; its other fields (Contributors, Negative Examples, …) are ignored."""

    definition: FirstString = Field(alias="Definition")
    demonstrations: tuple[Demonstration, ...] = Field((), alias="Positive Examples")
    categories: Strings = Field((), alias="Categories")
    domains: Strings = Field((), alias="Domains")
    instances: list[_OfficialInstance] = Field(alias="Instances", min_length=1)


def read_superni(source: Source, folder: Path, wanted: Sequence[str] | None) -> list[Task] | None:
    """Reads the tasks of a folder, or the wanted ones; None if it has neither of the layouts."""
    files: list[_TaskFile] | None = []
    # The cache needs the same order each time.
    for train in sorted(folder.glob("*/train.json")):
        task = train.parent.name
        files.append(_TaskFile(task, train, "train", "train"))
        files.append(_TaskFile(task, train.with_name("test.json"), "test", "test"))
    if source.format == "superni" or (source.format == "auto" and not files):
        files = _official_files(source, folder)
    if files is None:
        return None

    source.refuse_row_options()
    if wanted is not None:
        names = resolve_names(wanted, {file.task for file in files})
        files = [file for file in files if file.task in names]
    # The splits come from other files, so they are a part of the cache's key.
    layout = [(file.task, file.first, file.others) for file in files]
    return build_tasks(source, [file.path for file in files], _rows(files), layout)


def _rows(files: Sequence[_TaskFile]) -> Iterator[Row]:
    for task, path, first, others in files:
        with explained(path):
            content = _OfficialTask.model_validate(parse_json(read_text(path), file=path))
        fields = content.model_dump(exclude={"instances"})
        for index, instance in enumerate(content.instances):
            split = first if index < OFFICIAL_TEST_INSTANCES else others
            if split is None:  # of all that follow
                break
            yield Row(task=task, split=split, task_fields=fields, **dict(instance))


def _official_files(source: Source, folder: Path) -> list[_TaskFile] | None:
    """Returns the files of the tasks in the split lists; None if the folder has rows."""
    tasks_folder = folder / "tasks"
    if not tasks_folder.is_dir():
        tasks_folder = folder
    files = files_in(tasks_folder, (".json",), source)
    # A folder of rows may have the same suffix.
    if source.format == "auto":
        others = files_in(tasks_folder, SUFFIXES[1:], source)
        if not files or others or starts_with_list(files[0]) or source.split_of_file(files[0]):
            return None

    splits = _splits(folder, [file.stem for file in files])
    listed = [file for file in files if file.stem in splits]
    return [_TaskFile(file.stem, file, *splits[file.stem]) for file in listed]


def _splits(folder: Path, tasks: Sequence[str]) -> dict[str, tuple[Split, Split | None]]:
    """Returns the two splits of each task in the split lists of a folder, or of all tasks."""
    # The collection has the lists next to its folder of tasks.
    places = (folder / "splits", folder.absolute().parent / "splits")
    parent = next((place for place in places if place.is_dir()), None)
    if parent is None:
        # Without lists, every task is trained and scored.
        return dict.fromkeys(tasks, ("test", "train"))

    lists = [parent / "default"]
    if not lists[0].is_dir():
        lists = [place for place in parent.iterdir() if place.is_dir()]
    if len(lists) != 1:
        raise BaditError(f"{parent}: has {len(lists)} split lists and no 'default'; keep only one")
    train = read_text(lists[0] / "train_tasks.txt").split()
    test = read_text(lists[0] / "test_tasks.txt").split()
    for task in sorted({*train} & {*test}):
        raise BaditError(f"{folder}: task {task!r:.60} is in both split lists; keep it in one")
    # As in the official evaluation: a training task is only trained, a test task only scored.
    return {**dict.fromkeys(train, ("train", "train")), **dict.fromkeys(test, ("test", None))}
