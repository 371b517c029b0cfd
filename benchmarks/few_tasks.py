"""Measures the default with few tasks, by its number of clusters.

Plan and results: benchmarks/experiments/few-tasks.md

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/few_tasks.py 3        # trains and measures runs with three tasks; resumable
    python benchmarks/few_tasks.py 5
    python benchmarks/few_tasks.py table    # prints the results

Each line of results/few-tasks/results.jsonl has the losses of a run, TASKS-METHOD-SEED: the NLL
per answer token of every held-out training instance with the run's own gates ("run") and, with
clusters, with the mean gates of its task ("task"), as `badit export --all-tasks` writes them and
PEFT loads them.
"""

import itertools
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from fixed_gates import Losses, batches_of, loaded, measured

import badit
from badit.metrics.statistics import paired_bootstrap
from badit.support.environment import environment
from badit.support.files import append_to_log, read_jsonl

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "few-tasks" / "results.jsonl"
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
INSTANCES = 300  # training instances in all
HELD_OUT = 50  # held-out training instances of each task
SEEDS = range(3)


def methods(tasks: int) -> dict[str, dict[str, Any]]:
    """Returns the methods by name, with the learning rates of the recipe's experiment."""
    lora = {"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05}
    settings = {"lora": {"method": lora, "rate": 1e-3}}
    for clusters in (16, 8, tasks):
        method = {"name": "cluster-gates", "num_experts": 8, "r": 4, "num_clusters": clusters}
        settings[f"badit-{clusters}"] = {"method": method, "rate": 2e-3}
    return settings


def runs() -> dict[str, Any]:
    """Returns the losses of the finished runs, by name."""
    return {run["name"]: run["losses"] for run in read_jsonl(RESULTS)}


def train(tasks: int) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for seed, (method, settings) in itertools.product(SEEDS, methods(tasks).items()):
        name = f"{tasks}-{method}-{seed}"
        if name in runs():
            continue
        overrides = {
            "data.tasks": TASKS[tasks],
            "data.train_per_task": INSTANCES // tasks,
            "data.validation_per_task": HELD_OUT,
            "method": settings["method"],
            "training.learning_rate": settings["rate"],
            "training.seed": seed,
            "compare": None,
            "output": f"runs/few-tasks/{name}",
        }
        texts = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        run = badit.train(badit.load_recipe(RECIPE, texts))
        result = {
            "name": name,
            "config": run.recipe.model_dump(mode="json", exclude={"output"}),
            "environment": environment(),
            "losses": losses_of(run, exported=method != "lora"),
        }
        append_to_log(RESULTS, result)


def losses_of(run: badit.Run, *, exported: bool) -> dict[str, Losses]:
    recipe = run.recipe
    model, tokenizer = run.load()
    held_out = [
        (task, instance) for task in badit.plan(recipe).tasks for instance in task.validation
    ]
    batches = batches_of(recipe, model, tokenizer, held_out)
    losses = {"run": {task: measured(model, batches[task]) for task in batches}}
    if exported:
        with TemporaryDirectory() as folder:
            exports = run.export(f"{folder}/tasks", all_tasks=True, progress=False).tasks
            losses["task"] = {
                task: measured(loaded(recipe, export), batches[task])
                for task, export in exports.items()
            }
    return losses


def difference(
    ours: list[dict[str, Losses]], theirs: list[dict[str, Losses]], gates: str = "run"
) -> str:
    """Returns the mean difference of paired runs and its interval; ``gates`` are those of ours."""
    by_task = {
        task: np.array(
            [
                np.subtract(our_run[gates][task], their_run["run"][task])
                for our_run, their_run in zip(ours, theirs, strict=True)
            ]
        )
        for task in theirs[0]["run"]
    }
    mean, low, high, *_ = paired_bootstrap(by_task)
    return f"{mean:+.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")


def table() -> pd.DataFrame:
    finished = runs()
    rows = []
    for tasks in TASKS:
        of_method = {
            name: [finished[f"{tasks}-{name}-{seed}"] for seed in SEEDS] for name in methods(tasks)
        }
        for name, losses in of_method.items():
            row = {"tasks": tasks, "method": name}
            for seed in SEEDS:
                means = [np.mean(of_task) for of_task in losses[seed]["run"].values()]
                row[f"seed {seed}"] = f"{np.mean(means):.3f}"
            for other in ("lora", "badit-16"):
                is_compared = name not in ("lora", other)
                row[f"vs {other}"] = difference(losses, of_method[other]) if is_compared else ""
            if name != "lora":
                row["cost of an export per task"] = difference(losses, losses, "task")
            rows.append(row)
    return pd.DataFrame(rows).fillna("")


if __name__ == "__main__":
    if sys.argv[1] == "table":
        print(table().to_markdown(index=False, disable_numparse=True))
    else:
        train(int(sys.argv[1]))
