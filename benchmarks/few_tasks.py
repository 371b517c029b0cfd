"""Measures the default with few tasks, by its number of clusters (docs/experiments/few-tasks.md).

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/few_tasks.py 3    # runs with three tasks; resumable
    python benchmarks/few_tasks.py 5
    python benchmarks/few_tasks.py table    # prints the results

Each run's losses are in results/few-tasks/TASKS-METHOD-SEED.json: the NLL per answer token of every
held-out training instance with the run's own gates ("run") and, with clusters, with the mean gates
of its task ("task"), as `badit export --all-tasks` writes them and PEFT loads them.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from fixed_gates import batches_of, loaded, measured

import badit
from badit.metrics.statistics import paired_bootstrap
from badit.runs.resolved import resolve
from badit.support.environment import environment
from badit.support.files import read_json, write_json
from badit.training.fit import fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "few-tasks"
RECIPE = HERE.parent / "recipes" / "evidence-cpu.yaml"
THREE = [
    "task073_commonsenseqa_answer_generation",
    "task181_outcome_extraction",
    "task363_sst2_polarity_classification",
]
TASKS = {
    3: THREE,
    5: [*THREE, "task639_multi_woz_user_utterance_generation", "task875_emotion_classification"],
}
INSTANCES, HELD_OUT = 300, 50  # training instances in all, held-out training instances of each task
SEEDS = range(3)


def methods(tasks: int) -> dict[str, dict[str, Any]]:
    """Returns the methods by name, with the learning rates of the recipe's experiment."""
    lora = {
        "method": {"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05},
        "rate": 1e-3,
    }
    clusters = {
        count: {"name": "badit", "num_experts": 8, "r": 4, "num_clusters": count}
        for count in (16, 8, tasks)
    }
    return {"lora": lora} | {
        f"badit-{count}": {"method": method, "rate": 2e-3} for count, method in clusters.items()
    }


def train(tasks: int) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed, (name, settings) in itertools.product(SEEDS, methods(tasks).items()):
        result = RESULTS / f"{tasks}-{name}-{seed}.json"
        if not result.is_file():
            overrides = {
                "data.tasks": TASKS[tasks],
                "data.train_per_task": INSTANCES // tasks,
                "data.validation_per_task": HELD_OUT,
                "method": settings["method"],
                "training.learning_rate": settings["rate"],
                "training.seed": seed,
                "compare": None,
                "output": f"runs/few-tasks/{tasks}-{name}-{seed}",
            }
            run = fit(
                badit.load_recipe(
                    RECIPE, [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
                )
            )
            about = {
                "config": run.recipe.model_dump(mode="json", exclude={"output"}),
                "environment": environment(),
            }
            losses = losses_of(badit.Run(run), exported=name != "lora")
            write_json(result, {**about, "losses": losses})


def losses_of(run: badit.Run, *, exported: bool) -> dict[str, dict[str, list[float]]]:
    recipe = run.recipe
    model, tokenizer = run.load()
    held_out = [
        (task, one) for task in resolve(recipe, split="validation").tasks for one in task.validation
    ]
    batches = batches_of(recipe, model, tokenizer, held_out)
    losses = {"run": {task: measured(model, batches[task]) for task in batches}}
    if exported:
        with TemporaryDirectory() as folder:
            exports = run.export(f"{folder}/tasks", all_tasks=True, progress=False).tasks
            losses["task"] = {
                task: measured(loaded(recipe, one), batches[task]) for task, one in exports.items()
            }
    return losses


def table() -> pd.DataFrame:
    rows = []
    for tasks in TASKS:
        found = {
            name: [read_json(RESULTS / f"{tasks}-{name}-{seed}.json")["losses"] for seed in SEEDS]
            for name in methods(tasks)
        }

        def difference(one: str, other: str, way: str = "run", found: Any = found) -> str:
            pairs = zip(found[one], found[other], strict=True)
            by_task = [
                {task: np.subtract(a[way][task], b["run"][task]) for task in a[way]}
                for a, b in pairs
            ]
            one_by_task = {task: np.array([of[task] for of in by_task]) for task in by_task[0]}
            mean, low, high, *_ = paired_bootstrap(one_by_task)
            return f"{mean:+.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")

        for name, runs in found.items():
            means = [np.mean([np.mean(of_task) for of_task in run["run"].values()]) for run in runs]
            row = {"tasks": tasks, "method": name} | {
                f"seed {seed}": f"{means[seed]:.3f}" for seed in SEEDS
            }
            row["vs lora"] = "" if name == "lora" else difference(name, "lora")
            row["vs badit-16"] = (
                "" if name in ("lora", "badit-16") else difference(name, "badit-16")
            )
            row["cost of an export per task"] = (
                "" if name == "lora" else difference(name, name, "task")
            )
            rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    if sys.argv[1] == "table":
        print(table().to_markdown(index=False, disable_numparse=True))
    else:
        train(int(sys.argv[1]))
