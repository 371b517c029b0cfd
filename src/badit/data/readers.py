"""Reads tasks: the built-in suite, Super-NaturalInstructions in two layouts, and rows of files or hub datasets.

A row is a task's instance, an instruction (Alpaca), a prompt with its completion (FLAN, P3) or a chat (ShareGPT). No
dataset scripts are run. The official collection has about 1,600 files; only those of the selected tasks are read.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from pydantic import BaseModel, Field

from badit.data import cache
from badit.data.rows import SUFFIXES, Format, Record, Source, read_rows
from badit.data.tasks import (
    SPLITS,
    Demonstration,
    FirstString,
    Instance,
    Outputs,
    Split,
    Strings,
    Task,
    resolve_names,
)
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import inside, lines_of, parse_json, read_json, read_text

OFFICIAL_TEST_INSTANCES = (
    100  # the official evaluation scores the first 100 instances of a test task
)
_LARGE = 4 * 2**20  # bytes; sources of at least this size are kept in the cache
_TEXT = pa.string()
_SCHEMA = pa.schema({  # "about": JSON of the task's other fields, only in its first row
    "task": _TEXT, "about": _TEXT, "split": _TEXT, "hash": pa.uint64(), "id": _TEXT, "input": _TEXT,
    "instruction": _TEXT, "outputs": pa.list_(_TEXT), "history": pa.list_(pa.list_(_TEXT)),
})  # fmt: skip


def load_tasks(source: str | Path | Source, *, tasks: Sequence[str] | None = None) -> list[Task]:
    """Reads the tasks at `source`, sorted by name, or those listed in `tasks`, in that order.

    Args:
        source: a :class:`Source` or its path: "builtin" or one of these layouts:
            sapt: a folder with `<task>/train.json` and `<task>/test.json` in the Super-NaturalInstructions schema.
                `<task>/dev.json` is not read, because it equals test.json in the published release.
            superni: a folder with `tasks/*.json` (or `*.json`) and, in it or next to it, the lists
                `splits/<list>/train_tasks.txt` and `test_tasks.txt` (`<list>` is `default` or the only folder). All
                instances of tasks in the first list are `train`; of tasks in the second, the first 100 are `test`. The
                rest is not used. Without lists, the first 100 instances of each task are `test`, the others `train`.
            rows (docs/own-tasks.md describes their forms): a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a
                folder or pattern of such files, a folder written by `save_to_disk`, or a dataset on the hub. With the
                format "jsonl", only the .jsonl files of a folder are read.
        tasks: full names, or number prefixes such as "task363" or "363" that match exactly one task.

    Raises:
        BaditError: an invalid file, an unknown layout, or an unknown task.
    """
    return load_sources([source if isinstance(source, Source) else Source(source)], tasks)


def load_sources(
    sources: Sequence[Source],
    wanted: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[Task]:
    """Reads the tasks of several sources, with ``wanted`` as ``tasks`` in :func:`load_tasks`.

    ``weights`` are additional factors on the weights of tasks, by name or number. BaditError for invalid data, a task
    that occurs in two sources, or a weight for an unknown task.
    """
    found: dict[str, Task] = {}
    for source in sources:
        path = Path(source.path)
        if len(sources) > 1 and not source.task and _split_in(path, source) and path.is_file():
            fix = f"give the folder or a pattern such as {path.parent}/*"
            raise BaditError(
                f"data.source: {source.path} is named after a split, not a task; {fix}, or set its task"
            )
        for task in _read(source, wanted if len(sources) == 1 and not weights else None):
            if task.name in found:
                raise BaditError(
                    f"data.source: {source.path} has task {task.name} of another source; set a new task"
                )
            found[task.name] = task.model_copy(update={"weight": source.weight})
    names = sorted(found) if wanted is None else resolve_names(wanted, found)
    for key, weight in (weights or {}).items():
        (name,) = resolve_names([key], found, field="data.weights")
        found[name] = found[name].model_copy(update={"weight": found[name].weight * weight})
    return [found[name] for name in names]


def _read(where: Source, wanted: Sequence[str] | None) -> list[Task]:
    """Reads the tasks of a source; of an official collection only the wanted ones."""
    refuse_unknown("format", where.format, get_args(Format))
    if where.path == "builtin" and where.format in ("auto", "builtin"):
        where.refuse_row_options()
        return builtin_tasks()
    if where.format == "builtin":
        raise BaditError(
            f"source: must be 'builtin' with format 'builtin', not {str(where.path)!r:.60}"
        )
    where.refuse_missing()
    path, found = Path(where.path), None
    with explained(where.path, action="read"):
        is_saved = any(
            (path / name).is_file() for name in ("dataset_dict.json", "state.json")
        )  # by save_to_disk
        if is_saved or not (path.exists() or has_magic(str(where.path))):
            found = _of_data_sets(where, path)
        elif path.is_dir() and where.format != "jsonl":
            found = _official(where, path, wanted)
        if found is None:
            found = _of_rows(where, path)
    if not found:
        if path.is_file() and path.suffix in SUFFIXES:
            raise BaditError(f"{where.path}: has no rows")
        known = f"rows in files with the suffix {', '.join(SUFFIXES)}, or <task>/train.json or tasks/*.json"
        raise BaditError(f"{where.path}: no tasks found; expected {known}")
    return found


def builtin_tasks() -> list[Task]:
    """Returns the built-in suite, 16 small tasks in plain English whose inputs have exactly one correct answer.

    They are sorted by name. A task has 160 training and 40 test instances and 2 demonstrations. suite.json, which
    benchmarks/suite.py generates with a fixed seed, lists the abilities that each task requires.
    """
    suite = json.loads(Path(__file__).with_name("suite.json").read_text(encoding="utf-8"))
    tasks = []
    for name, about in sorted(suite["tasks"].items()):
        first, second, *scored = suite["examples"][name].items()
        shots = [{"input": text, "output": answer} for text, answer in (first, second)]
        rows = [
            {"id": f"{name}-{i}", "input": text, "outputs": answer}
            for i, (text, answer) in enumerate(scored)
        ]
        parts = {"demonstrations": shots, "train": rows[:160], "test": rows[160:]}
        tasks.append(Task.model_validate({"name": name, **about, **parts}))
    return tasks


def _build_tasks(
    where: Source, files: Sequence[Path], records: Iterable[Record], about: Any = None
) -> list[Task]:
    """Builds tasks from records. Records of large files come from the cache if the files have not changed.

    A record without an id gets "<task>-<its index among the task's records>". ``about`` has other JSON values that
    determine the content.
    """
    stats = [(file, file.stat()) for file in files]
    key = None
    if sum(stat.st_size for _, stat in stats) >= _LARGE:
        key = [
            where.task,
            where.instruction,
            dict(where.columns),
            dict(where.splits),
            where.turns,
            about,
        ]
        key += [(os.path.abspath(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    def rows() -> Iterator[dict[str, Any]]:
        counts, definitions = Counter(), dict[str, str | None]()
        for task, about, split, fields in records:
            if fields["id"] is None:
                fields["id"] = f"{task}-{counts[task]}"
            if fields.get("instruction") == (
                definitions.setdefault(task, about["definition"]) or ""
            ):
                fields["instruction"] = None
            instance = Instance(**fields)
            own = {
                "about": None if counts[task] else json.dumps(about),
                "split": split,
                "hash": instance.hash,
            }
            counts[task] += 1
            yield {"task": task, **own, **instance.model_dump()}

    table = cache.arrow_table(_SCHEMA, rows(), key)
    places = table.select(["task", "about", "split"]).to_pandas()
    indices = places.groupby(["task", "split"]).indices
    whole, tasks = cache.Items(table, range(len(table)), Instance.model_validate), []
    for name, about in places.dropna()[["task", "about"]].itertuples(index=False):
        parts = {split: whole.select(indices.get((name, split), [])) for split in SPLITS}
        with explained(f"{where.path}: task '{name}'"):
            tasks.append(Task.model_validate({"name": name, **json.loads(about), **parts}))
    return tasks


def _official(where: Source, path: Path, wanted: Sequence[str] | None) -> list[Task] | None:
    """Reads a folder in one of the two layouts of Super-NaturalInstructions; None if it has neither."""
    # By task: its files, each with the split of its first 100 instances and the split of the others.
    found: dict[str, list[Any]] = {
        file.parent.name: [(file, "train", "train"), (file.with_name("test.json"), "test", "test")]
        for file in path.glob("*/train.json")
    }
    if where.format == "superni" or (where.format == "auto" and not found):
        folder = path / "tasks" if (path / "tasks").is_dir() else path
        files, others = (
            _row_files(folder, suffixes, where) for suffixes in ((".json",), SUFFIXES[1:])
        )
        is_rows = not files or others or _holds_rows(files[0]) or _split_in(files[0], where)
        if is_rows and where.format != "superni":
            return None
        splits = _split_lists(path, files)
        found = {file.stem: [(file, *splits[file.stem])] for file in files if file.stem in splits}
    where.refuse_row_options()
    names = sorted(found) if wanted is None else resolve_names(wanted, found)
    parts = [(name, *part) for name in names for part in found[name]]

    def records() -> Iterator[Record]:
        for name, file, first, rest in parts:
            with explained(file):
                task = _OfficialTask.model_validate(parse_json(read_text(file), file=file))
            about = task.model_dump(exclude={"instances"})
            for index, one in enumerate(task.instances):
                if split := first if index < OFFICIAL_TEST_INSTANCES else rest:
                    yield name, about, split, one.model_dump()

    return _build_tasks(
        where,
        [one for _, one, *_ in parts],
        records(),
        [(name, *split) for name, _, *split in parts],
    )


def _split_lists(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Returns, by task, the split of its first 100 instances and that of the others (None: not used)."""
    parent = next(
        (base / "splits" for base in (root, root.absolute().parent) if (base / "splits").is_dir()),
        None,
    )
    if parent is None:
        return {file.stem: ("test", "train") for file in files}
    folders = (
        [parent / "default"]
        if (parent / "default").is_dir()
        else [f for f in parent.iterdir() if f.is_dir()]
    )
    if len(folders) != 1:
        raise BaditError(
            f"{parent}: has {len(folders)} split lists and no 'default'; keep only one"
        )
    train, test = (
        read_text(folders[0] / f"{split}_tasks.txt").split() for split in ("train", "test")
    )
    if both := sorted({*train} & {*test}):
        raise BaditError(f"{root}: task {both[0]!r:.60} is in both split lists; keep it in one")
    return {**dict.fromkeys(train, ("train", "train")), **dict.fromkeys(test, ("test", None))}


