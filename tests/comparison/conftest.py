import pytest

from comparison.cells import InlineCell, compare_module, comparison_values


@pytest.fixture
def values(material, tmp_path):
    return comparison_values(material, tmp_path / "comparison")


@pytest.fixture
def inline(monkeypatch):
    """Runs cells in this process; a list of the folders of the started cells."""
    monkeypatch.setattr(compare_module, "start_cell", InlineCell)
    InlineCell.started.clear()
    return InlineCell.started
