"""Keeps the many small trainings of this folder quick."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> None:
    """Every training ends with a garbage collection, which would go through all imported modules each time."""
    gc.collect()
    gc.freeze()
