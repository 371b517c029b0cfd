"""Measures how much fixing the gates of runs changes the loss on test instances.

    python benchmarks/fixed_gates.py runs/evidence-cpu/badit/lr-0.002/seed-{1,2,3}

For each run: the NLL per answer token of every instance with the run's own gates, with the mean
gates over all tasks (one LoRA) and with the mean gates of its task (a LoRA per task), as `badit
export` writes them and PEFT loads them. Writes results/fixed-gates.json after each run and
continues from there. Question: docs/experiments/fixed-gates.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from peft import PeftModel

import badit
from badit.analysis.gates import GATES_FILE
from badit.data import AnswerCollator, batches_by_task
from badit.evaluation.losses import prompt_losses
from badit.export.exporting import Export
from badit.metrics.statistics import paired_bootstrap
from badit.support.environment import environment
from badit.support.files import read_json, write_json
from badit.training.encoding import encoded
from badit.training.loading import load_base

RESULTS = Path(__file__).parent / "results" / "fixed-gates.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", help="folders of runs of the same recipe with different seeds"
    )
    parser.add_argument(
        "--instances", type=int, default=20, help="test instances of each task (default: 20)"
    )
    options = parser.parse_args()
    runs: dict[str, Any] = read_json(RESULTS)["runs"] if RESULTS.is_file() else {}
    for folder in options.runs:
        run = badit.Run(folder)
        seed = str(run.recipe.training.seed)
        if seed not in runs:
            runs[seed] = losses_of(run, options.instances)
            config = run.recipe.model_dump(mode="json", exclude={"compare", "output"})
            about = {"config": config, "environment": environment(), "instances": options.instances}
            found = {way: costs(runs, way) for way in ("mean", "task")}
            write_json(RESULTS, {**about, "runs": runs, "costs": found})
            print(f"seed {seed}: {found}", flush=True)


def losses_of(run: badit.Run, instances: int) -> dict[str, dict[str, list[float]]]:
    """Returns the NLL of each task's first instances with the gates of a way: run, mean or task."""
    recipe = run.recipe
    tasks = badit.plan(recipe).tasks
    with TemporaryDirectory() as folder:
        of_task = run.export(f"{folder}/tasks", all_tasks=True, progress=False).tasks
        mean = mean_export(run, of_task, Path(folder))
        model, tokenizer = run.load()
        batches = batches_of(
            recipe,
            model,
            tokenizer,
            [(task, one) for task in tasks for one in task.test[:instances]],
        )
        of_mean = loaded(recipe, mean)
        return {
            "run": {task: measured(model, batches[task]) for task in batches},
            "task": {
                task: measured(loaded(recipe, of_task[task]), batches[task]) for task in batches
            },
            "mean": {task: measured(of_mean, batches[task]) for task in batches},
        }


def batches_of(
    recipe: Any, model: Any, tokenizer: Any, instances: Sequence[tuple[Any, Any]]
) -> dict[str, list[Any]]:
    """Returns the batches of each task, from pairs of a task and one of its instances."""
    examples = encoded(tokenizer, recipe, instances, model)
    examples.sort(
        key=lambda example: len(example["input_ids"])
    )  # batches of similar length have little padding
    batches = batches_by_task(examples, AnswerCollator(tokenizer.pad_token_id, with_tasks=True), 10)
    return {name: list(of_task) for name, of_task in batches.items()}


def measured(model: Any, batches: list[Any]) -> list[float]:
    """Returns the NLL per answer token of each instance."""
    sums_P, counts_P = prompt_losses(model, batches)
    return (sums_P / counts_P).tolist()


def loaded(recipe: Any, exported: Export) -> PeftModel:
    """Returns the base model with an export, as PEFT loads it."""
    return PeftModel.from_pretrained(load_base(recipe)[0], str(exported.folder)).eval()


def mean_export(run: badit.Run, of_task: Mapping[str, Export], folder: Path) -> Export:
    """Exports a run with its exports' mean gates, also clusters, which `badit export` refuses."""
    gates = [read_json(each.folder / GATES_FILE) for each in of_task.values()]
    write_json(
        folder / "mean.json",
        {name: np.mean([of[name] for of in gates], axis=0).tolist() for name in gates[0]},
    )
    return run.export(folder / "mean", gates=folder / "mean.json", progress=False)


def costs(runs: dict[str, Any], way: str) -> dict[str, float]:
    """Returns the mean difference to the runs' own gates, over tasks, with its interval."""
    tasks = next(iter(runs.values()))["run"]
    differences = {
        t: np.array([np.subtract(of[way][t], of["run"][t]) for of in runs.values()]) for t in tasks
    }
    return paired_bootstrap(differences)._asdict()


if __name__ == "__main__":
    main()
