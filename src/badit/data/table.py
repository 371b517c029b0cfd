"""Sequences of items in the rows of an Arrow table, which may be larger than memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa

Item = TypeVar("Item")
Indices = Sequence[int] | np.ndarray


class TableItems(Sequence[Item]):
    """Rows of an Arrow table as items.

    ``make`` creates an item from a row's values when it is read. A selection has the numbers of
    its rows and no copy of the table.
    """

    def __init__(
        self, table: pa.Table, rows: Indices, make: Callable[[dict[str, Any]], Item]
    ) -> None:
        self.table = table
        self.rows = np.asarray(rows, dtype=np.int64)
        self._make = make
        self._batches = table.to_batches()
        # The first row number of every batch: searchsorted finds the batch of a row.
        self._starts = np.cumsum([0, *map(len, self._batches)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        # Not with pa.Table.slice, whose time grows with the number of batches.
        (item,) = self.select([index])
        return item

    def __iter__(self) -> Iterator[Item]:
        for batch in self._selected_batches():
            yield from map(self._make, batch.to_pylist())

    # Equal to any sequence of equal items, so that tasks of small and large data compare.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def column(self, name: str) -> list[Any]:
        """Returns the values of one column, in the order of the items."""
        batches = self._selected_batches()
        return [value for batch in batches for value in batch.column(name).to_pylist()]

    def select(self, indices: Indices) -> Self:
        # A shallow copy shares the table and its batches.
        selected = copy(self)
        selected.rows = self.rows[np.asarray(indices, dtype=np.int64)]
        return selected

    def _selected_batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the rows in order, each time a run of rows from one batch of the table."""
        if not len(self):
            return

        # pa.Table.take would first copy the whole table.
        numbers = np.searchsorted(self._starts, self.rows, side="right") - 1
        # Where consecutive items are in different batches.
        run_ends = np.flatnonzero(np.diff(numbers)) + 1
        for rows in np.split(self.rows, run_ends):
            number = np.searchsorted(self._starts, rows[0], side="right") - 1
            yield self._batches[number].take(pa.array(rows - self._starts[number]))


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of ``size`` items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
