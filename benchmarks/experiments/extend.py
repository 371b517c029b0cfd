"""Runs the experiment of extend.md: tasks in sequence with an expert per task.

    python benchmarks/experiments/extend.py screen              # resumable
    python benchmarks/experiments/extend.py table               # of the screening, as Markdown
    python benchmarks/experiments/extend.py confirm own-5@2e-3  # the winner; resumable
    python benchmarks/experiments/extend.py report own-5@2e-3

Needs BADIT_SUPERNI, as the recipe.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from held_out import held_out_loss
from scipy import stats

import badit
from badit.support.files import read_json

BENCHMARKS = Path(__file__).resolve().parents[1]
RECIPE = BENCHMARKS.parent / "recipes" / "evidence-sequence-cpu.yaml"
RESULTS = BENCHMARKS / "results" / "extend-screening"
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

Sequence = tuple[str, int]  # an order and a seed
# Of the screening.
SEQUENCES: list[Sequence] = [("seeded-0", 30), ("seeded-1", 31), ("seeded-1", 30), ("seeded-0", 31)]
# Variants and others with their learning rates, in the order of training.
CELLS = (
    "own-5@2e-3",
    "own-5-transfer@2e-3",
    "own-32@2e-3",
    "own-32@1e-3",
    "own-32-transfer@2e-3",
    "own-32-transfer@1e-3",
    "gainlora@1e-3",
)
REFERENCE = "gainlora@1e-3"
# A variant that is this much above the best one in the first sequence gets no further ones.
DROPPED = 0.03


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


def section(name: str) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Returns a cell's method section, section extend and learning rate."""
    method_name, rate = name.split("@")
    if method_name in VARIANTS:
        return *variant(method_name), float(rate)
    methods = badit.load_recipe(RECIPE).model_dump(mode="json")["compare"]["methods"]
    # Without what only a comparison reads.
    options = {
        key: value
        for key, value in methods[method_name].items()
        if key not in ("training", "seeds")
    }
    return options, {}, float(rate)


def screen() -> None:
    for name, sequence in jobs():
        path = path_of(name, sequence)
        held_out_loss(recipe_of(name, sequence), RUNS / "screening" / path.stem, path)
    print(table())


def path_of(name: str, sequence: Sequence) -> Path:
    order, seed = sequence
    return RESULTS / f"{name}-{order}-{seed}.json"


def jobs() -> Iterator[tuple[str, Sequence]]:
    """Yields the cells of the screening. Which ones depends on the results of earlier ones."""
    for name in CELLS:
        if not name.startswith("own-32-transfer") or name == _best_of_rank_32():
            yield name, SEQUENCES[0]
    remaining = [name for name in CELLS if screening_losses(name)]
    losses = {name: screening_losses(name)[SEQUENCES[0]] for name in remaining}
    limit = DROPPED + min(loss for name, loss in losses.items() if name != REFERENCE)
    for sequence in SEQUENCES[1:]:
        for name, loss in losses.items():
            if name == REFERENCE or loss <= limit:
                yield name, sequence


def _best_of_rank_32() -> str:
    """Returns the cell with transfer at the learning rate that is better without."""
    rates = ("1e-3", "2e-3")
    losses = {rate: screening_losses(f"own-32@{rate}")[SEQUENCES[0]] for rate in rates}
    return f"own-32-transfer@{min(losses, key=losses.__getitem__)}"


def recipe_of(name: str, sequence: Sequence) -> dict[str, Any]:
    """Returns the recipe's values for a cell of the screening."""
    method, extend, rate = section(name)
    order, seed = sequence
    values = badit.load_recipe(RECIPE).model_dump(mode="json", exclude_unset=True)
    values |= {"compare": None, "method": method, "extend": extend}
    values["training"] |= {"learning_rate": rate, "seed": seed}
    values["data"] |= {"order": order, "seed": seed}
    return values


def screening_losses(name: str) -> dict[Sequence, float]:
    """Returns the losses of a cell's finished sequences."""
    paths = {sequence: path_of(name, sequence) for sequence in SEQUENCES}
    return {sequence: read_json(path)["loss"] for sequence, path in paths.items() if path.is_file()}


def table() -> str:
    headings = " | ".join(f"{order}, {seed}" for order, seed in SEQUENCES)
    lines = [f"| cell | {headings} | mean |", "|---|" + "---:|" * (len(SEQUENCES) + 1)]
    for name in CELLS:
        losses = screening_losses(name)
        shown = [f"{losses[key]:.4f}" if key in losses else "" for key in SEQUENCES]
        average = f"{mean(losses.values()):.4f}" if losses else ""
        lines.append(f"| `{name}` | {' | '.join([*shown, average])} |")
    return "\n".join(lines)


def confirm(winner: str) -> None:
    fixed = {"seeds": [32, 33, 34], "orders": ["seeded-2", "seeded-3", "seeded-4"]}
    fixed |= {"learning_rates": None, "search": None}
    method, extend, rate = section(winner)
    method["training"] = {"learning_rate": rate}
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


if __name__ == "__main__":
    commands = {
        "screen": screen,
        "table": lambda: print(table()),
        "confirm": confirm,
        "report": report,
    }
    commands[sys.argv[1]](*sys.argv[2:])
