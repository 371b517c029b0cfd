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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
from pydantic import BaseModel, Field, Strict, TypeAdapter, ValidationError, model_validator

from badit.errors import BaditError
from badit.files import read_json, refuse_other_format, write_text

FORMAT = 1
# Experts and numbers of tasks become the sides of a figure, so their numbers have bounds.
MAX_EXPERTS = 1024
# The columns that name tasks, in any table.
TASK_COLUMNS = ("task", "task_a", "task_b", "trained_task")
_AGAIN = "make the table again with: badit analyze"


class Kind(NamedTuple):
    """What a column's values may be: in words, as a type that a file's values are checked against, as a dtype."""

    words: str
    values: TypeAdapter
    dtype: str | None = None


_Whole = Annotated[int, Strict(), Field(ge=-(2**53), le=2**53)]
TEXT = Kind("text", TypeAdapter(list[Annotated[str, Strict()]]), "str")
NUMBER = Kind("a number", TypeAdapter(list[Annotated[float, Strict(), Field(allow_inf_nan=False)] | None]), "float64")
COUNT = Kind("a whole number or null", TypeAdapter(list[_Whole | None]))
INDEX = Kind("a whole number", TypeAdapter(list[_Whole]), "int64")
EXPERT = Kind(
    f"an expert's number, from 0 to {MAX_EXPERTS - 1}",
    TypeAdapter(list[Annotated[int, Strict(), Field(ge=0, lt=MAX_EXPERTS)]]),
    "int64",
)
# There is a row for every number of tasks, so none is larger than the number of rows.
SHARING = Kind(
    "a number of tasks that has its row", TypeAdapter(list[Annotated[int, Strict(), Field(ge=0, le=2**53)]]), "int64"
)


class Column(NamedTuple):
    meaning: str
    kind: Kind = NUMBER


# Columns of many tables.
EXPERT_NUMBER = Column("the expert, counted from 0", EXPERT)
LAYER = Column("index of the transformer layer, from 0", INDEX)
MODULE = Column("the adapted module's name below its layer", TEXT)
TASK = Column("the task's name", TEXT)
TASK_A, TASK_B = Column("a task's name", TEXT), Column("another's, later in the alphabet", TEXT)

TABLES: dict[str, Table] = {}


@dataclass(frozen=True)
class Table:
    """The declaration of a table, which is found by its name in :data:`TABLES` from then on."""

    name: str
    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        TABLES[self.name] = self

    def frame(self, rows: Any, about: str) -> pd.DataFrame:
        """A frame of this table.

        Args:
            rows: lists in the order of the columns, or anything else that a DataFrame can be made of.
            about: how it was measured, in sentences for a reader who has only the table.
        """
        frame = pd.DataFrame(rows, columns=list(self.columns))
        for name, column in self.columns.items():
            dtype = column.kind.dtype or ("float64" if frame[name].hasnans else "int64")
            frame[name] = frame[name].astype(dtype)
        columns = {name: column.meaning for name, column in self.columns.items()}
        frame.attrs = {"name": self.name, "about": about, "columns": columns}
        return frame


