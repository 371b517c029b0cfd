"""Runs the experiment of extend.md: tasks in sequence with an expert per task.

    python benchmarks/experiments/extend.py screen              # resumable
    python benchmarks/experiments/extend.py table               # of the screening, as Markdown
    python benchmarks/experiments/extend.py confirm own-5@2e-3  # the winner; resumable
    python benchmarks/experiments/extend.py report own-5@2e-3

Needs BADIT_SUPERNI, as the recipe.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from held_out import held_out_loss
from scipy import stats

import badit
from badit.comparison.results import SINGLE_TASK
from badit.runs.folder import RunFolder
from badit.runs.resolved import open_run
from badit.support.files import read_json
from badit.training.encoding import encoded
from badit.training.loading import load_run
from badit.tuner import hooks_of
from badit.tuner.abilities import frozen_embedding
from badit.tuner.context import RoutingContext
from badit.tuner.extension import nearest_extensions

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
    "own-32@5e-4",
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
    losses = {
        name: screening_losses(name)[SEQUENCES[0]] for name in CELLS if screening_losses(name)
    }
    variants = losses.keys() - {REFERENCE}
    limit = DROPPED + min(losses[name] for name in variants)
    remaining = [name for name in variants if losses[name] <= limit]
    if len(remaining) == 1:
        return  # the winner
    for sequence in SEQUENCES[1:]:
        for name in (*remaining, REFERENCE):
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
    ours = cells_of(RUNS / "winner", winner)
    print("| method | average performance | learning | forgetting | forward transfer | trained |")
    print("|---|---:|---:|---:|---:|---:|")
    single_tasks = {
        seed: cell["scores"]["tasks"]
        for (_, seed), cell in cells_of(RUNS / "others", "lora" + SINGLE_TASK).items()
    }
    cells = {winner: ours, **{name: cells_of(RUNS / "others", name) for name in OTHERS}}
    for name, of_method in cells.items():
        measures = [measures_of(cell, single_tasks[seed]) for (_, seed), cell in of_method.items()]
        columns = [
            f"{mean(values):.1f} ± {stdev(values):.1f}" for values in zip(*measures, strict=True)
        ]
        trained = max(trained_parameters(cell) for cell in of_method.values())
        print(f"| `{name}` | {' | '.join(columns)} | {trained:,} |")

    for name in OTHERS:
        theirs = cells[name]
        differences = {
            key: ours[key]["scores"]["rouge_l"] - theirs[key]["scores"]["rouge_l"]
            for key in ours.keys() & theirs.keys()
        }
        values = list(differences.values())
        low, high = stats.t.interval(0.95, len(values) - 1, mean(values), stats.sem(values))
        print(f"{winner} − {name}: {mean(values):+.1f} [{low:.1f}, {high:.1f}]")
        for order in sorted({order for order, _ in differences}):
            of_order = [value for key, value in differences.items() if key[0] == order]
            print(f"  {order}: {mean(of_order):+.1f} over {len(of_order)} seeds")

    shares = [share_of_found_tasks(folder) for folder in run_folders(RUNS / "winner")]
    print(f"test prompts that find their task: {mean(shares):.1%}, at least {min(shares):.1%}")


def cells_of(folder: Path, method: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Returns the finished cells of a method, by order and seed."""
    return {
        (cell["order"], cell["seed"]): cell
        for cell in read_json(folder / "results.json")["cells"]
        if cell["method"] == method and cell["selected"] and cell["status"] == "done"
    }


def measures_of(cell: Mapping[str, Any], single: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns average performance, learning, forgetting and forward transfer of a run.

    Learning is the mean score of each task directly after its training. Forward transfer is that
    minus the score of a LoRA of this task alone.
    """
    learnt = [row[number] for number, row in enumerate(cell["matrix"])]
    alone = [single[task]["rouge_l"] for task in cell["tasks"]]
    scores = cell["continual"]["standard"]
    return (
        scores["average_performance"],
        mean(learnt),
        scores["forgetting"],
        mean(learnt) - mean(alone),
    )


def trained_parameters(cell: Mapping[str, Any]) -> int:
    """Returns the number of parameters that the last task trains."""
    return cell["environment"]["training"]["trainable_parameters"]


def run_folders(folder: Path) -> Iterator[Path]:
    """Yields the runs' folders of a comparison."""
    for path in sorted(folder.glob("**/adapter")):
        if "stages" not in path.parts:
            yield path.parent


def share_of_found_tasks(folder: Path) -> float:
    """Returns the share of a run's test prompts that get the clusters of their own task."""
    run = open_run(RunFolder(folder))
    model, tokenizer = load_run(run)
    hooks: Any = hooks_of(model)
    (adapter,) = hooks.active_adapters
    holder = RoutingContext.of(hooks.model).extension_holders[adapter]
    embedding = frozen_embedding(hooks.model)
    own_numbers = {
        task: number
        for number, extension in enumerate(hooks.peft_config[adapter].extensions, start=1)
        for task in extension.tasks
    }
    found = []
    for task in run.tasks:
        examples = encoded(tokenizer, run.recipe, [(task, item) for item in task.test], None)
        means_SE = torch.stack(
            [
                embedding(torch.tensor(example["input_ids"][: example["prompt_length"]]))
                .float()
                .mean(dim=0)
                for example in examples
            ]
        )
        number_S = nearest_extensions(holder, adapter, means_SE)
        # The first task has the run's own experts, number 0.
        found += (number_S == own_numbers.get(task.name, 0)).tolist()
    return mean(found)


if __name__ == "__main__":
    commands = {
        "screen": screen,
        "table": lambda: print(table()),
        "confirm": confirm,
        "report": report,
    }
    commands[sys.argv[1]](*sys.argv[2:])
