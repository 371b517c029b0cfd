"""The cells of a comparison: folders, recipes, budgets, invalid options, and the search."""

import math
from contextlib import nullcontext

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from badit import BaditError, load_base_model
from badit.baselines import BASELINES
from badit.comparison.checks import check
from badit.comparison.finished import FinishedCells
from badit.comparison.grid import Cell, Grid, order_name
from badit.comparison.rates import find_rate
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.runs.resolved import resolve
from comparison.cells import LORA, comparison_values
from refusals import refuses
from steps import method_of

METHODS = {**LORA, "badit-no-dog": {"name": "badit", "regroup": None}, "base": {"name": "base"}}
LADDER = [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3]
LOSSES = st.lists(
    st.sampled_from([0.5, 1.0, 2.0, math.inf, math.nan, -math.inf]),
    min_size=1,
    max_size=len(LADDER),
)
OPTIONS = {"goat": {"r": 8}, "full": {}, "base": {}, "task-neurons": {"share": 0.2}}
ALL_METHODS = [*BASELINES, "badit", "pcgrad", "cagrad", "full", "base", "task-neurons"]


def one_method(**options):
    return {"methods": {"lora": {"name": "lora", **options}}}


def grid_with(data=None, evaluation=None, **compare):
    compare = {"methods": METHODS, "seeds": [3, 5], **compare}
    return Grid(
        build_recipe(
            {
                "data": data or {},
                "evaluation": evaluation or {},
                "output": "out",
                "compare": compare,
            }
        )
    )


def test_folders_of_cells():
    grid = grid_with()
    assert [str(cell) for cell in grid.chosen("lora", 5e-4)] == [
        "lora/lr-0.0005/seed-3",
        "lora/lr-0.0005/seed-5",
    ]
    assert [str(cell) for cell in grid.chosen("base", None)] == ["base"]
    assert str(grid.searched("lora", 1e-3)) == "lora/lr-0.001/seed-3"
    grid = grid_with(orders=["sapt-1", ["task363_sst2", "cities"]], single_task=["lora"])
    orders = [
        f"lora/order-{order}/lr-0.01/seed-{seed}"
        for seed in (3, 5)
        for order in ("sapt-1", "task363-cities")
    ]
    singles = [
        f"lora/single/lr-0.01/seed-{seed}/{task}"
        for seed in (3, 5)
        for task in ("cities", "task_b")
    ]
    assert [*map(str, grid.chosen("lora", 0.01, ["cities", "task_b"]))] == orders + singles
    assert str(grid.searched("lora", 0.01)) == "lora/order-sapt-1/lr-0.01/seed-3"


