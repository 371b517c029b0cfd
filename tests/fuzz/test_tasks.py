"""Broken task files of every layout, through ``badit tasks``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.command import cases, ends_well
from fuzz.damage import REPLACEMENTS, as_json, as_lines, damaged, damaged_bytes

LINES = [
    {"task": task, "instruction": f"Name the {task}.", "input": f"land {i}", "output": f"{task} {i}", "split": split}
    for task in ("capital", "river")
    for i, split in enumerate(["train", "train", "validation", "test"])
]
LINES[0] |= {"id": "first", "outputs": ["a", "b"]}
del LINES[0]["output"]
OFFICIAL: dict[str, Any] = {
    "Contributors": ["A"],
    "Definition": ["Say it."],
    "Categories": ["Question Answering"],
    "Domains": ["News"],
    "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
    "Negative Examples": [],
    "Instances": [{"id": f"task1-{i}", "input": f"in {i}", "output": [f"out {i}"]} for i in range(3)],
}
SPLITS = {split: [line for line in LINES if line["split"] == split] for split in ("train", "validation", "test")}

# Layout -> its valid files: path -> (value, form).
LAYOUTS: dict[str, dict[str, tuple[Any, Callable[[Any], bytes]]]] = {
    "one file": {"tasks.jsonl": (LINES, as_lines)},
    "a file a split": {f"{split}.jsonl": (lines, as_lines) for split, lines in SPLITS.items()},
    "sapt": {f"task1_a/{split}.json": (OFFICIAL, as_json) for split in ("train", "test")},
    "superni": {"tasks/task1_a.json": (OFFICIAL, as_json), "tasks/task2_b.json": (OFFICIAL, as_json)},
    "superni with lists": {
        "tasks/task1_a.json": (OFFICIAL, as_json),
        "splits/default/train_tasks.txt": ("task1_a\n", str.encode),
        "splits/default/test_tasks.txt": ("", str.encode),
    },
}
FILES = [(layout, file) for layout, files in LAYOUTS.items() for file in files]


def write(folder: Path, layout: str) -> Path:
    """The layout's valid files in a folder that had something else; and what `badit tasks` is to be given."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, (value, form) in LAYOUTS[layout].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(form(value))
    return folder / "tasks.jsonl" if layout == "one file" else folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_are_valid_before_they_are_broken(tmp_path: Path, layout: str) -> None:
    assert ends_well("tasks", str(write(tmp_path / "data", layout)))


@pytest.mark.parametrize(("layout", "file"), FILES)
@cases(40)
@given(data=st.data())
def test_broken_files(tmp_path: Path, layout: str, file: str, data: st.DataObject) -> None:
    source = write(tmp_path / "data", layout)
    value, form = LAYOUTS[layout][file]
    content = damaged(value, form) if not isinstance(value, str) else damaged_bytes(value.encode())
    (tmp_path / "data" / file).write_bytes(data.draw(content))
    ends_well("tasks", str(source))


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize(("layout", "file"), FILES)
def test_something_else_in_a_files_place(
    tmp_path: Path, layout: str, file: str, replace: Callable[[Path], None]
) -> None:
    source = write(tmp_path / "data", layout)
    replace(tmp_path / "data" / file)
    ends_well("tasks", str(source))


NAMES = ["two\nlines", "\x1b[2J", "é" * 110, "$HOME", "-", "CON", " ", ".hidden", "\u202e", "\u2028"]


@pytest.mark.parametrize("name", [*NAMES, "x" * 300, "..", "../x", "/x", "a/b", "a\\b", "", "\0"])
def test_names_that_are_no_tasks(tmp_path: Path, name: str) -> None:
    source = tmp_path / "tasks.jsonl"
    source.write_bytes(as_lines([{**line, "task": name} for line in LINES]))
    ends_well("tasks", str(source))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("layout", "file"), [("sapt", "task1_a"), ("superni", "tasks/task1_a.json")])
def test_names_of_files_that_are_no_tasks(tmp_path: Path, layout: str, file: str, name: str) -> None:
    old = write(tmp_path / "data", layout) / file
    old.rename(old.with_name(name + old.suffix))
    ends_well("tasks", str(tmp_path / "data"))


@pytest.mark.parametrize("filler", ["x", "\n", " ", "[", "0", '"'])
@pytest.mark.parametrize("layout", ["sapt", "one file"])
def test_ten_megabytes(tmp_path: Path, layout: str, filler: str) -> None:
    source = write(tmp_path / "data", layout)
    file = source if layout == "one file" else source / "task1_a" / "train.json"
    file.write_bytes(file.read_bytes() + filler.encode() * 10_000_000)
    ends_well("tasks", str(source))


def test_ten_megabytes_of_answer(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({**LINES[1], "output": "word " * 2_000_000}) + "\n")
    assert ends_well("tasks", str(path))