class _OfficialInstance(BaseModel):
    id: str | None = None
    input: str
    outputs: Outputs = Field(alias="output")


class _OfficialTask(BaseModel):
    """A Super-NaturalInstructions file; its other fields (Contributors, Negative Examples, …) are ignored."""

    definition: FirstString = Field(alias="Definition")
    demonstrations: tuple[Demonstration, ...] = Field((), alias="Positive Examples")
    categories: Strings = Field((), alias="Categories")
    domains: Strings = Field((), alias="Domains")
    instances: list[_OfficialInstance] = Field(alias="Instances", min_length=1)


def _of_rows(where: Source, path: Path) -> list[Task]:
    """Reads the tasks of a file of rows, or of all such files of a folder or pattern."""
    if path.is_dir():
        files = _row_files(path, SUFFIXES if where.format == "auto" else (".jsonl",), where)
    elif path.exists():
        files = [path] if path.is_file() and path.suffix in SUFFIXES else []
    else:
        files = sorted(
            Path(name) for name in glob(str(where.path), recursive=True) if Path(name).is_file()
        )

    def records() -> Iterator[Record]:
        origins: dict[str, Path] = {}
        by_name = (
            len(files) > 1 and bool(where.splits) and any(_split_in(file, where) for file in files)
        )
        for file in files:
            split = _split_in(file, where) if len(files) > 1 else None
            if by_name and split is None:
                continue
            folder = os.path.dirname(os.path.abspath(file))  # of a link, not of its target
            task = where.task or (os.path.basename(folder) if split else file.stem)
            origin, strict = (
                file.parent if split else file,
                file.suffix in (".json", ".jsonl") and not where.columns,
            )
            for record in read_rows(_rows_in(file), split, task, where, strict=strict):
                if (
                    record[0] == task != where.task
                    and (other := origins.setdefault(task, origin)) != origin
                ):
                    raise BaditError(
                        f"{origin}: task '{task}' is also in {other}; rename one, or set data.task"
                    )
                yield record

    return _build_tasks(where, files, records())