def test_cell_recipe_changes_only_the_fields_of_the_cell():
    grid = grid_with(data={"tasks": ["cities", "rivers"]}, orders=[["rivers", "cities"]])

    def without_method(recipe):
        return recipe.model_dump(exclude={"compare", "method", "output"})

    plain = without_method(grid.recipe)
    recipe = grid.recipe_of(Cell("lora", 0.02, 5, ["rivers", "cities"]))
    assert (recipe.method, recipe.compare) == (METHODS["lora"], None)
    assert recipe.output == "out/lora/order-rivers-cities/lr-0.02/seed-5"
    training = {**plain["training"], "learning_rate": 0.02, "seed": 5}
    data = {**plain["data"], "order": ["rivers", "cities"]}
    assert without_method(recipe) == {**plain, "training": training, "data": data}
    single = grid.recipe_of(Cell("lora", 0.02, 5, task="rivers"))
    assert (single.data.tasks, single.data.order) == (["rivers"], None)
    base = grid.recipe_of(Cell("base", None, None))
    assert (without_method(base), base.output) == (plain, "out/base")
    assert (
        grid_with(data={"order": "sapt-1"}, orders=["sapt-1"])
        .recipe_of(Cell("base", None, None))
        .data.order
        is None
    )
    # A method may override training values and seeds.
    own = {**LORA["lora"], "training": {"optimizer": "orthogonal"}, "seeds": [4]}
    grid = grid_with(methods={**LORA, "own": own}, vary_data=True)
    cells = [cell for name in grid.start_rates for cell in grid.chosen(name, 0.01)]
    assert [str(cell) for cell in cells] == [
        "lora/lr-0.01/seed-3",
        "lora/lr-0.01/seed-5",
        "own/lr-0.01/seed-4",
    ]
    recipes = [grid.recipe_of(cell) for cell in cells]
    assert [recipe.training.optimizer for recipe in recipes] == ["adamw", "adamw", "orthogonal"]
    search = {
        "training": {"learning_rate": 1.0, "seed": 9, "num_train_epochs": 2},
        "output": "elsewhere",
    }
    grid = grid_with(search=search)
    searched = grid.recipe_of(grid.searched("lora", 0.01))
    assert (
        searched.training.learning_rate,
        searched.training.seed,
        searched.training.num_train_epochs,
    ) == (0.01, 3, 2)
    assert searched.output == "out/lora/search/lr-0.01/seed-3"
    assert [recipe.data.seed for recipe in recipes] == [3, 5, 4]
    assert all(recipe.method == METHODS["lora"] for recipe in recipes)


@given(
    st.lists(
        st.permutations([f"review_sentiment_{i}" for i in range(12)]),
        min_size=2,
        max_size=2,
        unique_by=tuple,
    )
)
def test_long_orders_have_short_and_distinct_names(orders):
    name, other = map(order_name, orders)
    assert name != other
    assert len(name) <= 80
    assert order_name(["task1000_x", "task1001_y", "cities"]) == "task1000-task1001-cities"
    assert order_name(["task1_b", "task1_a"]) == "task1_b-task1_a", (
        "the numbers alone do not tell them apart"
    )


def test_invalid_options_are_refused_in_one_line():
    for compare, message in (
        ({"reference": "lorra"}, r"compare\.reference: unknown 'lorra' \(did you mean 'lora'\?\)"),
        (
            {"methods": {"a/b": {"name": "lora"}}},
            r"compare\.methods: 'a/b' is not a valid name; use letters",
        ),
        (
            {"methods": {"lora": {"name": "lroa"}}},
            r"compare\.methods\.lora\.name: unknown method 'lroa'",
        ),
        (
            {"learning_rates": [1e-4, 1e-3]},
            r"compare\.methods\.lora: the search starts at .* 0\.002; add it to",
        ),
        ({"single_task": ["base"]}, r"compare\.single_task: base trains nothing"),
        (
            {"learning_rates": [1e-3, 5e-4]},
            r"compare\.learning_rates: must be positive and ascending",
        ),
        (
            {"data": {"order": "sapt-1"}},
            r"data\.order: not used in a comparison; set compare\.orders",
        ),
        (
            {"search": {"data": {"train_per_tsk": 4}}},
            r"compare\.search: data\.train_per_tsk: unknown key",
        ),
        ({"orders": [["a", "b"], ["a", "b"]]}, r"compare\.orders: a-b is listed more than once"),
        (
            one_method(training={"optimiser": "lora+"}),
            r"training\.optimiser: unknown key.*optimizer",
        ),
        (one_method(seeds=[]), r"compare\.methods\.lora\.seeds: list should have at least 1 item"),
        (one_method(seeds=[3, 3]), r"compare\.methods\.lora\.seeds: 3 is listed more than once"),
        (
            {"vary_data": True, "evaluation": {"split": "validation"}},
            r"compare\.vary_data: every seed would be scored",
        ),
        ({"method": {}}, r"compare\.method: unknown key \(did you mean 'methods'\?\)"),
    ):
        assert "\n" not in refuses(message, grid_with, **compare)


