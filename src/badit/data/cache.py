"""Arrow tables: small ones in memory, large ones written to the cache once and memory-mapped from there.

A cache file is named by a hash of everything that determines its content, so the folder can be removed at any time.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock

from badit.support.errors import explained
from badit.support.files import cache_folder, sync

_FORMAT = 7  # version of the cache files; increase it whenever their content changes
ROWS_AT_A_TIME = 5_000

Item = TypeVar("Item")
Indices = Sequence[int] | np.ndarray


class Items(Sequence[Item]):
    """A sequence of items in rows of an Arrow table, in memory or mapped; ``make`` creates an item when it is read."""

    def __init__(
        self, table: pa.Table, rows: Indices, make: Callable[[dict[str, Any]], Item]
    ) -> None:
        self.table, self.rows, self._make = table, np.asarray(rows, dtype=np.int64), make
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *map(len, self._batches)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._make(self.table.slice(int(self.rows[index]), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Item]:
        for batch in self._selected_batches():
            yield from map(self._make, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def column(self, name: str) -> list[Any]:
        """Returns the values of one column, in the order of the items."""
        return [
            value for batch in self._selected_batches() for value in batch.column(name).to_pylist()
        ]

    def select(self, indices: Indices) -> Self:
        selected = copy(self)
        selected.rows = self.rows[np.asarray(indices, dtype=np.int64)]
        return selected

    def _selected_batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the rows in order, one table batch at a time (pa.Table.take would copy the whole table)."""
        numbers = np.searchsorted(self._starts, self.rows, side="right") - 1
        for part in (
            np.split(np.arange(len(self)), np.flatnonzero(np.diff(numbers)) + 1)
            if len(self)
            else ()
        ):
            number = numbers[part[0]]
            yield self._batches[number].take(pa.array(self.rows[part] - self._starts[number]))


def arrow_table(schema: pa.Schema, rows: Iterator[dict[str, Any]], key: Any = None) -> pa.Table:
    """Returns a table, from the cache if possible; BaditError if the cache cannot be read or written.

    ``rows`` generates the rows, and is not run if the cache has the table. ``key`` has the JSON values that determine
    the content; None keeps the table in memory.
    """
    batches = (
        pa.RecordBatch.from_pylist(chunk, schema=schema) for chunk in chunks(rows, ROWS_AT_A_TIME)
    )
    if key is None:
        return pa.Table.from_batches(batches, schema=schema)
    name = hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()[:32]
    path = cache_folder() / "data" / f"{name}.arrow"
    with explained(f"cache {path.parent}", fix="set BADIT_CACHE to a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # only one process writes the table
            if not path.is_file():
                partial = path.with_suffix(".partial")
                try:
                    with (
                        pa.OSFile(str(partial), "wb") as file,
                        pa.ipc.new_file(file, schema) as writer,
                    ):
                        for batch in batches:
                            writer.write_batch(batch)
                    sync(partial)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
    with explained(path, action="read", fix="delete it", any_error=True):
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of ``size`` items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
