"""Reads tasks: the built-in suite, Super-NaturalInstructions, files of rows, and datasets."""

from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import NoReturn, get_args

from badit.data.datasets import read_dataset
from badit.data.files import read_files
from badit.data.orders import resolve_names
from badit.data.source import SUFFIXES, Format, Source
from badit.data.suite import builtin_tasks
from badit.data.superni import read_superni
from badit.data.tasks import Task
from badit.support.errors import BaditError, explained, refuse_unknown

# Files of a folder that `save_to_disk` wrote.
_SAVED = ("dataset_dict.json", "state.json")


def load_tasks(source: str | Path | Source, *, tasks: Sequence[str] | None = None) -> list[Task]:
    """Reads the tasks at `source`, sorted by name, or those listed in `tasks`, in that order.

    Args:
        source: a :class:`Source` or its path: "builtin" or one of these layouts:
            sapt: a folder with `<task>/train.json` and `<task>/test.json` in the schema of
                Super-NaturalInstructions. `<task>/dev.json` is not read, because it equals
                test.json in the published release.
            superni: a folder with `tasks/*.json` (or `*.json`) and, in it or next to it, the lists
                `splits/<list>/train_tasks.txt` and `test_tasks.txt` (`<list>` is `default` or the
                only folder). All instances of tasks in the first list are `train`; of tasks in the
                second, the first 100 are `test`. The rest is not used. Without lists, the first 100
                instances of each task are `test`, the others `train`.
            rows (docs/own-tasks.md describes their forms): a .jsonl, .json, .csv, .tsv, .parquet or
                .arrow file, a folder or pattern of such files, a folder written by `save_to_disk`,
                or a dataset on the hub. With the format "jsonl", only the .jsonl files of a folder
                are read.
        tasks: full names, or number prefixes such as "task363" or "363" that match exactly one
            task.

    Raises:
        BaditError: an invalid file, an unknown layout, or an unknown task.
    """
    if not isinstance(source, Source):
        source = Source(source)
    return load_sources([source], tasks)


def load_sources(
    sources: Sequence[Source],
    wanted: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[Task]:
    """Reads the tasks of several sources, with ``wanted`` as ``tasks`` in :func:`load_tasks`.

    ``weights`` are additional factors on the weights of tasks, by name or number. BaditError for
    invalid data, a task that occurs in two sources, or a weight for an unknown task.
    """
    # Weights may name tasks that are not wanted.
    selected = wanted if len(sources) == 1 and not weights else None
    tasks: dict[str, Task] = {}
    for source in sources:
        if len(sources) > 1:
            _refuse_split_file(source)
        for task in _read(source, selected):
            if task.name in tasks:
                raise BaditError(
                    f"data.source: {source.path} has task {task.name} of another source; "
                    "set a new task"
                )
            tasks[task.name] = task.model_copy(update={"weight": source.weight})

    for key, weight in (weights or {}).items():
        (name,) = resolve_names([key], tasks, field="data.weights")
        task = tasks[name]
        tasks[name] = task.model_copy(update={"weight": task.weight * weight})
    names = sorted(tasks)
    if wanted is not None:
        names = resolve_names(wanted, tasks)
    return [tasks[name] for name in names]


def _refuse_split_file(source: Source) -> None:
    """Raises BaditError for one of several sources that is the file of a split, without a task."""
    path = Path(source.path)
    if not source.task and source.split_of_file(path) and path.is_file():
        raise BaditError(
            f"data.source: {source.path} is named after a split, not a task; "
            f"give the folder or a pattern such as {path.parent}/*, or set its task"
        )


def _read(source: Source, wanted: Sequence[str] | None) -> list[Task]:
    """Reads the tasks of a source; of an official collection only the wanted ones."""
    refuse_unknown("format", source.format, get_args(Format))
    if str(source.path) == "builtin" and source.format in ("auto", "builtin"):
        source.refuse_row_options()
        return builtin_tasks()
    if source.format == "builtin":
        path = repr(str(source.path))
        raise BaditError(f"data.source: must be 'builtin' with format 'builtin', not {path:.60}")

    source.refuse_missing()
    with explained(source.path, action="read"):
        tasks = _read_path(source, Path(source.path), wanted)
    if not tasks:
        _refuse_empty(source)
    return tasks


def _read_path(source: Source, path: Path, wanted: Sequence[str] | None) -> list[Task]:
    # A path that does not exist is the name of a dataset on the hub.
    is_saved = any((path / name).is_file() for name in _SAVED)
    if is_saved or not (path.exists() or has_magic(str(path))):
        return read_dataset(source, path)
    # With format "jsonl", a folder has rows even if it looks like SuperNI.
    if path.is_dir() and source.format != "jsonl":
        tasks = read_superni(source, path, wanted)
        if tasks is not None:
            return tasks
    return read_files(source, path)


def _refuse_empty(source: Source) -> NoReturn:
    path = Path(source.path)
    if path.is_file() and path.suffix in SUFFIXES:
        raise BaditError(f"{source.path}: has no rows")
    raise BaditError(
        f"{source.path}: no tasks found; expected rows in files with the suffix "
        f"{', '.join(SUFFIXES)}, or <task>/train.json or tasks/*.json"
    )
