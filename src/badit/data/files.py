"""Reads tasks from files of rows: JSON, JSONL, CSV, TSV, Parquet and Arrow."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from badit.data.datasets import rows_of_dataset
from badit.data.records import Row, build_tasks
from badit.data.rows import PlacedRows, read_rows
from badit.data.source import SUFFIXES, Source
from badit.data.tasks import SPLITS, Split, Task
from badit.support.errors import BaditError, explained
from badit.support.files import lines_of, parse_json, read_text

_ROWS_PER_BATCH = 1_000  # of a Parquet file


def read_files(source: Source, path: Path) -> list[Task]:
    """Reads the tasks of a file of rows, or of all such files of a folder or pattern."""
    if path.is_dir():
        suffixes = SUFFIXES
        if source.format != "auto":
            suffixes = (".jsonl",)
        files = files_in(path, suffixes, source)
    elif path.exists():
        # Other files have no rows.
        files = [file for file in (path,) if file.is_file() and file.suffix in SUFFIXES]
    else:
        matches = map(Path, glob(str(path), recursive=True))
        files = sorted(match for match in matches if match.is_file())
    return build_tasks(source, files, _rows(source, files))


def files_in(folder: Path, suffixes: Iterable[str], source: Source) -> list[Path]:
    """Returns the files with these suffixes.

    They are sorted by split (train, validation, test, none) and name.
    """
    files = [file for file in folder.iterdir() if file.suffix in suffixes and file.is_file()]
    splits = [*SPLITS, None]
    return sorted(files, key=lambda file: (splits.index(source.split_of_file(file)), file.name))


def starts_with_list(file: Path) -> bool:
    """Whether a file starts with a JSON list, so that it holds rows."""
    with explained(file, action="read"), file.open("rb") as stream:
        return stream.read(1024).lstrip()[:1] == b"["


def _rows(source: Source, files: Sequence[Path]) -> Iterator[Row]:
    """Yields the rows of files. Among several files, a name such as test.csv gives the split."""
    splits: dict[Path, Split | None] = dict.fromkeys(files)
    # A single file is a task of its own, even if it is named after a split.
    if len(files) > 1:
        splits = {file: source.split_of_file(file) for file in files}
    # With data.splits, names of files choose the files if any is named after a split.
    names_choose = source.splits and any(splits.values())

    origins: dict[str, Path] = {}
    for file, split in splits.items():
        if names_choose and not split:
            continue
        origin = file
        task = file.stem
        if split:
            origin = file.parent
            # The folder of a link, not of its target.
            task = os.path.basename(os.path.dirname(os.path.abspath(file)))
        # Other formats are often published datasets, with columns that badit does not need.
        strict = file.suffix in (".json", ".jsonl") and not source.columns
        for row in read_rows(values_of(file), source, task, split, strict=strict):
            # Only if the name of the file or folder has become the task.
            if row.task == task != source.task:
                # Else two files or folders of one name would become one task.
                other = origins.setdefault(task, origin)
                if other != origin:
                    raise BaditError(
                        f"{origin}: task '{task}' is also in {other}; rename one, or set data.task"
                    )
            yield row


def values_of(file: Path) -> PlacedRows:
    """Yields the place and the value of each row of a file."""
    if file.suffix in (".csv", ".tsv"):
        return _csv_values(file)
    if file.suffix in (".parquet", ".arrow"):
        return _table_values(file)
    return _json_values(file)


def _table_values(file: Path) -> PlacedRows:
    """Yields the rows of a Parquet or Arrow file."""
    from datasets import Dataset

    first = 1
    # A damaged file can raise any exception.
    with explained(file, action="read", any_error=True):
        for batch in _record_batches(file):
            dataset = Dataset(pa.Table.from_batches([batch]), fingerprint="unused")
            yield from rows_of_dataset(dataset, str(file), first)
            first += len(batch)


def _record_batches(file: Path) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            yield from table.iter_batches(_ROWS_PER_BATCH)
        return
    with pa.OSFile(str(file)) as stream:
        is_stream = stream.read(6) != b"ARROW1"  # the beginning of Arrow's other format
        stream.seek(0)
        if is_stream:
            yield from pa.ipc.open_stream(stream)
            return
        reader = pa.ipc.open_file(stream)
        yield from map(reader.get_batch, range(reader.num_record_batches))


def _csv_values(file: Path) -> PlacedRows:
    """Yields the rows of a CSV file, whose values stay text."""
    csv.field_size_limit(2**31 - 1)  # in characters; the default is 131,072
    quotes = 'write " within a value as "", and the value in quotes'
    with (
        explained(file, action="read", any_error=True),
        # Spreadsheets save CSV with a byte order mark. Line breaks may be within quotes.
        file.open(encoding="utf-8-sig", newline="") as stream,
    ):
        # Spreadsheets of some countries separate with semicolons.
        first_line = stream.readline()
        stream.seek(0)
        separator = ","
        if file.suffix == ".tsv":
            separator = "\t"
        elif ";" in first_line and "," not in first_line:
            separator = ";"
        reader = csv.DictReader(stream, delimiter=separator, strict=True)
        _refuse_repeated_columns(file, reader.fieldnames or ())
        try:
            for number, row in enumerate(reader, start=1):
                if None in row:
                    raise BaditError(
                        f"{file}: row {number} has more values than the first line has names; "
                        "quote values that contain the separator"
                    )
                # A quote that is not closed joins values.
                if separator == "\t" and any("\t" in value for value in row.values() if value):
                    raise BaditError(f"{file}: row {number} has a tab within quotes; {quotes}")
                yield f"{file}: row {number}", row
        except csv.Error as error:
            line = reader.line_num
            raise BaditError(f"{file}: after line {line}: {error}; {quotes}") from None


def _refuse_repeated_columns(file: Path, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1 and name:
            raise BaditError(
                f"{file}: column {name!r:.60} occurs {count} times; rename or remove the others"
            )


def _json_values(file: Path) -> PlacedRows:
    """Yields the items of a JSON list, or the values of lines."""
    if starts_with_list(file):
        for number, value in enumerate(parse_json(read_text(file), file=file), start=1):
            yield f"{file}: item {number}", value
        return
    for number, text in lines_of(file):
        if text.strip():
            yield f"{file}: line {number}", parse_json(text, file=file, first_line=number)
