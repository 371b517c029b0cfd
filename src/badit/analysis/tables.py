"""The tables of an analysis: one DataFrame per measurement, one JSON file per table.

Every table is declared once, as a :class:`Table` next to the function that measures it. The declaration documents the
columns, and a loaded file, which may come from another machine or another version, is checked against it.

A frame's ``attrs`` hold ``name``, ``about`` (what was measured, how, on how much data) and ``columns`` (name → meaning,
with the unit). A file holds the same, ``format``, and ``rows``, a list of lists in the order of the columns. A number
that is not defined is NaN in a frame and null in a file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, Strict, TypeAdapter, ValidationError, model_validator

from badit.errors import BaditError, explained
from badit.files import read_json, refuse_other_format, write_text

FORMAT = 1
# Experts and numbers of tasks become the sides of a figure, so they have bounds.
MAX_EXPERTS = 1024
# The columns that name tasks, in any table.
TASK_COLUMNS = ("task", "task_a", "task_b", "trained_task")
_AGAIN = "make the table again with: badit analyze"


class Kind(NamedTuple):
    """What a column holds: in words, as the type that a file's values are checked against, and as a dtype."""

    words: str
    values: TypeAdapter
    dtype: str | None = None


_Whole = Annotated[int, Strict(), Field(ge=-(2**53), le=2**53)]
_Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
_Expert = Annotated[int, Strict(), Field(ge=0, lt=MAX_EXPERTS)]
_Counted = Annotated[int, Strict(), Field(ge=0, le=2**53)]
TEXT = Kind("text", TypeAdapter(list[Annotated[str, Strict()]]), "str")
NUMBER = Kind("a number", TypeAdapter(list[_Finite | None]), "float64")
COUNT = Kind("a whole number or null", TypeAdapter(list[_Whole | None]))
INDEX = Kind("a whole number", TypeAdapter(list[_Whole]), "int64")
EXPERT = Kind(f"an expert's number, from 0 to {MAX_EXPERTS - 1}", TypeAdapter(list[_Expert]), "int64")
# There is a row for every number of tasks, so none is larger than the number of rows.
SHARING = Kind("a number of tasks that has its row", TypeAdapter(list[_Counted]), "int64")


class Column(NamedTuple):
    """A column's meaning, with its unit, and kind."""

    meaning: str
    kind: Kind = NUMBER


TASK = Column("the task's name", TEXT)
TASK_A, TASK_B = Column("a task's name", TEXT), Column("another's, later in the alphabet", TEXT)
LAYER = Column("index of the transformer layer, from 0", INDEX)
MODULE = Column("the adapted module's name below its layer", TEXT)
EXPERT_NUMBER = Column("the expert, counted from 0", EXPERT)

TABLES: dict[str, Table] = {}


class Table:
    """The declaration of a table; :data:`TABLES` has it by its name from then on."""

    def __init__(self, name: str, **columns: Column) -> None:
        self.name, self.columns = name, columns
        TABLES[name] = self

    def frame(self, rows: Any, about: str) -> pd.DataFrame:
        """A frame of this table.

        Args:
            rows: tuples in the order of the columns, or anything else that a DataFrame can be made of.
            about: how it was measured, in sentences for a reader who has only the table.
        """
        frame = pd.DataFrame(rows, columns=list(self.columns))
        for name, column in self.columns.items():
            values = frame[name].astype(column.kind.dtype or ("float64" if frame[name].hasnans else "int64"))
            frame[name] = values.where(np.isfinite(values)) if column.kind is NUMBER else values
        columns = {name: column.meaning for name, column in self.columns.items()}
        frame.attrs = {"name": self.name, "about": about, "columns": columns}
        return frame


def save_frame(frame: pd.DataFrame, folder: Path) -> Path:
    """Writes ``FOLDER/NAME.json``, numbers with six digits."""
    folder.mkdir(parents=True, exist_ok=True)
    table = TABLES[frame.attrs["name"]]
    path = folder / f"{table.name}.json"
    values = [_json_values(frame[name].tolist(), column.kind) for name, column in table.columns.items()]
    # One line per row: a diff of two measurements is then readable.
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in zip(*values, strict=True))
    head = {"format": FORMAT, **{key: frame.attrs[key] for key in ("name", "about", "columns")}}
    text = json.dumps(head, indent=1, ensure_ascii=False)
    write_text(path, f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def _json_values(values: list[Any], kind: Kind) -> list[Any]:
    if kind is TEXT:
        return values
    if kind is NUMBER:
        return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
    return [int(value) if math.isfinite(value) else None for value in values]


def load_frame(path: Path) -> pd.DataFrame:
    """Reads and checks a table, whose file has the table's name.

    Raises:
        BaditError: it is missing or damaged, is another table, a column is missing, or a value is of another kind.
    """
    content = read_json(path)
    refuse_other_format(content, path, FORMAT)
    with explained(path, fix=_AGAIN):
        file = _File.model_validate(content)
    if file.name != path.stem or file.name not in TABLES:
        raise BaditError(f"{path}: holds the table {file.name!r:.60}; {_AGAIN}")
    table = TABLES[file.name]
    if missing := [name for name in table.columns if name not in file.columns]:
        raise BaditError(f"{path}: has no column {missing[0]!r}; {_AGAIN}")
    by_name = zip(file.columns, map(list, zip(*file.rows, strict=True)), strict=True)
    values = dict(by_name) if file.rows else {name: [] for name in table.columns}
    for name, column in table.columns.items():
        row = _first_wrong(values[name], column.kind)
        if row is not None:
            raise BaditError(f"{path}: {name} of row {row + 1} must be {column.kind.words}; {_AGAIN}")
    for row, (a, b) in enumerate(zip(values.get("task_a", []), values.get("task_b", []), strict=True), start=1):
        if a == b:
            raise BaditError(f"{path}: row {row} pairs a task with itself; {_AGAIN}")
    frame = table.frame(values, file.about)
    frame.attrs["columns"] = {name: file.columns[name] for name in table.columns}
    return frame


def load_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """All tables of a folder, sorted by name.

    Raises:
        BaditError: one of them is damaged.
    """
    return {name: load_frame(folder / f"{name}.json") for name in sorted(TABLES) if (folder / f"{name}.json").is_file()}


class _File(BaseModel):
    name: str
    about: str
    columns: dict[str, str]
    rows: list[list[Any]]

    @model_validator(mode="after")
    def _rectangular(self) -> _File:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError("a row has another number of values than there are columns")
        return self


def _first_wrong(values: list[Any], kind: Kind) -> int | None:
    """The index of the first value that is not of this kind."""
    try:
        kind.values.validate_python(values)
    except ValidationError as error:
        return int(error.errors(include_url=False, include_input=False)[0]["loc"][0])
    return next((i for i, value in enumerate(values) if kind is SHARING and value > len(values)), None)