def _row_files(folder: Path, suffixes: Iterable[str], where: Source) -> list[Path]:
    """Returns the files with these suffixes, sorted by split (train, validation, test, none) and name."""
    files = [file for file in folder.iterdir() if file.suffix in suffixes and file.is_file()]
    return sorted(
        files, key=lambda file: ([*SPLITS, None].index(_split_in(file, where)), file.name)
    )


def _split_in(file: Path, where: Source) -> Split | None:
    """Returns the split that a file's name stands for, such as train for train-00000-of-00002.parquet."""
    return where.split_of(re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", file.stem))


def _holds_rows(file: Path) -> bool:
    """Whether a file starts with a JSON list."""
    with explained(file, action="read"), file.open("rb") as stream:
        return stream.read(1024).lstrip()[:1] == b"["


def _rows_in(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each row. CSV values are text; JSON is one list, or one row per line."""
    if file.suffix in (".parquet", ".arrow"):
        from datasets import load_dataset

        with explained(file, action="read", any_error=True):
            rows = load_dataset(
                file.suffix[1:], data_files=escape(str(file)), split="train", streaming=True
            )
        yield from _rows_of(rows, str(file))
    elif file.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)  # in characters; the default is 131,072
        with (
            explained(file, action="read", any_error=True),
            file.open(encoding="utf-8-sig", newline="") as stream,
        ):
            names = stream.readline()
            separator = (
                "\t" if file.suffix == ".tsv" else ";" if ";" in names and "," not in names else ","
            )
            stream.seek(0)
            reader = csv.DictReader(stream, delimiter=separator, strict=True)
            for name, count in Counter(reader.fieldnames or ()).items():
                if count > 1 and name:
                    raise BaditError(
                        f"{file}: column {name!r:.60} occurs {count} times; rename or remove the others"
                    )
            quotes = 'write " within a value as "", and the value in quotes'
            try:
                for number, row in enumerate(reader, start=1):
                    if None in row:
                        fix = "quote values that contain the separator"
                        raise BaditError(
                            f"{file}: row {number} has more values than the first line has names; {fix}"
                        )
                    if separator == "\t" and any("\t" in value for value in row.values() if value):
                        raise BaditError(f"{file}: row {number} has a tab within quotes; {quotes}")
                    yield f"{file}: row {number}", row
            except csv.Error as error:
                raise BaditError(
                    f"{file}: after line {reader.line_num}: {error}; {quotes}"
                ) from None
    elif _holds_rows(file):
        for number, row in enumerate(parse_json(read_text(file), file=file), start=1):
            yield f"{file}: item {number}", row
    else:
        for number, text in lines_of(file):
            if text.strip():
                yield f"{file}: line {number}", parse_json(text, file=file, first_line=number)


def _rows_of(rows: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each row of a dataset: class labels by name; None for NaN and no label (−1)."""
    from datasets.features.features import require_decoding

    features = getattr(rows, "features", None) or {}
    labels = {name: column.names for name, column in features.items() if hasattr(column, "int2str")}
    # Without images, audio and video, also inside other columns: their values may name any file or URL.
    other = re.compile(r"\b(?!(Value|ClassLabel|List|LargeList|Json)\()\w+\(")
    kept = [
        name
        for name, kind in features.items()
        if not (require_decoding(kind) and other.search(str(kind)))
    ]
    rows = rows.select_columns(kept) if len(kept) < len(features) else rows
    with explained(place, action="read", any_error=True):
        for number, row in enumerate(rows, start=1):
            for name, value in row.items():
                if name in labels and value is not None:
                    row[name] = labels[name][value] if value >= 0 else None
                elif value != value:
                    row[name] = None
            yield f"{place}: row {number}", row


def _of_data_sets(where: Source, path: Path) -> list[Task]:
    """Reads a dataset that `save_to_disk` wrote or that is on the hub. Its splits are mapped by name."""
    from datasets import Dataset, load_dataset, load_from_disk, utils

    utils.logging.disable_progress_bar()
    if path.is_dir():
        with explained(path, action="read", any_error=True):
            for file in (*path.rglob("dataset_dict.json"), *path.rglob("state.json")):
                about = read_json(file)
                for name in (
                    *about.get("splits", ()),
                    *(each["filename"] for each in about.get("_data_files", ())),
                ):
                    if not (
                        (place := inside(path, file.parent / name)).is_dir() or place.is_file()
                    ):
                        raise BaditError(
                            f"{place}: is missing, or not a regular file; save the dataset again"
                        )
            found = load_from_disk(str(path)).with_format(None)
    else:
        name, _, configuration = str(where.path).partition(":")
        fix = "give the path of a file or folder, 'builtin', or the name of a dataset on the hub"
        with explained(
            f"{where.path}: no such file or folder",
            action="loaded from the hub",
            fix=fix,
            any_error=True,
        ):
            found = load_dataset(name, configuration or None)
    if isinstance(found, Dataset):  # without named splits, but its rows can have a column ``split``
        parts: list[tuple[Any, Split | None, str]] = [(found, None, str(where.path))]
    else:
        by_name: dict[str, Any] = {str(split): rows for split, rows in found.items()}
        for split in where.splits:
            refuse_unknown(f"{where.path}: data.splits", split, by_name)
        splits = [split for split in by_name if not where.splits or split in where.splits]
        if len(by_name) > 1 and (
            unknown := [split for split in splits if not where.split_of(split)]
        ):
            fix = f"choose the splits to read, such as data.splits.{unknown[0]}=train"
            raise BaditError(
                f"{where.path}: unknown split {unknown[0]!r:.60}; found: {', '.join(by_name)}; {fix}"
            )
        parts = [
            (by_name[split], where.split_of(split), f"{where.path}: {split}") for split in splits
        ]
    name = where.task or os.path.basename(os.path.abspath(path)).partition(":")[0]

    def records() -> Iterator[Record]:
        for rows, split, place in parts:
            yield from read_rows(_rows_of(rows, place), split, name, where, strict=False)

    files = [Path(file["filename"]) for rows, _, _ in parts for file in rows.cache_files]
    return _build_tasks(where, files, records())
