"""Reads tasks from datasets that ``save_to_disk`` wrote or that are on the hub.

No dataset scripts are run.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from badit.data.records import Row, build_tasks
from badit.data.rows import PlacedRows, read_rows
from badit.data.source import Source
from badit.data.tasks import Split, Task
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import inside, read_json

# Any other type of column, such as Image, has values that may name any file or URL.
_OTHER_TYPE = re.compile(r"\b(?!(Value|ClassLabel|List|LargeList|Json)\()\w+\(")


def read_dataset(source: Source, path: Path) -> list[Task]:
    """Reads the tasks of a saved dataset, or of one on the hub. Its splits are mapped by name."""
    from datasets import Dataset, utils

    utils.logging.disable_progress_bar()
    load = _saved_dataset if path.is_dir() else _hub_dataset
    dataset = load(source)
    # A dataset without named splits can have a column ``split``.
    splits: list[tuple[Any, Split | None, str]] = [(dataset, None, str(source.path))]
    if not isinstance(dataset, Dataset):
        splits = [
            (dataset[name], source.split_of(name), f"{source.path}: {name}")
            for name in _split_names(source, [*map(str, dataset)])
        ]
    # The path may be ".", and the name of a dataset may have a configuration (org/name:CONFIG).
    task = source.task or os.path.basename(os.path.abspath(path)).partition(":")[0]

    def rows() -> Iterator[Row]:
        for dataset, split, place in splits:
            placed = rows_of_dataset(dataset, place)
            yield from read_rows(placed, source, task, split, strict=False)

    # The Arrow files of the dataset, by which the cache knows whether the data has changed.
    tables = [Path(file["filename"]) for dataset, *_ in splits for file in dataset.cache_files]
    # The columns' types and labels are in JSON files next to the tables.
    descriptions = [file for table in tables for file in sorted(table.parent.glob("*.json"))]
    return build_tasks(source, [*tables, *descriptions], rows())


def rows_of_dataset(dataset: Any, place: str, first: int = 1) -> PlacedRows:
    """Yields the place and the values of each row, with the values that other files have.

    ``first`` is the number of the first row.

    Class labels become their names; NaN and an absent label (−1) become None. Columns of images,
    audio and video are left out, also those within other columns.
    """
    from datasets.features.features import require_decoding

    features = getattr(dataset, "features", None) or {}
    labels = {name: kind.names for name, kind in features.items() if hasattr(kind, "int2str")}
    plain = [
        name
        for name, kind in features.items()
        if not (require_decoding(kind) and _OTHER_TYPE.search(str(kind)))
    ]
    if len(plain) < len(features):
        dataset = dataset.select_columns(plain)

    with explained(place, action="read", any_error=True):
        # Arrow reads damaged values out of bounds.
        dataset.data.validate(full=True)
        for number, row in enumerate(dataset, start=first):
            for name, value in row.items():
                if value is None:
                    continue
                # Only NaN differs from itself.
                if value != value or (name in labels and value < 0):
                    row[name] = None
                elif name in labels:
                    row[name] = labels[name][value]
            yield f"{place}: row {number}", row


def _saved_dataset(source: Source) -> Any:
    from datasets import load_from_disk

    folder = Path(source.path)
    with explained(folder, action="read", any_error=True):
        for file in folder.rglob("dataset_info.json"):
            read_json(file)  # so that an error names the file
        # load_from_disk would read any file that these two name.
        for file in (*folder.rglob("dataset_dict.json"), *folder.rglob("state.json")):
            content = read_json(file)
            names = [entry["filename"] for entry in content.get("_data_files", ())]
            for name in (*content.get("splits", ()), *names):
                path = inside(folder, file.parent / name)
                # A pipe would block.
                if not path.is_dir() and not path.is_file():
                    raise BaditError(
                        f"{path}: is missing, or not a regular file; save the dataset again"
                    )
        # The saved format can be that of torch, whose rows have tensors instead of plain values.
        return load_from_disk(str(folder)).with_format(None)


def _hub_dataset(source: Source) -> Any:
    from datasets import load_dataset

    name, _, configuration = str(source.path).partition(":")
    with explained(
        f"{source.path}: no such file or folder",
        action="loaded from the hub",
        fix="give the path of a file or folder, 'builtin', or the name of a dataset on the hub",
        any_error=True,
    ):
        return load_dataset(name, configuration or None)


def _split_names(source: Source, names: list[str]) -> list[str]:
    """Returns the names of the splits to read; BaditError if a split is absent or unknown."""
    for name in source.splits:
        refuse_unknown(f"{source.path}: data.splits", name, names)
    if source.splits:
        return [name for name in names if name in source.splits]

    for name in names:
        # The only split of a dataset may have any name.
        if len(names) > 1 and not source.split_of(name):
            raise BaditError(
                f"{source.path}: unknown split {name!r:.60}; found: {', '.join(names)}; "
                f"choose the splits to read, such as data.splits.{name}=train"
            )
    return names
