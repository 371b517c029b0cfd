import pytest

from training.launches import Launches


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_collection):
    """Every module of this folder trains often."""


@pytest.fixture
def launches(recipe_values, tmp_path):
    return Launches(recipe_values, tmp_path)