def test_compare_section_is_required_by_comparisons_and_ignored_by_runs(tmp_path):
    refuses("compare: the recipe has no compare section", Grid, build_recipe({}))
    refuses(r"compare\.methods: field required", build_recipe, {"compare": {}})
    compared = build_recipe({"output": str(tmp_path / "run"), "compare": {"methods": METHODS}})
    assert "compare" not in yaml.safe_load(dump_recipe(compared))
    resolve(build_recipe({"output": str(tmp_path / "run")})).prepare_folder()
    resolve(compared).prepare_folder()


def checked(material, methods, **compare):
    """Checks a comparison and returns the number of trainable parameters of each method."""
    values = comparison_values(material, material / "none", methods=methods, **compare)
    grid = Grid(build_recipe(values))
    _, counts = check(grid, FinishedCells(grid))
    return counts


def test_skeleton_and_real_model_have_equal_parameter_counts(material):
    sections = {name: {"name": name, **OPTIONS.get(name, {"r": 4})} for name in ALL_METHODS}
    real = {}
    for name, section in sections.items():
        base = load_base_model(material / "model", dtype="float32")[0]
        model = method_of(section).apply(base, ["cities", "rivers"])
        real[name] = sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        )
    layers, hidden, width = 2, 32, 48
    assert real["lora"] == layers * 4 * (hidden + width)
    assert checked(material, sections) == real | {
        "base": 0,
        "task-neurons": round(0.2 * layers * width * 3 * hidden),
    }


@pytest.mark.parametrize(("rank", "fair"), [(42, True), (38, True), (43, False), (37, False)])
def test_budgets_may_differ_by_at_most_five_percent(material, rank, fair):
    methods = {f"r{r}": {"name": "lora", "r": r} for r in (40, rank)} | {"base": {"name": "base"}}
    counts = checked(material, methods, reference="r40")
    first, second = counts[f"r{rank}"], counts["r40"]
    message = (
        f"methods.r{rank}: trains {first:,} parameters, r40 trains {second:,}; change its rank"
    )
    with nullcontext() if fair else pytest.raises(BaditError, match=message):
        checked(material, methods, reference="r40", budget="r40")
    checked(material, methods, reference="r40", budget="r40", unmatched=[f"r{rank}"])


def walk(losses, start):
    """Returns the index of the rate found, and the indices tried, in order."""
    ladder, tried = LADDER[: len(losses)], []

    def loss_of(rate):
        tried.append(ladder.index(rate))
        return losses[tried[-1]]

    return ladder.index(find_rate(ladder, ladder[start], loss_of)), tried


def test_lowest_rate_within_the_margin_is_selected_and_ties_keep_the_start():
    losses = dict(zip(LADDER, [1.43, 1.405, 1.40, 1.42, *[9.0] * len(LADDER)], strict=False))
    assert find_rate(LADDER, LADDER[2], losses.__getitem__, 0.01) == LADDER[1]
    assert find_rate(LADDER, LADDER[2], losses.__getitem__, 0.004) == LADDER[2]
    assert walk([1, 1, 1], 1) == (1, [1, 0, 2])
    assert walk([1, 2, 3, 4], 1) == (0, [1, 0]), (
        "no higher rate is tried if the next lower one is better"
    )
    assert walk([math.inf, math.nan, math.inf], 1) == (0, [1, 0]), "nothing is known to work"
    assert walk([2, 1, math.inf, math.nan], 3) == (1, [3, 2, 1, 0]), (
        "a search leaves rates that diverge"
    )


@given(LOSSES, st.data())
def test_search_returns_the_best_rate_tried_and_tries_its_neighbours(losses, data):
    chosen, tried = walk(losses, data.draw(st.integers(0, len(losses) - 1)))
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    assert len(tried) == len(set(tried))
    assert finite[chosen] == min(finite[rung] for rung in tried)
    assert {chosen - 1, chosen + 1} & set(range(len(losses))) <= set(tried)
