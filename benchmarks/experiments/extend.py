"""Runs the experiment of extend.md: tasks in sequence with an expert per task.

    python benchmarks/experiments/extend.py screen            # resumable
    python benchmarks/experiments/extend.py confirm own-5     # the winner; resumable
    python benchmarks/experiments/extend.py report own-5

Needs BADIT_SUPERNI, as the recipe.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

import badit
from badit.support.files import read_json

RECIPE = Path(__file__).parents[2] / "recipes" / "evidence-sequence-cpu.yaml"
RUNS = Path("runs/extend")
# Rank of a task's expert, and number of earlier experts that it may use.
VARIANTS = {
    "own-5": (5, 0),
    "own-5-transfer": (5, 4),
    "own-32": (32, 0),
    "own-32-transfer": (32, 4),
}
OTHERS = ("gainlora", "o-lora", "lora")
# Of benchmarks/results/evidence-sequence-cpu.
RATES = {"gainlora": 1e-3, "o-lora": 2e-3, "lora": 2e-3}


def recipe(name: str, methods: dict[str, Any], **compare: Any) -> dict[str, Any]:
    """Returns the recipe's values with other methods in a folder of their own."""
    values = badit.load_recipe(RECIPE).model_dump(mode="json", exclude_unset=True)
    section = {**values["compare"], **compare, "methods": methods}
    section |= {"budget": None, "unmatched": [], "reference": next(iter(methods))}
    return {**values, "compare": section, "output": str(RUNS / name)}


def variant(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the method section and the section extend of a variant."""
    rank, reused = VARIANTS[name]
    method = {"name": "badit", "num_experts": 1, "r": rank, "lora_alpha": 8 * rank}
    method |= {"gates": "clusters", "key": "embedding", "num_clusters": 2}
    method |= {"init_weights": "lora", "codes": "random"}
    return method, {"own_experts": True, "rank": rank, "reused": reused, "clusters": 2}


def screen() -> None:
    for name in VARIANTS:
        method, extend = variant(name)
        orders = ["seeded-0", "seeded-1"]
        values = recipe(name, {name: method}, seeds=[30, 31], orders=orders, single_task=[])
        badit.compare({**values, "extend": extend})
        print(f"{name}: {mean(performance(RUNS / name, name).values()):.1f}", flush=True)


def confirm(winner: str) -> None:
    fixed = {"seeds": [32, 33, 34], "orders": ["seeded-2", "seeded-3", "seeded-4"]}
    fixed |= {"learning_rates": None, "search": None}
    method, extend = variant(winner)
    method["training"] = {"learning_rate": _chosen_rate(winner)}
    values = recipe("winner", {winner: method}, **fixed, single_task=[])
    others = badit.load_recipe(RECIPE).model_dump(mode="json")["compare"]["methods"]
    sections = {
        name: {**others[name], "training": {"learning_rate": RATES[name]}, "seeds": None}
        for name in OTHERS
    }
    of_others = recipe("others", sections, **fixed, single_task=["lora"])
    for each in ({**values, "extend": extend}, of_others):
        each["data"] = {**each["data"], "test_per_task": 100}
        badit.compare(each)
    report(winner)


def report(winner: str) -> None:
    ours = performance(RUNS / "winner", winner)
    for name in OTHERS:
        theirs = performance(RUNS / "others", name)
        differences = {key: ours[key] - theirs[key] for key in ours.keys() & theirs.keys()}
        values = list(differences.values())
        low, high = stats.t.interval(0.95, len(values) - 1, mean(values), stats.sem(values))
        print(f"{winner} − {name}: {mean(values):+.1f} [{low:.1f}, {high:.1f}]")
        for order in sorted({order for order, _ in differences}):
            of_order = [value for key, value in differences.items() if key[0] == order]
            print(f"  {order}: {mean(of_order):+.1f} over {len(of_order)} seeds")


def performance(folder: Path, method: str) -> dict[tuple[str, int], float]:
    """Returns the mean Rouge-L over the tasks after the last one, by order and seed."""
    cells = read_json(folder / "results.json")["cells"]
    return {
        (cell["order"], cell["seed"]): cell["scores"]["rouge_l"]
        for cell in cells
        if cell["method"] == method and cell["selected"] and cell["status"] == "done"
    }


def _chosen_rate(name: str) -> float:
    cells = read_json(RUNS / name / "results.json")["cells"]
    return next(cell["learning_rate"] for cell in cells if cell["selected"])


if __name__ == "__main__":
    commands = {"screen": screen, "confirm": confirm, "report": report}
    commands[sys.argv[1]](*sys.argv[2:])
