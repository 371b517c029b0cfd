"""Training, analysing and comparing give the recorded values (tests/golden.py)."""

import json

import pytest

import golden

KNOWN = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("name", golden.METHODS)
def test_a_training_and_an_analysis_give_the_recorded_values(name, material, tmp_path):
    found, known = golden.train_method(name, material, tmp_path / "run"), KNOWN["runs"][name]
    assert found["losses"] == pytest.approx(known["losses"], rel=2e-3)
    assert found["scores"].keys() == known["scores"].keys()
    if name == "bad":
        assert golden.analysis_tables(tmp_path / "run", tmp_path).keys() == KNOWN["analysis"].keys()


def test_the_committed_comparisons_give_the_recorded_tables():
    assert golden.tables() == KNOWN["tables"]
