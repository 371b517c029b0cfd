import pytest

from comparison.cells import comparison_values


@pytest.fixture
def values(material, tmp_path):
    return comparison_values(material, tmp_path / "comparison")
