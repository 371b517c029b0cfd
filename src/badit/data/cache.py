"""Arrow tables: small ones in memory, large ones in a cache, from which they are memory-mapped.

A cache file is named by a hash of everything that determines its content, so the folder can be
removed at any time. It ends with a checksum, because Arrow reads a damaged file out of bounds.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from badit.support.console import say
from badit.support.errors import BaditError, explained
from badit.support.files import cache_folder, lock, sync

_FORMAT = 9  # version of the cache files; increase it whenever their content changes
_CHECKSUM_SIZE = xxhash.xxh3_128().digest_size
_CHUNK = 2**20  # bytes that are read at a time, so that the checksum needs little memory


def arrow_table(schema: pa.Schema, batches: Iterator[pa.RecordBatch], key: Any = None) -> pa.Table:
    """Returns a table, from the cache if possible.

    ``batches`` generates the rows, and is not run if the cache has the table. ``key`` has the JSON
    values that determine the content; None keeps the table in memory. BaditError if the cache
    cannot be read or written, or belongs to another user.
    """
    if key is None:  # small data, or data that no key determines
        return pa.Table.from_batches(batches, schema=schema)

    path = _path(key)
    with explained(f"cache {path.parent}", fix="set BADIT_CACHE to a folder that can be written"):
        # A complete table needs no lock, and no folder that can be written.
        table = _read(path)
        if table is None:
            _make_private(path.parent)
            with lock(path.with_suffix(".lock")):  # only one process writes the table
                table = _read(path)  # another process may have written it
                if table is None:
                    table = _write(path, schema, batches)
    return table


def _path(key: Any) -> Path:
    """Returns the cache file of a key."""
    name = hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()[:32]
    return cache_folder() / "data" / f"{name}.arrow"


def _read(path: Path) -> pa.Table | None:
    """Returns the table of a cache file; None if the file is missing or damaged."""
    if path.is_symlink() or not path.exists():
        return None
    # Without O_NONBLOCK, opening a pipe would wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _refuse_foreign(path, status)
        size = status.st_size - _CHECKSUM_SIZE
        if not S_ISREG(status.st_mode) or size < 0:
            return None
        if _checksum(path, file, size) != file.read():
            return None
        # The file that was checked, also if another one is at its path now.
        content = pa.py_buffer(mmap(descriptor, 0, access=ACCESS_READ))
    return pa.ipc.open_file(content.slice(0, size)).read_all()


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.Table:
    """Writes a cache file atomically, so that it is complete or absent, and returns its table."""
    if path.is_file() and not path.is_symlink():
        say(f"{path}: damaged; written again from the data")
    partial = path.with_suffix(".partial")
    # A killed process leaves it.
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x+b") as file:  # "x" does not follow links
            with pa.ipc.new_file(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.write(_checksum(path, file, file.tell()))
        sync(partial)
        partial.replace(path)
    finally:
        # An error in the data, or an interruption, leaves it.
        partial.unlink(missing_ok=True)
    table = _read(path)
    if table is None:
        raise BaditError(f"{path}: differs from what was written; check the disk")
    return table


def _checksum(path: Path, file: BinaryIO, size: int) -> bytes:
    """Returns the checksum of a cache file's name and of its first ``size`` bytes.

    The file is then at position ``size``.
    """
    checksum = xxhash.xxh3_128(path.name.encode())
    file.seek(0)
    for start in range(0, size, _CHUNK):
        checksum.update(file.read(min(_CHUNK, size - start)))
    return checksum.digest()


def _make_private(folder: Path) -> None:
    """Creates a folder that only its owner can use. BaditError if it is another user's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for status in (folder.lstat(), folder.stat()):  # a link, and its target
        _refuse_foreign(folder, status)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    """Raises BaditError for a file of another user, whose content could be chosen to do harm."""
    if status.st_uid not in (os.geteuid(), 0):
        raise BaditError(
            f"{path}: belongs to another user; set BADIT_CACHE to a folder of your own"
        )
