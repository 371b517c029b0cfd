"""The tables of an analysis: one DataFrame per measurement, one JSON file per table.

A loaded file, which may come from elsewhere, is checked against its :class:`Table`. A frame's ``attrs`` hold ``name``,
``about`` (what was measured, how, on how much data) and ``columns`` (name -> meaning, with the unit). A file holds the
same, ``format`` and ``rows``; null stands for NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, Strict, create_model

from badit.errors import explained
from badit.files import read_json, refuse_other_format, write_text

FORMAT = 1

# The kinds of columns, as types that a file's values are checked against.
TEXT = Annotated[str, Strict()]
NUMBER = Annotated[float, Strict(), Field(allow_inf_nan=False)] | None
INDEX = Annotated[int, Strict(), Field(ge=-(2**53), le=2**53)]
COUNT = INDEX | None
EXPERT = Annotated[int, Strict(), Field(ge=0, lt=1024)]  # bounded, since experts become the sides of a figure


class Column(NamedTuple):
    """A column's meaning, with its unit, and kind."""

    meaning: str
    kind: Any = NUMBER


SHARED = {
    "task": Column("the task's name", TEXT),
    "task_a": Column("a task's name", TEXT),
    "task_b": Column("another's, later in the alphabet", TEXT),
    "layer": Column("index of the transformer layer, from 0; of gradients, −1 for parameters of no layer", INDEX),
    "module": Column('name below the layer, such as mlp.gate_proj; with ".adapter" for the adapter on it', TEXT),
    "expert": Column("the expert, counted from 0", EXPERT),
    "kind": Column('"neurons", "parameters" (rows of weight matrices) or "experts"', TEXT),
    "parameters": Column('"weights" (of the linear layers) or "adapter"; without a module, all together', TEXT),
    "cosine": Column("cosine of the two tasks' gradients"),
    "magnitude_similarity": Column("2|a||b| / (|a|² + |b|²) of the two gradients: 1 for equal norms"),
    "reliability": Column("cosine between gradients on two halves of a task's instances: how little of them is noise"),
}

TABLES: dict[str, Table] = {}


class Table:
    """The declaration of a table, next to the function that measures it; :data:`TABLES` holds it by its name.

    Its columns are those of :data:`SHARED` named in ``shared``, then ``columns``, where a text is a number's meaning.
    """

    def __init__(self, name: str, shared: str = "", **columns: Column | str) -> None:
        own = {column: Column(each) if isinstance(each, str) else each for column, each in columns.items()}
        self.name, self.columns = name, {column: SHARED[column] for column in shared.split()} | own
        fields: dict[str, Any] = {column: (list[kind], ...) for column, (_, kind) in self.columns.items()}
        self.values = create_model(name, **fields)
        TABLES[name] = self

    def frame(self, rows: Any, about: str) -> pd.DataFrame:
        """A frame of this table, from anything that a DataFrame can be made of; ``about`` says how it was measured."""
        frame = pd.DataFrame(rows, columns=list(self.columns))
        for name, (_, kind) in self.columns.items():
            if kind is NUMBER:
                values = frame[name].astype("float64")
                frame[name] = values.where(np.isfinite(values))
            else:
                frame[name] = frame[name].astype("str" if kind is TEXT else "float64" if frame[name].hasnans else int)
        frame.attrs = {"name": self.name, "about": about, "columns": {n: c.meaning for n, c in self.columns.items()}}
        return frame

    def checked(self, rows: Any, about: str, columns: Iterable[str] = ()) -> pd.DataFrame:
        """:meth:`frame` of rows from a file, with these columns, whose values are checked against the declaration."""
        found = pd.DataFrame(rows, columns=list(columns or self.columns), dtype=object).to_dict("list")
        return self.frame(self.values.model_validate(found).model_dump(), about)


def save_frame(frame: pd.DataFrame, folder: Path) -> Path:
    """Writes ``FOLDER/NAME.json``, one line per row, numbers with six digits."""
    folder.mkdir(parents=True, exist_ok=True)
    table = TABLES[frame.attrs["name"]]
    path = folder / f"{table.name}.json"

    def plain(value: Any, kind: Any) -> str | float | int | None:
        if kind is TEXT or not math.isfinite(value):
            return value if kind is TEXT else None
        return float(f"{value:.6g}") if kind is NUMBER else int(value)

    columns = [[plain(value, kind) for value in frame[name]] for name, (_, kind) in table.columns.items()]
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in zip(*columns, strict=True))
    head = json.dumps({"format": FORMAT, **frame.attrs}, indent=1, ensure_ascii=False)
    write_text(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def load_frame(path: Path) -> pd.DataFrame:
    """Reads and checks a table, whose file has the table's name; a BaditError says what is missing or damaged."""
    content = read_json(path)
    refuse_other_format(content, path, FORMAT)
    with explained(path, fix="make the table again with: badit analyze", any_error=True):
        return TABLES[path.stem].checked(content["rows"], content["about"], content["columns"])


def load_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """All tables of a folder, sorted by name."""
    return {name: load_frame(folder / f"{name}.json") for name in sorted(TABLES) if (folder / f"{name}.json").is_file()}


def layer_and_module(name: str) -> tuple[int, str]:
    """A module's columns "layer" and "module": its transformer layer, −1 outside of them, and the name below it."""
    parts = [part for part in name.split(".") if part != "base_layer"]
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if layer is None:
        return -1, ".".join(dropwhile(lambda part: part in ("base_model", "model"), parts))
    return int(parts[layer]), ".".join(parts[layer + 1 :])
