"""The tables of an analysis: one DataFrame per measurement, one JSON file per table.

A loaded file may be untrusted, so it is checked against its :class:`Table`. A frame's ``attrs``
hold ``name``, ``about`` (what was measured, how, on how much data) and ``columns`` (name ->
meaning, with the unit). A file holds the same fields, ``format`` and ``rows``; null stands for NaN.
"""

import json
from collections.abc import Iterable, Sequence
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
# Within these bounds integers are exact as float64, the dtype of a column with missing values.
INDEX = Annotated[int, Strict(), Field(ge=-(2**53), le=2**53)]
COUNT = INDEX | None
# Bounded, because figures have a row or column per expert.
EXPERT = Annotated[int, Strict(), Field(ge=0, lt=1024)]


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
    """Declares a table, next to the function that measures it, and adds it to :data:`TABLES`.

    ``first`` names the first columns in order; those not declared in ``columns`` are in
    :data:`SHARED`. The others of ``columns`` follow. A string declares a numeric column.
    """

    def __init__(self, name: str, first: str = "", **columns: Column | str) -> None:
        self.name = name
        self.columns: dict[str, Column] = {}
        for column in dict.fromkeys([*first.split(), *columns]):
            # A column in both has its place from ``first`` and its meaning from ``columns``.
            declared = {**SHARED, **columns}[column]
            self.columns[column] = Column(declared) if isinstance(declared, str) else declared
        fields: dict[str, Any] = {
            column: (list[kind], ...) for column, (_, kind) in self.columns.items()
        }
        self.values = create_model(name, **fields)
        TABLES[name] = self

    def frame(self, rows: Any, description: str) -> pd.DataFrame:
        """Returns a frame of this table from any data that DataFrame accepts.

        ``description`` says how it was measured.
        """
        frame = pd.DataFrame(rows, columns=list(self.columns))
        for name, (_, kind) in self.columns.items():
            if kind is TEXT:
                frame[name] = frame[name].astype("str")
            # Columns of integers cannot hold missing values.
            elif kind is NUMBER or frame[name].hasnans:
                numbers = frame[name].astype("float64")
                frame[name] = numbers.where(np.isfinite(numbers))
            else:
                frame[name] = frame[name].astype(int)
        meanings = {name: meaning for name, (meaning, _) in self.columns.items()}
        frame.attrs = {"name": self.name, "about": description, "columns": meanings}
        return frame

    def checked(self, rows: Any, description: str, columns: Iterable[str] = ()) -> pd.DataFrame:
        """Returns :meth:`frame` of a file's rows, after checking the values' types and ranges."""
        columns = list(columns or self.columns)
        # Other dtypes would convert the values before their types are checked.
        values = pd.DataFrame(rows, columns=columns, dtype=object).to_dict("list")
        return self.frame(self.values.model_validate(values).model_dump(), description)


def save_frame(frame: pd.DataFrame, folder: Path) -> Path:
    """Writes ``FOLDER/NAME.json``, one line per row, and returns its path.

    Numbers have six significant digits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = TABLES[frame.attrs["name"]]
    path = folder / f"{table.name}.json"
    columns = [_plain_values(frame[name], kind) for name, (_, kind) in table.columns.items()]
    lines = [json.dumps(row, ensure_ascii=False) for row in zip(*columns, strict=True)]
    rows = ",\n".join(f"  {line}" for line in lines)
    head = json.dumps({"format": FORMAT, **frame.attrs}, indent=1, ensure_ascii=False)
    # The rows follow in place of the head's closing brace, each on a line of its own.
    write_text(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def _plain_values(column: Any, kind: Any) -> list[Any]:
    if kind is TEXT:
        return list(column)
    # json does not write numpy's integers.
    to_plain = _six_digits if kind is NUMBER else int
    return [to_plain(value) if np.isfinite(value) else None for value in column]


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def load_frame(path: Path) -> pd.DataFrame:
    """Reads and checks a table, whose name is the file's name.

    BaditError if something is missing or damaged. Columns that the table does not have are ignored.
    """
    content = read_json(path)
    refuse_other_format(content, path, FORMAT)
    with explained(path, fix="make the table again with: badit analyze", any_error=True):
        return TABLES[path.stem].checked(content["rows"], content["about"], content["columns"])


def load_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """Reads all tables of a folder, sorted by name."""
    paths = {name: folder / f"{name}.json" for name in sorted(TABLES)}
    return {name: load_frame(path) for name, path in paths.items() if path.is_file()}


def span(counts: Sequence[int]) -> str:
    """Returns counts as text: one number if all are equal, otherwise "MINIMUM to MAXIMUM"."""
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def layer_and_module(name: str) -> tuple[int, str]:
    """Returns a module's columns "layer" and "module", its name in the layer.

    The layer is −1 outside the transformer layers.
    """
    # PEFT inserts base_layer into names, but a module has the same name in all tables.
    words = [word for word in name.split(".") if word != "base_layer"]
    for position, word in enumerate(words):
        if word.isdigit():
            return int(word), ".".join(words[position + 1 :])
    # Without the prefixes that PEFT and transformers add to all names.
    return -1, ".".join(dropwhile(lambda word: word in ("base_model", "model"), words))
