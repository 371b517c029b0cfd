"""Tables in memory, or in the cache if they are large: then they are made once and mapped into memory from the disk.

The name of a file in the cache is a hash of all that decides its content, so the folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock

from badit.errors import explained
from badit.files import cache_folder, read_json, sync, write_json

# The version of the files: increase it with any change of what is in them.
_FORMAT = 1

Item = TypeVar("Item")
#: Makes a table's columns, some rows at a time, and fills the notes that it is given.
Make = Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]]


class Table:
    """Rows in record batches, which may be mapped from a file; reading some of them touches only theirs."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = batches
        self._starts = np.cumsum([0, *map(len, batches)])

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[number].slice(row - int(self._starts[number]), 1).to_pylist()[0]

    def column(self, name: str) -> list[pa.Array]:
        """One column's part in each batch."""
        return [batch.column(name) for batch in self._batches]

    def take(self, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The rows in their order, in one or more batches."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.split(rows, np.flatnonzero(np.diff(numbers)) + 1) if len(rows) else ():
            number = int(np.searchsorted(self._starts, part[0], side="right")) - 1
            yield self._batches[number].take(pa.array(part - self._starts[number]))


def table(schema: pa.Schema, make: Make, key: Any = None) -> tuple[Table, dict[str, Any]]:
    """A table and its notes, from the cache if they are there.

    Args:
        schema: of the table.
        make: called unless the cache has the table.
        key: plain values that decide the content; without it, the table stays in memory.

    Raises:
        BaditError: the cache cannot be read or written.
    """
    notes: dict[str, Any] = {}
    batches = (pa.RecordBatch.from_pydict(dict(columns), schema=schema) for columns in make(notes))
    if key is None:
        return Table(list(batches)), notes
    name = hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()[:32]
    path = cache_folder() / "data" / f"{name}.arrow"
    with explained(f"cache {path.parent}", fix="set BADIT_CACHE to a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of several processes one makes it
            if not path.is_file():
                partial = path.with_suffix(".partial")
                with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                    for batch in batches:
                        writer.write_batch(batch)
                sync(partial)
                write_json(path.with_suffix(".json"), notes)
                partial.replace(path)
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        kept = [file.get_batch(number) for number in range(file.num_record_batches)]
        return Table(kept), read_json(path.with_suffix(".json"))


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items each; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
