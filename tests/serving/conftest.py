"""Trained runs to export, each a few steps of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from badit.recipe import build_recipe
from badit.runs import RunFolder
from badit.train import fit


@pytest.fixture
def trained(recipe_values: dict[str, Any], tmp_path: Any) -> Callable[..., RunFolder]:
    """A factory: ``trained({"name": "lora"})`` is a run of three large steps, so that what it has learnt shows."""

    def make(method: dict[str, Any], *overrides: str, name: str = "run") -> RunFolder:
        values = {**recipe_values, "method": method, "output": str(tmp_path / name)}
        values["training"] = {**values["training"], "max_steps": 3, "learning_rate": 0.05}
        return fit(build_recipe(values, overrides), progress=False)

    return make
