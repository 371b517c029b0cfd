"""Builds tasks from parsed rows, whose instances are in one Arrow table per source."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field

from badit.data.cache import arrow_table
from badit.data.source import Source
from badit.data.table import TableItems, chunks
from badit.data.tasks import SPLITS, Instance, Messages, Split, Strings, Task, TaskName
from badit.support.errors import explained

_LARGE = 4 * 2**20  # bytes; sources of at least this size are kept in the cache
_ROWS_PER_BATCH = 5_000
_TEXT = pa.string()
_SCHEMA = pa.schema(
    {
        "task": _TEXT,
        "about": _TEXT,  # JSON of the task's other fields, only in its first row
        "split": _TEXT,
        "hash": pa.uint64(),  # of the instance, so that fingerprints need not read the rows
        "id": _TEXT,
        "input": _TEXT,
        "instruction": _TEXT,
        "outputs": pa.list_(_TEXT),
        "history": pa.list_(pa.list_(_TEXT)),
        "rejected": _TEXT,
    }
)


class Row(BaseModel):
    """A parsed row: an instance, and what it says about its task.

    Without an id, it gets "<task>-<its index among the task's rows>". The first row of a task has
    the task's fields; without a definition among them, this is the row's instruction.
    """

    task: TaskName
    input: str
    outputs: Strings = Field(alias="output")
    instruction: str | None = None
    history: Messages = ()
    rejected: str | None = None
    id: str | None = None
    split: Split | None = None
    task_fields: dict[str, Any] = {}


def build_tasks(
    source: Source, files: Sequence[Path], rows: Iterable[Row], layout: Any = None
) -> list[Task]:
    """Builds tasks from the rows of files.

    Rows of large files come from the cache if the files have not changed. ``layout`` has other JSON
    values that determine the rows.
    """
    # Only the names and splits of all rows are in memory; large tables are memory-mapped.
    table = arrow_table(_SCHEMA, _batches(rows), _cache_key(source, files, layout))
    places = table.select(["task", "about", "split"]).to_pandas()
    rows_by_split = places.groupby(["task", "split"]).indices
    instances = TableItems(table, range(len(table)), Instance.model_validate)

    tasks = []
    # The first row of each task has its fields.
    for name, json_fields in places.dropna()[["task", "about"]].itertuples(index=False):
        fields = json.loads(json_fields)
        for split in SPLITS:
            fields[split] = instances.select(rows_by_split.get((name, split), []))
        with explained(f"{source.path}: task '{name}'"):
            tasks.append(Task(name=name, **fields))
    return tasks


def _cache_key(source: Source, files: Sequence[Path], layout: Any) -> Any:
    """Returns what determines the rows of files; None if they are too small for the cache."""
    stats = [(os.path.abspath(file), file.stat()) for file in files]
    if sum(stat.st_size for _, stat in stats) < _LARGE:
        return None
    columns = dict(source.columns)
    options = [source.task, source.instruction, columns, dict(source.splits), source.turns, layout]
    # Tools may restore the size and the time of modification, but not the inode and the time of
    # change.
    return options + [
        (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        for path, stat in stats
    ]


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of the table, a batch at a time, so that large files need little memory."""
    counts = Counter[str]()
    definitions: dict[str, str | None] = {}

    def table_row(row: Row) -> dict[str, Any]:
        number = counts[row.task]
        counts[row.task] += 1
        task_fields = None
        if number == 0:
            definitions[row.task] = row.instruction
            task_fields = json.dumps({"definition": row.instruction, **row.task_fields})
        # A blank instruction is none; None stands for the definition, which may be another row's.
        instruction: str | None = row.instruction or ""
        if instruction == (definitions[row.task] or ""):
            instruction = None
        identity = row.id
        if identity is None:
            identity = f"{row.task}-{number}"
        instance = Instance(
            id=identity,
            input=row.input,
            outputs=row.outputs,
            instruction=instruction,
            history=row.history,
            rejected=row.rejected,
        )
        place = {"task": row.task, "about": task_fields, "split": row.split or "train"}
        return {**place, "hash": instance.hash, **dict(instance)}

    for chunk in chunks(map(table_row, rows), _ROWS_PER_BATCH):
        yield pa.RecordBatch.from_pylist(chunk, schema=_SCHEMA)
