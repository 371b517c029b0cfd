"""Runs the experiment of extend.md: tasks in sequence with an expert per task.

    python benchmarks/experiments/extend.py screen               # resumable
    python benchmarks/experiments/extend.py table                # of the screening, as Markdown
    python benchmarks/experiments/extend.py confirm own-32@1e-3  # the winner; resumable
    python benchmarks/experiments/extend.py report own-32@1e-3

Needs BADIT_SUPERNI, as the recipe.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from cell_losses import difference_columns
from measured import BENCHMARKS, RECIPES, held_out_loss, measured

import badit
from badit.api import plan
from badit.evaluation.answers import score_model
from badit.metrics.answers import instance_scores
from badit.runs.folder import RunFolder
from badit.runs.resolved import ResolvedRun
from badit.support.files import read_json
from badit.training.encoding import encoded
from badit.training.loading import load_run
from badit.tuner import hooks_of
from badit.tuner.context import RoutingContext
from badit.tuner.extension import nearest_extensions
from badit.tuner.keys import frozen_embedding

RECIPE = RECIPES / "evidence-sequence-cpu.yaml"
SCREENING = BENCHMARKS / "results" / "extend-screening"
CONFIRMATION = BENCHMARKS / "results" / "extend-confirmation"
# Rank of a task's expert, and number of earlier experts that it may use.
VARIANTS = {
    "own-5": (5, 0),
    "own-5-transfer": (5, 4),
    "own-32": (32, 0),
    "own-32-transfer": (32, 4),
}
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

# Of the confirmation: all orders with all seeds. The rates are those of
# benchmarks/results/evidence-sequence-cpu.
CONFIRMED: list[Sequence] = [
    (f"seeded-{order}", seed)
    for order, seed in [
        (2, 32),
        (3, 33),
        (4, 34),
        (2, 33),
        (3, 34),
        (4, 32),
        (2, 34),
        (3, 32),
        (4, 33),
    ]
]
OTHERS = ("gainlora@1e-3", "o-lora@2e-3", "lora@2e-3")
SINGLE = "lora@2e-3"  # also trained on each task alone


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
    compare = badit.load_recipe(RECIPE).compare
    assert compare is not None
    # Without what only a comparison reads.
    return dict(compare.methods[method_name].model_extra or {}), {}, float(rate)


def screen() -> None:
    for name, sequence in jobs():
        held_out_loss(RECIPE, values_of(name, sequence), path_of(SCREENING, name, sequence))
    print(table())


def path_of(folder: Path, name: str, sequence: Sequence) -> Path:
    order, seed = sequence
    return folder / f"{name}-{order}-{seed}.json"


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


def values_of(name: str, sequence: Sequence) -> dict[str, Any]:
    """Returns the recipe's values for a cell."""
    method, extend, rate = section(name)
    order, seed = sequence
    return {
        "method": method,
        "extend": extend,
        "training": {"learning_rate": rate, "seed": seed},
        "data": {"order": order, "seed": seed},
    }


def screening_losses(name: str) -> dict[Sequence, float]:
    """Returns the losses of a cell's finished sequences."""
    results = results_of(SCREENING, name, SEQUENCES)
    return {sequence: result["loss"] for sequence, result in results.items()}


def results_of(
    folder: Path, name: str, sequences: Iterable[Sequence]
) -> dict[Sequence, dict[str, Any]]:
    """Returns the results of a cell that exist."""
    paths = {sequence: path_of(folder, name, sequence) for sequence in sequences}
    return {sequence: read_json(path) for sequence, path in paths.items() if path.is_file()}


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
    gainlora, *others = OTHERS
    # In turn, so that an interrupted experiment has pairs.
    cells = [(name, sequence) for sequence in CONFIRMED for name in (winner, gainlora)]
    one_of_each_order, further = CONFIRMED[:3], CONFIRMED[3:]
    cells += [(name, sequence) for name in others for sequence in one_of_each_order]
    for seed in sorted({seed for _, seed in CONFIRMED}):
        tasks = plan(str(RECIPE), **values_of(SINGLE, ("seeded-0", seed))).tasks
        cells += [(SINGLE, (task.name, seed)) for task in tasks]
    cells += [(name, sequence) for name in others for sequence in further]
    for name, sequence in cells:
        train_and_score(name, sequence)
    report(winner)


