"""The cells of a comparison: folders, recipes, and what a ``compare`` section is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from badit.comparison.grid import Cell, Grid, order_name
from badit.errors import BaditError
from badit.methods import build_method
from badit.recipe import build_recipe, dump_recipe, load_recipe
from badit.runs import RunFolder

Values = dict[str, Any]
SUPERNI = Path(__file__).parents[2] / "recipes" / "superni-cpu.yaml"
METHODS: Values = {
    "lora": {"name": "lora", "r": 4},
    "badit-no-dog": {"name": "badit", "regroup": None},
    "base": {"name": "base"},
}


def grid_with(training: Values | None = None, data: Values | None = None, **compare: Any) -> Grid:
    content = {"training": training or {}, "data": data or {}, "output": "out"}
    return Grid(build_recipe({**content, "compare": {"methods": METHODS, "seeds": [3, 5], **compare}}))


def test_cells_and_folders_of_a_mixed_comparison() -> None:
    grid = grid_with()
    assert [str(cell) for cell in grid.chosen("lora", 5e-4)] == ["lora/lr-0.0005/seed-3", "lora/lr-0.0005/seed-5"]
    assert [str(cell) for cell in grid.chosen("base", None)] == ["base"]
    assert str(grid.searched("lora", 1e-3)) == "lora/lr-0.001/seed-3"
    assert [grid.trains(name) for name in METHODS] == [True, True, False]


def test_cells_and_folders_of_a_sequential_comparison() -> None:
    grid = grid_with(orders=["sapt-1", ["task363_sst2", "cities"]], single_task=["lora"])
    tasks = ["cities", "task363_sst2"]
    assert [str(cell) for cell in grid.chosen("lora", 0.01, tasks)] == [
        "lora/order-sapt-1/lr-0.01/seed-3",
        "lora/order-task363-cities/lr-0.01/seed-3",
        "lora/order-sapt-1/lr-0.01/seed-5",
        "lora/order-task363-cities/lr-0.01/seed-5",
        "lora/single/lr-0.01/seed-3/cities",
        "lora/single/lr-0.01/seed-3/task363_sst2",
        "lora/single/lr-0.01/seed-5/cities",
        "lora/single/lr-0.01/seed-5/task363_sst2",
    ]
    assert len(list(grid.chosen("badit-no-dog", 0.01, tasks))) == 4
    assert str(grid.searched("lora", 0.01)) == "lora/order-sapt-1/lr-0.01/seed-3"


def test_a_cells_recipe_differs_in_what_the_cell_names() -> None:
    grid = grid_with(data={"tasks": ["cities", "rivers"]}, orders=[["rivers", "cities"]])
    plain = grid.recipe.model_dump(exclude={"compare", "method", "output"})

    recipe = grid.recipe_of(Cell("lora", 0.02, 5, ("rivers", "cities")))
    assert recipe.method == METHODS["lora"]
    assert recipe.output == "out/lora/order-rivers-cities/lr-0.02/seed-5"
    assert recipe.compare is None
    expected = {**plain, "training": {**plain["training"], "learning_rate": 0.02, "seed": 5}}
    expected["data"] = {**plain["data"], "order": ["rivers", "cities"]}
    assert recipe.model_dump(exclude={"compare", "method", "output"}) == expected

    single = grid.recipe_of(Cell("lora", 0.02, 5, task="rivers"))
    assert (single.data.tasks, single.data.order) == (["rivers"], None)
    base = grid.recipe_of(Cell("base", None, None))
    assert base.model_dump(exclude={"compare", "method", "output"}) == plain
    assert base.output == "out/base"


def test_all_cells_there_may_be() -> None:
    grid = grid_with({"learning_rate": 0.2}, {"validation_per_task": 2}, learning_rates=[0.1, 0.2])
    cells = list(grid.candidates(["cities"]))
    assert {str(cell) for cell in cells} == {"base"} | {
        f"{method}/lr-{rate}/seed-{seed}"
        for method in ("lora", "badit-no-dog")
        for rate in (0.1, 0.2)
        for seed in (3, 5)
    }
    assert {str(cell) for cell in grid_with({"learning_rate": 0.3}).candidates([])} == {
        "base", "lora/lr-0.3/seed-3", "lora/lr-0.3/seed-5", "badit-no-dog/lr-0.3/seed-3", "badit-no-dog/lr-0.3/seed-5",
    }  # fmt: skip


@given(st.lists(st.permutations([f"review_sentiment_{i}" for i in range(12)]), min_size=2, max_size=2, unique_by=tuple))
def test_long_orders_have_short_names_of_their_own(orders: list[list[str]]) -> None:
    one, other = map(order_name, orders)
    assert one != other
    assert len(one) <= 80


def test_orders_that_begin_alike_have_names_of_their_own() -> None:
    names = [f"task{number}_x" for number in range(1000, 1015)]
    assert order_name(names) != order_name([*names[:-2], names[-1], names[-2]])
    assert order_name(names[:3]) == "task1000-task1001-task1002"
    assert order_name("seeded-3") == "seeded-3"


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"reference": "lorra"}, r"compare\.reference: 'lorra' is none of the methods \(did you mean 'lora'\?\)"),
        ({"budget": "loar"}, r"compare\.budget: 'loar' is none of the methods \(did you mean 'lora'\?\)"),
        ({"unmatched": ["goat"]}, r"compare\.unmatched: 'goat' is none of the methods"),
        ({"single_task": ["goat"]}, r"compare\.single_task: 'goat' is none of the methods"),
        ({"methods": {"a/b": {"name": "lora"}}}, r"compare\.methods: 'a/b' names a folder; use letters"),
        ({"methods": {"..": {"name": "lora"}}}, r"compare\.methods: '\.\.' names a folder"),
        ({"methods": {"lora": {"name": "lroa"}}}, r"compare\.methods\.lora: method\.name: unknown method 'lroa'"),
        ({"methods": {"lora": {"name": "lora", "rank": 4}}}, r"compare\.methods\.lora: method\.rank: unknown key"),
        ({"learning_rates": [1e-4, 1e-3]}, r"training\.learning_rate: the search starts from 0\.0005; add it"),
        ({"learning_rates": [5e-4]}, r"data\.validation_per_task: choosing learning rates needs held-out instances"),
        ({"learning_rates": [1e-3, 5e-4]}, r"compare\.learning_rates: must be positive and ascending"),
        ({"learning_rates": []}, r"compare\.learning_rates: must be positive and ascending"),
        ({"learning_rates": [5e-4, 5e-4]}, r"compare\.learning_rates: must be positive and ascending"),
        ({"learning_rates": [0, 5e-4]}, r"compare\.learning_rates: must be positive and ascending"),
        ({"seeds": []}, r"compare\.seeds: "),
        ({"seeds": [0, 1, 0]}, r"compare\.seeds: 0 is listed more than once"),
        ({"orders": []}, r"compare\.orders: "),
        ({"orders": ["sapt-1", "sapt-1"]}, r"compare\.orders: sapt-1 is listed more than once"),
        ({"orders": [["a", "b"], ["a", "b"]]}, r"compare\.orders: a-b is listed more than once"),
        ({"method": {}}, r"compare\.method: unknown key \(did you mean 'methods'\?\)"),
    ],
)
def test_mistakes_are_named_on_one_line(compare: Values, message: str) -> None:
    with pytest.raises(BaditError, match=message) as caught:
        grid_with(**compare)
    assert "\n" not in str(caught.value)


def test_methods_are_needed() -> None:
    with pytest.raises(BaditError, match="compare: the recipe has no such section"):
        Grid(build_recipe({}))
    with pytest.raises(BaditError, match=r"compare\.methods: field required"):
        build_recipe({"compare": {}})
    with pytest.raises(BaditError, match=r"compare\.reference: 'lora' is none of the methods"):
        Grid(build_recipe({"compare": {"methods": {}}}))


def test_a_run_leaves_the_section_out_of_account(tmp_path: Path) -> None:
    alone = build_recipe({"output": str(tmp_path / "run")})
    compared = build_recipe({"output": str(tmp_path / "run"), "compare": {"methods": METHODS}})
    assert "compare" not in yaml.safe_load(dump_recipe(compared))
    RunFolder.prepare(alone)
    RunFolder.prepare(compared)


def test_the_shipped_comparison() -> None:
    grid = Grid(load_recipe(SUPERNI))
    assert grid.section.methods["badit"] == grid.recipe.method, "badit train runs the cell that badit compare has"
    for method in grid.methods:
        for cell in grid.chosen(method, 1e-3):
            build_method(grid.recipe_of(cell).method)