def save_frame(frame: pd.DataFrame, folder: Path) -> Path:
    """Writes ``FOLDER/NAME.json``, numbers with six digits."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{frame.attrs['name']}.json"
    table = TABLES[frame.attrs["name"]]
    values = [_written(frame[name], column.kind) for name, column in table.columns.items()]
    # One line per row: a diff of two measurements is then readable.
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in zip(*values, strict=True))
    head = {"format": FORMAT, **{key: frame.attrs[key] for key in ("name", "about", "columns")}}
    text = json.dumps(head, indent=1, ensure_ascii=False)
    write_text(path, f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def load_frame(path: Path) -> pd.DataFrame:
    """Reads and checks a table, whose file has the table's name.

    Raises:
        BaditError: it is missing or damaged, is another table, a column is missing, or a value is of another kind.
    """
    content = read_json(path)
    refuse_other_format(content, path, FORMAT)
    try:
        file = _File.model_validate(content)
    except ValidationError:
        raise BaditError(f"{path}: holds no table; {_AGAIN}") from None
    if file.name != path.stem or file.name not in TABLES:
        raise BaditError(f"{path}: holds the table {file.name!r:.60}; {_AGAIN}")
    table = TABLES[file.name]
    if missing := [name for name in table.columns if name not in file.columns]:
        raise BaditError(f"{path}: has no column {missing[0]!r}; {_AGAIN}")
    values = dict(zip(file.columns, zip(*file.rows, strict=True), strict=True)) if file.rows else {}
    for name, column in table.columns.items() if values else ():
        row = _first_wrong(list(values[name]), column.kind)
        if row is not None:
            raise BaditError(f"{path}: {name} of row {row + 1} must be {column.kind.words}; {_AGAIN}")
    frame = table.frame(values, file.about)
    frame.attrs["columns"] = {name: file.columns[name] for name in table.columns}
    if "task_a" in frame and (alike := frame.index[frame["task_a"] == frame["task_b"]]).size:
        raise BaditError(f"{path}: row {alike[0] + 1} pairs a task with itself; {_AGAIN}")
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


def _written(values: pd.Series, kind: Kind) -> list[Any]:
    """A column as JSON holds it."""
    if kind is TEXT:
        return values.tolist()
    if kind is NUMBER:
        return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
    return [int(value) if math.isfinite(value) else None for value in values.tolist()]


def _first_wrong(values: list[Any], kind: Kind) -> int | None:
    """The index of the first value that is not of this kind."""
    try:
        kind.values.validate_python(values)
    except ValidationError as error:
        return int(error.errors(include_url=False, include_input=False)[0]["loc"][0])
    too_large = [i for i, value in enumerate(values) if value > len(values)] if kind is SHARING else []
    return too_large[0] if too_large else None


# --- to be removed once every measurement returns a frame ---

Value = str | int | float | bool | None


@dataclass(frozen=True)
class TidyTable:
    """A measurement.

    Args:
        name: what the file is called.
        about: how it was measured, in sentences for a reader who has only the file.
        columns: what each column means, and its unit.
        rows: the values; None (in JSON null) where a number is not defined.
    """

    name: str
    about: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[Value]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise BaditError(f"table {self.name}: a row has {len(row)} values for {len(self.columns)} columns")

    def records(self) -> list[dict[str, Value]]:
        """The rows as dictionaries."""
        names = list(self.columns)
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def save(self, folder: Path) -> Path:
        """Writes ``FOLDER/NAME.json``; a number that is not finite becomes null."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        head = {"format": FORMAT, "name": self.name, "about": self.about, "columns": dict(self.columns)}
        # A line for each row: a diff of two measurements is then readable.
        rows = ",\n".join("  " + json.dumps([_plain(value) for value in row], ensure_ascii=False) for row in self.rows)
        text = json.dumps(head, indent=1, ensure_ascii=False)
        write_text(path, f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
        return path

    @classmethod
    def load(cls, path: Path) -> TidyTable:
        """Reads a table.

        Raises:
            BaditError: it is missing or damaged.
        """
        content = read_json(path)
        refuse_other_format(content, path, FORMAT)
        columns, rows = content.get("columns"), content.get("rows")
        text = [content.get("name"), content.get("about")]
        if not all(isinstance(value, str) for value in text) or not _is_columns(columns) or not _is_rows(rows):
            raise BaditError(f"{path}: is no table; make it anew with: badit analyze")
        try:
            return cls(content["name"], content["about"], content["columns"], content["rows"])
        except BaditError as error:
            raise BaditError(f"{path}: {error}") from None


def defined(number: float) -> float | None:
    """A table's value for a number: None where it is NaN or infinite."""
    return float(number) if math.isfinite(number) else None


def saved_tables(folder: Path) -> Iterator[TidyTable]:
    """All tables of a folder, sorted by name.

    Raises:
        BaditError: one of them is damaged.
    """
    for path in sorted(folder.glob("*.json")):
        yield TidyTable.load(path)


def _plain(value: Value) -> Value:
    return defined(float(f"{value:.6g}")) if isinstance(value, float) else value


def _is_columns(columns: Any) -> bool:
    return isinstance(columns, dict) and all(isinstance(meaning, str) for meaning in columns.values())


def _is_rows(rows: Any) -> bool:
    values = (value for row in rows for value in row) if isinstance(rows, list) and all(map(_is_row, rows)) else [[]]
    return all(value is None or isinstance(value, (str, int, float)) for value in values)


def _is_row(row: Any) -> bool:
    return isinstance(row, list)