def train_and_score(name: str, sequence: Sequence) -> None:
    """Trains a cell; scores each task directly after its training, and all after the last one.

    In place of an order there may be the name of a task, which is then the only one.
    """
    values = values_of(name, sequence)
    values["data"] |= {"test_per_task": 100}
    if sequence[0].startswith("task"):
        values["data"] |= {"order": None, "tasks": [sequence[0]]}
    measured(RECIPE, values, path_of(CONFIRMATION, name, sequence), _scores)


def _scores(run: ResolvedRun) -> dict[str, Any]:
    learnt: dict[str, Any] = {}
    for folder, tasks in run.stages[:-1]:
        learnt |= scores_of(run, folder, tasks)
    final = scores_of(run, run.folder, run.tasks)
    last = run.tasks[-1].name
    scores: dict[str, Any] = {"learnt": {**learnt, last: final[last]}, "final": final}
    if run.recipe.extend.own_experts and run.recipe.method["name"] == "badit":
        scores["found"] = share_of_found_tasks(run)
    return scores


def scores_of(run: ResolvedRun, folder: RunFolder, tasks: list[Any]) -> dict[str, Any]:
    """Returns the scores of every test instance, by task, with the weights in a folder."""
    model, tokenizer = load_run(run, folder)
    _, predictions = score_model(model, tokenizer, run.recipe, tasks, "test", progress=False)
    return instance_scores(predictions)


def means_of(scores: Mapping[str, Any], metric: str = "rouge_l") -> list[float]:
    """Returns a metric's means, by task."""
    return [mean(of_task[metric]) for _, of_task in sorted(scores.items())]


class Measures(NamedTuple):
    """What the report has of a run, in points of Rouge-L; the NLL in nats."""

    average_performance: float
    learning: float  # mean over the tasks, directly after the training of each
    forgetting: float  # learning minus the final score, mean over all tasks but the last one
    forward_transfer: float  # learning minus a LoRA of the task alone
    nll: float


def measures_of(result: Mapping[str, Any], alone: float) -> Measures:
    learnt, final = means_of(result["learnt"]), means_of(result["final"])
    lost = sum(learnt) - sum(final)  # nothing of the last task
    return Measures(
        mean(final),
        mean(learnt),
        lost / (len(final) - 1),
        mean(learnt) - alone,
        mean(means_of(result["final"], "nll")),
    )


def report(winner: str) -> None:
    """Prints the measures of all methods and the differences to the winner."""
    alone = {}
    for seed in sorted({seed for _, seed in CONFIRMED}):
        paths = sorted(CONFIRMATION.glob(f"{SINGLE}-task*-{seed}.json"))
        scores = [means_of(read_json(path)["final"])[0] for path in paths]
        alone[seed] = mean(scores) if scores else math.nan
    print(f"one LoRA per task: {', '.join(f'{value:.1f}' for value in alone.values())}")

    measures: dict[str, dict[Sequence, Measures]] = {}
    for name in (winner, *OTHERS):
        results = results_of(CONFIRMATION, name, CONFIRMED)
        if not results:
            continue
        measures[name] = {
            sequence: measures_of(result, alone[sequence[1]])
            for sequence, result in results.items()
        }
        columns = [
            f"{label.replace('_', ' ')} {mean(values):.2f}"
            for label, values in zip(
                Measures._fields, zip(*measures[name].values(), strict=True), strict=True
            )
        ]
        trained = max(
            result["environment"]["training"]["trainable_parameters"] for result in results.values()
        )
        print(f"{name}: {', '.join(columns)}; {len(results)} runs, {trained:,} trained per task")
        shares = [result["found"] for result in results.values() if "found" in result]
        if shares:
            print(f"  prompts that find their task: {mean(shares):.1%}, at least {min(shares):.1%}")

    for name in measures.keys() - {winner}:
        differences = {
            sequence: measures[winner][sequence].average_performance - theirs.average_performance
            for sequence, theirs in measures[name].items()
            if sequence in measures[winner]
        }
        by_order: dict[str, list[float]] = {}
        for (order, _), difference in differences.items():
            by_order.setdefault(order, []).append(difference)
        _, average, interval = difference_columns([*differences.values()], "+.2f")
        orders = [f"{order} {mean(values):+.1f}" for order, values in sorted(by_order.items())]
        print(f"{winner} − {name}: {average} {interval}; {', '.join(orders)}")


def share_of_found_tasks(run: ResolvedRun) -> float:
    """Returns the share of a run's test prompts that get the clusters of their own task."""
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
