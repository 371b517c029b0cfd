"""Arrow tables: small ones in memory, large ones in a cache, from which they are memory-mapped.

A cache file is named by a hash of everything that determines its content, so the folder can be
removed at any time.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from badit.support.errors import explained
from badit.support.files import cache_folder, sync

_FORMAT = 7  # version of the cache files; increase it whenever their content changes


def arrow_table(schema: pa.Schema, batches: Iterator[pa.RecordBatch], key: Any = None) -> pa.Table:
    """Returns a table, from the cache if possible.

    ``batches`` generates the rows, and is not run if the cache has the table. ``key`` has the JSON
    values that determine the content; None keeps the table in memory. BaditError if the cache
    cannot be read or written.
    """
    if key is None:  # small data, or data that no key determines
        return pa.Table.from_batches(batches, schema=schema)

    path = _path(key)
    with explained(f"cache {path.parent}", fix="set BADIT_CACHE to a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # only one process writes the table
            # Another process may have written it while this one waited for the lock.
            if not path.is_file():
                _write(path, schema, batches)
    # A damaged file can raise any exception.
    with explained(path, action="read", fix="delete it", any_error=True):
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _path(key: Any) -> Path:
    """Returns the cache file of a key."""
    name = hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()[:32]
    return cache_folder() / "data" / f"{name}.arrow"


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Writes a cache file atomically: it is complete or absent."""
    partial = path.with_suffix(".partial")
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        sync(partial)
        partial.replace(path)
    finally:
        # An error in the data, or an interruption, leaves it.
        partial.unlink(missing_ok=True)
