"""Keeps the many small trainings of this folder quick."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from training.launches import Launches


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> None:
    """Every training ends with a garbage collection, which would go through all imported modules each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def launches(recipe_values: dict[str, Any], tmp_path: Path) -> Launches:
    return Launches(recipe_values, tmp_path)
