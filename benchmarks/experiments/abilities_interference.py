#!/usr/bin/env python3
"""Measures interference between tasks that conflict: abilities-interference.md.

export BADIT_SUPERNI=/path/to/superni
python benchmarks/experiments/abilities_interference.py    # all stages; resumable
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from cell_losses import difference_columns, say
from held_out import held_out_loss

import badit
from badit.api import plan
from badit.data import AnswerCollator
from badit.evaluation.losses import prompt_losses
from badit.support.environment import environment
from badit.support.files import read_json, write_json
from badit.training.encoding import encoded
from badit.training.fit import fit
from badit.training.loading import load_run

BENCHMARKS = Path(__file__).resolve().parents[1]
RECIPE = BENCHMARKS.parent / "recipes" / "evidence-seeds-cpu.yaml"
RESULTS = BENCHMARKS / "results" / "abilities-interference"
RUNS = BENCHMARKS.parent / "runs" / "abilities-interference"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05},
    "badit": {"name": "badit", "lora_dropout": 0.05},
}
GROUP = 4  # tasks
TOO_SMALL = ("task1572", "task1590", "task639", "task181")  # less than 320 training instances
INSTANCES_OF_COSINES = 32  # per task
RATES = ("1e-3", "2e-3", "4e-3")
SEARCH_SEED = 50
SEEDS = (51, 52, 53)


def selected_tasks() -> list[str]:
    """Returns the group of tasks with the lowest mean corrected cosine before the training."""
    path = RESULTS / "cosines.json"
    if not path.is_file():
        say("cosines: started")
        frames = badit.analyze(
            "smollm2-135m",
            data=os.environ["BADIT_SUPERNI"],
            instances=INSTANCES_OF_COSINES,
            output=RUNS / "cosines",
            progress=False,
        )
        pairs = frames["gradient_overall"]
        of_weights: Any = pairs[pairs["parameters"] == "weights"].to_json(orient="records")
        write_json(path, {"pairs": json.loads(of_weights), "environment": environment()})
    pairs = read_json(path)["pairs"]
    cosines = {
        frozenset((pair["task_a"], pair["task_b"])): pair["corrected_cosine"]
        for pair in pairs
        if pair["conflict"] is not None  # else the pair is not decided
    }
    names = sorted({name for pair in cosines for name in pair if not name.startswith(TOO_SMALL)})
    return list(_lowest_group(names, cosines))


def _lowest_group(names: Sequence[str], cosines: Mapping[frozenset[str], float]) -> tuple[str, ...]:
    means = {}
    for group in combinations(names, GROUP):
        pairs = [frozenset(pair) for pair in combinations(group, 2)]
        if all(pair in cosines for pair in pairs):
            means[group] = fmean(cosines[pair] for pair in pairs)
    return min(means, key=means.__getitem__)


def recipe_of(method: str, tasks: Sequence[str], rate: str, seed: int) -> dict[str, Any]:
    """Returns the recipe's values for a model of one task or of all."""
    values = badit.load_recipe(RECIPE).model_dump(mode="json", exclude_unset=True)
    values |= {"compare": None, "method": METHODS[method]}
    # Recipes have as many clusters as tasks, up to eight.
    values["training"] |= {"learning_rate": float(rate), "seed": seed}
    values["data"] |= {"tasks": list(tasks), "train_per_task": 300, "seed": seed}
    return values


def searched_rate(method: str, tasks: Sequence[str], trained_on: str) -> str:
    """Returns the learning rate with the lowest held-out loss, with a third of the instances.

    Single models share a rate: that with the lowest mean over the tasks.
    """
    groups = [tasks] if trained_on == "joint" else [[task] for task in tasks]
    losses = {}
    for rate in RATES:
        of_rate = []
        for group in groups:
            name = group[0] if len(group) == 1 else "joint"
            values = recipe_of(method, group, rate, SEARCH_SEED)
            values["data"]["train_per_task"] = 100
            path = RESULTS / "search" / f"{method}-{name}@{rate}.json"
            of_rate.append(held_out_loss(values, RUNS / path.stem, path))
        losses[rate] = fmean(of_rate)
    return min(losses, key=losses.__getitem__)


def test_losses(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """Returns the NLL per answer token of each task's test instances after the training."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        say(f"{name}: started")
        run = plan({**values, "output": str(RUNS / name)})
        fit(run, progress=False)
        model, tokenizer = load_run(run)
        losses = {}
        for task in run.tasks:
            examples = encoded(tokenizer, run.recipe, [(task, item) for item in task.test], model)
            size = run.recipe.evaluation.batch_size
            collate = AnswerCollator(tokenizer.pad_token_id)
            batches = [
                collate(examples[start : start + size]) for start in range(0, len(examples), size)
            ]
            sums_P, counts_P = prompt_losses(model, batches)
            losses[task.name] = float(sums_P.sum() / counts_P.sum())
        result = {
            "tasks": losses,
            "environment": run.folder.environment,
            "recipe": run.recipe.model_dump(mode="json", exclude={"output", "compare"}),
        }
        write_json(path, result)
        shutil.rmtree(run.folder.path)
        say(f"{name}: test loss {fmean(losses.values()):.4f}")
    return read_json(path)["tasks"]


def main() -> None:
    tasks = selected_tasks()
    say(f"tasks: {', '.join(tasks)}")
    rates = {
        (method, trained_on): searched_rate(method, tasks, trained_on)
        for trained_on in ("single", "joint")
        for method in METHODS
    }
    say(f"learning rates: {rates}")
    # By seed and method, the interference of each task: the joint model's loss minus the single's.
    interference: dict[tuple[int, str], list[float]] = {}
    for seed in SEEDS:
        for method in METHODS:
            single = {}
            for task in tasks:
                values = recipe_of(method, [task], rates[method, "single"], seed)
                single |= test_losses(values, f"{method}-{task}-{seed}")
            values = recipe_of(method, tasks, rates[method, "joint"], seed)
            joint = test_losses(values, f"{method}-joint-{seed}")
            interference[seed, method] = [joint[task] - single[task] for task in tasks]
    print(table(tasks, interference))


def table(tasks: Sequence[str], interference: Mapping[tuple[int, str], Sequence[float]]) -> str:
    """Returns the interference of each task and its difference between the methods, as Markdown."""
    lines = [
        "| task | LoRA: joint − single | mean | interval | BADIT minus LoRA | mean | interval |",
        "|---|---|---:|---|---|---:|---|",
    ]
    by_task = {task: [index] for index, task in enumerate(tasks)}
    for name, indices in {**by_task, "mean": list(range(len(tasks)))}.items():
        of_method = {
            method: [fmean(interference[seed, method][i] for i in indices) for seed in SEEDS]
            for method in METHODS
        }
        pairs = zip(of_method["badit"], of_method["lora"], strict=True)
        columns = difference_columns(of_method["lora"])
        columns += difference_columns([badit_value - lora for badit_value, lora in pairs])
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines).replace("-0.", "−0.")


if __name__ == "__main__":
    main()
