"""What every comparison of this folder shares."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from comparison.cells import InlineCell, Values, compare_module, comparison_values


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> None:
    """Every training ends with a garbage collection, which would go through all imported modules each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def values(material: Path, tmp_path: Path) -> Values:
    return comparison_values(material, tmp_path / "comparison")


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs cells in this process; lists the folders of those that were started."""
    started: list[str] = []
    monkeypatch.setattr(InlineCell, "started", started, raising=False)
    monkeypatch.setattr(compare_module, "CellProcess", InlineCell)
    return started
