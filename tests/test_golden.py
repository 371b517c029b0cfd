"""Losses, scores and the names of analysis tables match tests/golden.json (tests/golden.py)."""

import pytest

import golden
from badit.support.files import read_json

KNOWN = read_json(golden.FILE)


@pytest.mark.parametrize("name", golden.METHODS)
def test_losses_scores_and_names_of_tables_match_the_recorded_ones(name, material, tmp_path):
    found, known = golden.train_method(name, material, tmp_path / "run"), KNOWN["runs"][name]
    assert found["losses"] == pytest.approx(known["losses"], rel=2e-3)
    assert found["scores"] == pytest.approx(known["scores"], rel=2e-3)
    if name == "bad":
        assert golden.analysis_tables(tmp_path / "run", tmp_path).keys() == KNOWN["analysis"].keys()
