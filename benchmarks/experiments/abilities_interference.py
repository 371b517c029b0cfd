#!/usr/bin/env python3
"""Measures interference between tasks that conflict: abilities-interference.md.

export BADIT_SUPERNI=/path/to/superni
python benchmarks/experiments/abilities_interference.py    # all stages; resumable
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from cell_losses import difference_columns, say
from measured import BENCHMARKS, RECIPES, held_out_loss, measured

import badit
from badit.data import AnswerCollator, batches_by_task
from badit.evaluation.losses import prompt_losses
from badit.runs.resolved import ResolvedRun
from badit.support.environment import environment
from badit.support.files import read_json, write_json
from badit.training.encoding import encoded
from badit.training.loading import load_run

RECIPE = RECIPES / "evidence-seeds-cpu.yaml"
RESULTS = BENCHMARKS / "results" / "abilities-interference"
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
            output=BENCHMARKS.parent / "runs" / RESULTS.name / "cosines",
            progress=False,
        )
        pairs = frames["gradient_overall"]
        of_weights: Any = pairs[pairs["parameters"] == "weights"].to_json(orient="records")
        path.parent.mkdir(parents=True, exist_ok=True)
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


def values_of(
    method: str, tasks: Sequence[str], rate: str, seed: int, train_per_task: int = 300
) -> dict[str, Any]:
    """Returns the recipe's values for a model of one task or of all."""
    return {
        # Recipes have as many clusters as tasks, up to eight.
        "method": METHODS[method],
        "training": {"learning_rate": float(rate), "seed": seed},
        "data": {"tasks": list(tasks), "train_per_task": train_per_task, "seed": seed},
    }


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
            values = values_of(method, group, rate, SEARCH_SEED, train_per_task=100)
            path = RESULTS / "search" / f"{method}-{name}@{rate}.json"
            of_rate.append(held_out_loss(RECIPE, values, path))
        losses[rate] = fmean(of_rate)
    return min(losses, key=losses.__getitem__)


def test_losses(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """Returns the NLL per answer token of each task's test instances after the training."""
    return measured(RECIPE, values, RESULTS / f"{name}.json", _test_losses)["tasks"]


def _test_losses(run: ResolvedRun) -> dict[str, Any]:
    model, tokenizer = load_run(run)
    pairs = [(task, instance) for task in run.tasks for instance in task.test]
    examples = encoded(tokenizer, run.recipe, pairs, model)
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, run.recipe.evaluation.batch_size)
    losses = {}
    for task, of_task in batches.items():
        sums_P, counts_P = prompt_losses(model, of_task)
        losses[task] = float(sums_P.sum() / counts_P.sum())
    return {"tasks": losses}


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
                values = values_of(method, [task], rates[method, "single"], seed)
                single |= test_losses(values, f"{method}-{task}-{seed}")
            values = values_of(method, tasks, rates[method, "joint"], seed)
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
