"""Training, scoring, comparing and analysing give the recorded values (tests/golden.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import golden

KNOWN = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("name", golden.METHODS)
def test_a_training_gives_the_recorded_losses(name: str, material: Path, tmp_path: Path) -> None:
    found = golden.train_method(name, material, tmp_path / "run")
    assert found["losses"] == pytest.approx(KNOWN["runs"][name]["losses"], rel=2e-3)
    assert found["scores"].keys() == KNOWN["runs"][name]["scores"].keys()


def test_an_analysis_gives_the_recorded_tables(material: Path, tmp_path: Path) -> None:
    golden.train_method("bad", material, tmp_path / "run")
    assert golden.analysis_tables(tmp_path / "run", tmp_path).keys() == KNOWN["analysis"].keys()


def test_the_committed_comparisons_give_the_recorded_tables() -> None:
    assert golden.tables() == KNOWN["tables"]
