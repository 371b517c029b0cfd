"""A table's file: what is read is what was written, and another format is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from badit.analysis.tables import FORMAT, TidyTable
from badit.errors import BaditError

TABLE = TidyTable("gates", "About.", {"task": "a name", "mean": "a number"}, [["a", 1.5], ["b", None]])


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert TidyTable.load(TABLE.save(tmp_path)).records() == TABLE.records()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT + 1, r"format: is 2, this badit reads 1: pip install --upgrade badit"),
        (0, "format: must be 1, not 0; make the file anew"),
        (None, "format: must be 1, not None"),
        (True, "format: must be 1, not True"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, version: Any, message: str) -> None:
    path = TABLE.save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": version}))
    with pytest.raises(BaditError, match=message):
        TidyTable.load(path)
