"""Table files: round trip, format of numbers, and refusal of missing columns and wrong values."""

import json

import numpy as np
import pytest
from pandas.testing import assert_frame_equal

from badit.analysis.tables import (
    COUNT,
    EXPERT,
    INDEX,
    NUMBER,
    TABLES,
    TEXT,
    load_frame,
    load_frames,
    save_frame,
)
from refusals import refuses

KINDS = [NUMBER, COUNT, EXPERT, INDEX, TEXT]
VALUES = [[0.123456789, np.nan], [3, None], [0, 1023], [-1, 7], ["a", "b"]]


def table(name):
    """Returns a frame with two rows of values of each column's kind."""
    rows = {column: VALUES[KINDS.index(kind)] for column, (_, kind) in TABLES[name].columns.items()}
    return TABLES[name].frame(rows, f"About {name}.")


@pytest.mark.parametrize("name", TABLES)
def test_round_trip_and_missing_columns_are_refused(tmp_path, name):
    frame = table(name)
    path = save_frame(frame, tmp_path)
    loaded = load_frame(path)
    assert_frame_equal(loaded, frame, rtol=1e-5)
    assert loaded.attrs == frame.attrs
    content = json.loads(path.read_text())
    assert list(content) == ["format", "name", "about", "columns", "rows"]
    for i, column in enumerate(content["columns"]):
        columns = {key: meaning for key, meaning in content["columns"].items() if key != column}
        rows = [row[:i] + row[i + 1 :] for row in content["rows"]]
        path.write_text(json.dumps({**content, "columns": columns, "rows": rows}))
        refuses(
            f"{column}: field required; make the table again with: badit analyze", load_frame, path
        )


def test_columns_that_a_table_no_longer_has_are_ignored(tmp_path):
    path = save_frame(table("gates"), tmp_path)
    content = json.loads(path.read_text())
    content["columns"]["std"] = "standard deviation"
    rows = [[*row, 0.1] for row in content["rows"]]
    path.write_text(json.dumps({**content, "rows": rows}))
    assert_frame_equal(load_frame(path), table("gates"), rtol=1e-5)


def test_numbers_have_six_digits_and_undefined_numbers_are_null(tmp_path):
    values = [1.23456789, 100, np.inf, np.nan]
    rows = [("a", i, "m", 2, value) for i, value in enumerate(values)]
    path = save_frame(TABLES["gates"].frame(rows, ""), tmp_path)
    assert [row[-1] for row in json.loads(path.read_text())["rows"]] == [1.23457, 100, None, None]
    save_frame(TABLES["gate_similarity"].frame([], "a single task"), tmp_path)
    lengths = {name: len(frame) for name, frame in load_frames(tmp_path).items()}
    assert lengths == {"gate_similarity": 0, "gates": 4}


def test_errors_name_the_column_and_row_of_a_wrong_value(tmp_path):
    path = save_frame(table("gates"), tmp_path)
    wrong = {
        "mean": ["1.0", True, np.nan],
        "expert": [1.5, -1, 10**9],
        "layer": [None, 10**20],
        "task": [None],
    }
    for column, value in ((column, value) for column, values in wrong.items() for value in values):
        content = json.loads(save_frame(table("gates"), tmp_path).read_text())
        content["rows"][1][list(content["columns"]).index(column)] = value
        path.write_text(json.dumps(content))
        refuses(rf"gates\.json: {column}\.1: input should be", load_frame, path)
