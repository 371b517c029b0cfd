"""Budgets: parameters counted on a skeleton are those of the real model, and unequal ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from badit.baselines import BASELINES
from badit.comparison.budget import refuse_unequal, trainable_parameters
from badit.comparison.grid import Grid
from badit.errors import BaditError
from badit.methods import build_method
from badit.models import load_base_model
from badit.recipe import build_recipe
from comparison.cells import comparison_values

Values = dict[str, Any]
TASKS = ["cities", "rivers"]
OPTIONS: Values = {"goat": {"r": 8}, "full": {}, "base": {}, "task-neurons": {"share": 0.2}}
METHODS = [*BASELINES, "badit", "pcgrad", "cagrad", "full", "base", "task-neurons"]


def grid_of(material: Path, methods: Values, **compare: Any) -> Grid:
    values = comparison_values(material, material / "none", methods=methods, **compare)
    return Grid(build_recipe(values))


def test_a_skeleton_counts_as_the_real_model_does(material: Path) -> None:
    sections = {name: {"name": name, **OPTIONS.get(name, {"r": 4})} for name in METHODS}
    counts = trainable_parameters(grid_of(material, sections), TASKS)
    assert list(counts) == METHODS
    real = {}
    for name, section in sections.items():
        model = build_method(section).apply(load_base_model(material / "model", dtype="float32")[0], TASKS)
        real[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers, hidden, width = 2, 32, 48
    assert real["lora"] == layers * 4 * (hidden + width)
    real |= {"base": 0, "task-neurons": round(0.2 * layers * width * 3 * hidden)}
    assert counts == real
    of_one_task = trainable_parameters(grid_of(material, {"lora": sections["mtl-lora"]}), TASKS[:1])
    assert of_one_task["lora"] < counts["mtl-lora"], "MTL-LoRA has a matrix for every task"


LORAS = {f"r{rank}": {"name": "lora", "r": rank} for rank in (40, 42, 43, 38, 37)}


@pytest.mark.parametrize(("other", "fair"), [("r42", True), ("r38", True), ("r43", False), ("r37", False)])
def test_five_percent_are_let_pass(material: Path, other: str, fair: bool) -> None:
    methods = {name: LORAS[name] for name in ("r40", other)} | {"base": {"name": "base"}}
    grid = grid_of(material, methods, reference="r40", budget="r40")
    counts = trainable_parameters(grid, TASKS)
    if fair:
        refuse_unequal(grid, counts)
        return
    message = rf"compare\.methods\.{other}: trains {counts[other]:,} parameters, r40 {counts['r40']:,}.* agree to 5%"
    with pytest.raises(BaditError, match=message):
        refuse_unequal(grid, counts)
    refuse_unequal(grid_of(material, methods, reference="r40", budget="r40", unmatched=[other]), counts)
    refuse_unequal(grid_of(material, methods, reference="r40"), counts)


def test_a_method_that_does_not_go_with_the_model_is_named(material: Path) -> None:
    grid = grid_of(material, {"lora": {"name": "lora"}, "other": {"name": "lora", "target_modules": ["attention"]}})
    with pytest.raises(BaditError, match=r"compare\.methods\.other: method: Target modules .*not found") as caught:
        trainable_parameters(grid, TASKS)
    assert "\n" not in str(caught.value)
