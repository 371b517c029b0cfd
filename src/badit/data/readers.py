"""Where tasks come from: the built-in suite, the two layouts of Super-NaturalInstructions, and plain .jsonl.

A reader first lists the names it can offer and reads a file only when its task is asked for: the official collection
has some 1,600 files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from badit.data.jsonl import jsonl_files, tasks_from_jsonl
from badit.data.names import resolve_names
from badit.data.schema import Split, Task, task_from_superni
from badit.data.suite import builtin_tasks
from badit.errors import BaditError, nearest
from badit.files import parse_json, read_text, shown

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
            superni: a folder with `tasks/*.json` (or `*.json`) and, in it or beside it, the lists
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
    catalog = _catalog(source, format)
    if not catalog:
        raise BaditError(f"{shown(Path(source))}: holds no tasks")
    names = sorted(catalog) if tasks is None else resolve_names(tasks, catalog)
    return [catalog[name]() for name in names]


def _catalog(source: str | Path, format: str) -> Catalog:
    if format not in get_args(Format):
        raise BaditError(f"format: unknown layout {format!r:.60}{nearest(format, get_args(Format))}")
    if source == "builtin" and format in ("auto", "builtin"):
        return _read_already(builtin_tasks())
    if format == "builtin":
        raise BaditError(f"source: must be 'builtin' for the built-in suite, not {str(source)!r:.60}")
    path = Path(source)
    try:
        if not path.exists():
            raise BaditError(f"{shown(path)}: no such file or folder; give a path or 'builtin'")
        match _detected(path) if format == "auto" else format:
            case "sapt":
                return _sapt(path)
            case "superni":
                return _superni(path)
            case "jsonl":
                return _read_already(tasks_from_jsonl(path))
    except OSError as error:
        raise BaditError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    raise BaditError(f"{shown(path)}: no tasks found; expected <task>/train.json, tasks/*.json or a .jsonl")


def _detected(path: Path) -> str:
    if any(path.glob("*/train.json")):
        return "sapt"
    if jsonl_files(path):
        return "jsonl"
    return "superni" if _task_files(path) else ""


def _read_already(tasks: Iterable[Task]) -> Catalog:
    return {task.name: lambda task=task: task for task in tasks}


def _read(file: Path, name: str, split: Split) -> Task:
    return task_from_superni(parse_json(read_text(file), file=file), name=name, split=split, file=file)


def _sapt(root: Path) -> Catalog:
    return {file.parent.name: partial(_read_sapt, file.parent) for file in root.glob("*/train.json")}


def _read_sapt(folder: Path) -> Task:
    test = _read(folder / "test.json", folder.name, "test").test
    return _read(folder / "train.json", folder.name, "train").model_copy(update={"test": test})


def _task_files(root: Path) -> list[Path]:
    return sorted((root / "tasks" if (root / "tasks").is_dir() else root).glob("*.json"))


def _superni(root: Path) -> Catalog:
    lists = _split_lists(root)
    if lists is None:
        return {file.stem: partial(_read_first_as_test, file) for file in _task_files(root)}
    train, test = lists
    if both := sorted(train & test):
        raise BaditError(f"{shown(root)}: task {both[0]!r:.60} is in both split lists; keep it in one")
    readers = {True: _read_as_train, False: _read_as_test}
    return {f.stem: partial(readers[f.stem in train], f) for f in _task_files(root) if f.stem in train | test}


def _split_lists(root: Path) -> tuple[set[str], set[str]] | None:
    """The names in train_tasks.txt and test_tasks.txt, or None where there are no split lists."""
    parent = next((base / "splits" for base in (root, root.absolute().parent) if (base / "splits").is_dir()), None)
    if parent is None:
        return None
    folders = [parent / "default"] if (parent / "default").is_dir() else [f for f in parent.iterdir() if f.is_dir()]
    if len(folders) != 1:
        raise BaditError(f"{shown(parent)}: has {len(folders)} split lists and no 'default'; keep one")
    train, test = (set(read_text(folders[0] / f"{split}_tasks.txt").split()) for split in ("train", "test"))
    return train, test


def _read_as_train(file: Path) -> Task:
    return _read(file, file.stem, "train")


def _read_as_test(file: Path) -> Task:
    task = _read(file, file.stem, "test")
    return task.model_copy(update={"test": task.test[:OFFICIAL_TEST_INSTANCES]})


def _read_first_as_test(file: Path) -> Task:
    task = _read(file, file.stem, "test")
    train, test = task.test[OFFICIAL_TEST_INSTANCES:], task.test[:OFFICIAL_TEST_INSTANCES]
    return task.model_copy(update={"train": train, "test": test})
