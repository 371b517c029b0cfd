"""Broken results files, through ``badit table`` and ``badit analyze``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.command import cases, ends_well
from fuzz.damage import REPLACEMENTS, as_json, damaged
from report.samples import Shape, comparison_cell

_SHAPE = Shape(tasks=("task1_a", "task2_b"))
_TRANSFER = {"forgetting": 1.5, "backward_transfer": -2.0, "forward_transfer": 0.25}
_CELLS = [comparison_cell(_SHAPE, method, seed, 20.0 + seed) for method in ("lora", "badit") for seed in (0, 1)]
_CELLS += [{**copy.deepcopy(_CELLS[0]), "method": "lora, one model a task"}]
_CELLS += [{**_CELLS[0], "seed": 7, "status": "failed", "error": "out of\nmemory", "scores": None, "instances": None}]
MIXED: dict[str, Any] = {
    "format": 1,
    "protocol": "mixed",
    "reference": "lora",
    "methods": ["lora", "badit", "lora, one model a task"],
    "cells": _CELLS,
}
SEQUENTIAL: dict[str, Any] = {
    **MIXED,
    "protocol": "sequential",
    "cells": [
        {**cell, "order": "sapt-1", "continual": {"standard": _TRANSFER, "released": _TRANSFER}} for cell in _CELLS
    ],
}
PROTOCOLS = {"mixed": MIXED, "sequential": SEQUENTIAL}
FORMATS = ("text", "markdown", "latex", "csv")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_results_are_valid_before_they_are_broken(tmp_path: Path, protocol: str) -> None:
    (tmp_path / "results.json").write_bytes(as_json(PROTOCOLS[protocol]))
    assert all(ends_well("table", str(tmp_path), "--format", form) for form in FORMATS)
    assert ends_well("table", str(tmp_path), "--by-task")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@cases(60)
@given(data=st.data(), form=st.sampled_from(FORMATS), by_task=st.booleans())
def test_broken_results(tmp_path: Path, protocol: str, data: st.DataObject, form: str, by_task: bool) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(data.draw(damaged(PROTOCOLS[protocol], as_json)))
    ends_well("table", str(file), "--format", form, *(["--by-task"] if by_task else []))


@cases(10)
@given(data=st.data())
def test_broken_results_analysed(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "results.json").write_bytes(data.draw(damaged(MIXED, as_json)))
    (tmp_path / "report.html").unlink(missing_ok=True)
    done = ends_well("analyze", str(tmp_path))
    assert (tmp_path / "report.html").exists() == done


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_something_else_in_the_files_place(tmp_path: Path, replace: Callable[[Path], None]) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(as_json(MIXED))
    replace(file)
    ends_well("table", str(tmp_path))
    ends_well("table", str(file))
