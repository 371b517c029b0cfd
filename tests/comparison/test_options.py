"""What one method of a comparison has of its own, a cheaper search, varied data, and which methods are level."""

from pathlib import Path

import pytest

from badit.cli import main
from badit.compare import Grid
from badit.errors import BaditError
from badit.recipe import build_recipe
from badit.results import load_results, summarise
from badit.run import Run
from comparison.cells import compared

OPTIMIZERS = {
    "lora": {"name": "lora", "r": 8},
    "orthogonal": {"name": "lora", "r": 8, "training": {"optimizer": "orthogonal"}, "seeds": [4]},
}


def test_training_values_and_seeds_of_one_method_alone(values):
    grid = Grid(build_recipe(values | {"compare": {"methods": OPTIMIZERS, "seeds": [0, 1], "vary_data": True}}))
    cells = [cell for name in grid.methods for cell in grid.chosen(name, 0.01)]
    assert [str(cell) for cell in cells] == [
        "lora/lr-0.01/seed-0",
        "lora/lr-0.01/seed-1",
        "orthogonal/lr-0.01/seed-4",
    ]
    recipes = [grid.recipe_of(cell) for cell in cells]
    assert [recipe.training.optimizer for recipe in recipes] == ["adamw", "adamw", "orthogonal"]
    assert [recipe.data.seed for recipe in recipes] == [0, 1, 4]
    assert {tuple(recipe.method) for recipe in recipes} == {("name", "r")}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"lora": {"name": "lora", "training": {"optimiser": "lora+"}}}, "training.optimiser: unknown key.*optimizer"),
        ({"lora": {"name": "lora", "training": {"optimizer": "sgd"}}}, "training.optimizer: input should be"),
        ({"lora": {"name": "lora", "seeds": []}}, "compare.methods.lora.seeds: list should have at least 1 item"),
        ({"lora": {"name": "lora", "seeds": [3, 3]}}, "compare.methods.lora.seeds: 3 is listed more than once"),
    ],
)
def test_bad_values_of_one_method_are_named(values, methods, message):
    with pytest.raises(BaditError, match=message):
        Grid(build_recipe(values | {"compare": {"methods": methods}}))


def test_a_search_on_less_data_is_kept_apart(values, inline):
    search = {"data": {"train_per_task": 4}, "training": {"max_steps": 1}}
    values["compare"] |= {"learning_rates": [0.01, 0.02], "search": search, "methods": OPTIMIZERS}
    results = compared(values)
    output = Path(values["output"])
    searched = Run(output / "lora" / "search" / "lr-0.01" / "seed-0")
    assert searched.recipe.data.train_per_task == 4
    assert searched.validation_path.is_file()
    assert not searched.scores_path.exists()
    rate = next(cell["learning_rate"] for cell in results["cells"] if cell["method"] == "lora" and cell["selected"])
    chosen = Run(output / "lora" / f"lr-{rate:g}" / "seed-0")
    assert chosen.recipe.data.train_per_task is None
    assert sum(not cell["selected"] for cell in results["cells"]) == 4
    assert compared(values) == results
    assert len(inline) == len(set(inline)) + 2  # LR/SEED: both methods searched the same rates


def test_every_instance_has_its_nll_and_equal_methods_are_level(values, inline, capsys):
    same = {"name": "lora", "r": 8}
    compared(values | {"compare": {"methods": {"lora": same, "again": same}, "seeds": [0]}})
    results = load_results(values["output"])
    nll = results.instances[results.instances["metric"] == "nll"]
    assert len(nll) == len(results.instances) / 3
    assert (nll["score"] > 0).all()
    summary = summarise(results, "nll").set_index("method")
    assert summary.loc["again", "level"]
    assert summary.loc["again", "rank"] == summary.loc["lora", "rank"]
    assert main(["table", values["output"], "--metric", "nll"]) == 0
    assert "+0.000 [+0.000, +0.000] ≈" in capsys.readouterr().out


def test_a_lower_nll_ranks_first(values, inline):
    methods = {"lora": {"name": "lora", "r": 8}, "base": {"name": "base"}}
    compared(values | {"compare": {"methods": methods, "seeds": [0]}})
    results = load_results(values["output"])
    nll = results.scores[results.scores["metric"] == "nll"].groupby("method")["score"].mean()
    summary = summarise(results, "nll").set_index("method")
    assert nll.sort_values().index.tolist() == summary["rank"].sort_values().index.tolist()
