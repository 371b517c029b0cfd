"""Tidy tables: one measurement a row, every column explained, one JSON file a table.

A file holds ``format``, ``name``, ``about`` (what was measured, how, on how much data), ``columns`` (name → meaning,
with the unit) and ``rows``, a list of lists in the order of the columns. A notebook reads it in one line:

    pandas.DataFrame(content["rows"], columns=list(content["columns"]))
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from badit.errors import BaditError
from badit.files import read_json, refuse_other_format, write_text

FORMAT = 1
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
