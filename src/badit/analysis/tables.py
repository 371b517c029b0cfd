"""The tables of an analysis: one DataFrame per measurement, one JSON file per table.

A loaded file may be untrusted, so it is checked against its :class:`Table`. A frame's ``attrs`` hold ``name``,
``about`` (what was measured, how, on how much data) and ``columns`` (name -> meaning, with the unit). A file holds the
same fields, ``format`` and ``rows``; null stands for NaN.
"""

import json
import math
from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, Strict, create_model

from badit.support.errors import explained
from badit.support.files import read_json, refuse_other_format, write_text

FORMAT = 1

# The kinds of columns: types that the values of a file are validated against.
TEXT = Annotated[str, Strict()]
NUMBER = Annotated[float, Strict(), Field(allow_inf_nan=False)] | None
INDEX = Annotated[int, Strict(), Field(ge=-(2**53), le=2**53)]
COUNT = INDEX | None
EXPERT = Annotated[
    int, Strict(), Field(ge=0, lt=1024)
]  # bounded: figures have a row or column per expert


class Column(NamedTuple):
    """A column's meaning, including its unit, and its kind."""

    meaning: str
    kind: Any = NUMBER


SHARED = {
    "task": Column("the task's name", TEXT),
    "task_a": Column("a task's name", TEXT),
    "task_b": Column("the name of another task, later in alphabetical order", TEXT),
    "layer": Column(
        "index of the transformer layer, from 0; −1 for an adapter's parameters outside the layers",
        INDEX,
    ),
    "module": Column(
        'name within the layer, such as mlp.gate_proj; the last part is "adapter" for an adapter',
        TEXT,
    ),
    "expert": Column("the expert, counted from 0", EXPERT),
    "kind": Column('"neurons", "parameters" (rows of weight matrices) or "experts"', TEXT),
    "parameters": Column(
        '"weights" (of the linear layers) or "adapter"; all modules together if none is named', TEXT
    ),
    "cosine": Column("cosine of the two tasks' gradients"),
    "magnitude_similarity": Column(
        "2|a||b| / (|a|² + |b|²) of the two gradients: 1 for equal norms"
    ),
    "reliability": Column(
        "cosine between the gradients of two halves of a task's instances; near 0 for pure noise"
    ),
}

TABLES: dict[str, "Table"] = {}


class Table:
    """Declares a table, next to the function that measures it, and registers it by name in :data:`TABLES`.

    ``first`` names the first columns in order; those not declared in ``columns`` are in :data:`SHARED`. The others of
    ``columns`` follow. A string declares a numeric column.
    """

    def __init__(self, name: str, first: str = "", **columns: Column | str) -> None:
        own = {
            column: Column(each) if isinstance(each, str) else each
            for column, each in columns.items()
        }
        self.name, self.columns = (
            name,
            {column: own.get(column) or SHARED[column] for column in first.split()} | own,
        )
        fields: dict[str, Any] = {
            column: (list[kind], ...) for column, (_, kind) in self.columns.items()
        }
        self.values = create_model(name, **fields)
        TABLES[name] = self

    def frame(self, rows: Any, about: str) -> pd.DataFrame:
        """Returns a frame of this table from any data that DataFrame accepts; ``about`` says how it was measured."""
        frame = pd.DataFrame(rows, columns=list(self.columns))
        for name, (_, kind) in self.columns.items():
            if kind is NUMBER:
                values = frame[name].astype("float64")
                frame[name] = values.where(np.isfinite(values))
            else:
                frame[name] = frame[name].astype(
                    "str" if kind is TEXT else "float64" if frame[name].hasnans else int
                )
        frame.attrs = {
            "name": self.name,
            "about": about,
            "columns": {n: c.meaning for n, c in self.columns.items()},
        }
        return frame

    def checked(self, rows: Any, about: str, columns: Iterable[str] = ()) -> pd.DataFrame:
        """Returns :meth:`frame` of a file's rows with these columns, after checking the values' types and ranges."""
        found = pd.DataFrame(rows, columns=list(columns or self.columns), dtype=object).to_dict(
            "list"
        )
        return self.frame(self.values.model_validate(found).model_dump(), about)


def save_frame(frame: pd.DataFrame, folder: Path) -> Path:
    """Writes ``FOLDER/NAME.json``, one line per row, numbers with six significant digits, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    table = TABLES[frame.attrs["name"]]
    path = folder / f"{table.name}.json"

    def plain(value: Any, kind: Any) -> str | float | int | None:
        if kind is TEXT or not math.isfinite(value):
            return value if kind is TEXT else None
        return float(f"{value:.6g}") if kind is NUMBER else int(value)

    columns = [
        [plain(value, kind) for value in frame[name]] for name, (_, kind) in table.columns.items()
    ]
    rows = ",\n".join(
        "  " + json.dumps(row, ensure_ascii=False) for row in zip(*columns, strict=True)
    )
    head = json.dumps({"format": FORMAT, **frame.attrs}, indent=1, ensure_ascii=False)
    write_text(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def load_frame(path: Path) -> pd.DataFrame:
    """Reads and checks a table, whose name is the file's name; BaditError if something is missing or damaged."""
    content = read_json(path)
    refuse_other_format(content, path, FORMAT)
    with explained(path, fix="make the table again with: badit analyze", any_error=True):
        return TABLES[path.stem].checked(content["rows"], content["about"], content["columns"])


def load_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """Reads all tables of a folder, sorted by name."""
    return {
        name: load_frame(folder / f"{name}.json")
        for name in sorted(TABLES)
        if (folder / f"{name}.json").is_file()
    }


def layer_and_module(name: str) -> tuple[int, str]:
    """Returns a module's columns "layer" (−1 outside the transformer layers) and "module" (its name in the layer)."""
    parts = [part for part in name.split(".") if part != "base_layer"]
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if layer is None:
        return -1, ".".join(dropwhile(lambda part: part in ("base_model", "model"), parts))
    return int(parts[layer]), ".".join(parts[layer + 1 :])
