"""Measures how much fixing the gates of runs changes the loss on test instances.

    python benchmarks/fixed_gates.py runs/evidence-cpu/badit/lr-0.002/seed-{1,2,3}

For each run: the NLL per answer token of every instance with the run's own gates, with the mean
gates over all tasks (one LoRA) and with the mean gates of its task (a LoRA per task), as `badit
export` writes them and PEFT loads them. Writes results/fixed-gates.json after each run and
continues from there. Question: benchmarks/experiments/fixed-gates.md.
"""

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
BATCH_SIZE = 10
Losses = dict[str, list[float]]  # of the instances of each task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of runs with different seeds")
    parser.add_argument("--instances", type=int, default=20, help="of each task (default: 20)")
    options = parser.parse_args()

    runs: dict[str, dict[str, Losses]] = read_json(RESULTS)["runs"] if RESULTS.is_file() else {}
    for folder in options.runs:
        run = badit.Run(folder)
        seed = str(run.recipe.training.seed)
        if seed in runs:
            continue
        runs[seed] = losses_of(run, options.instances)
        content = {
            "config": run.recipe.model_dump(mode="json", exclude={"compare", "output"}),
            "environment": environment(),
            "instances": options.instances,
            "runs": runs,
            "costs": {gates: cost(list(runs.values()), gates) for gates in ("mean", "task")},
        }
        write_json(RESULTS, content)
        print(f"seed {seed}: {content['costs']}", flush=True)


def losses_of(run: badit.Run, instances: int) -> dict[str, Losses]:
    """Returns the NLL of the first instances of each task with the gates run, mean and task."""
    recipe = run.recipe
    pairs = [
        (task, instance) for task in badit.plan(recipe).tasks for instance in task.test[:instances]
    ]
    with TemporaryDirectory() as folder:
        of_task = run.export(f"{folder}/tasks", all_tasks=True, progress=False).tasks
        with_mean = loaded(recipe, mean_export(run, of_task, Path(folder)))
        model, tokenizer = run.load()
        batches = batches_of(recipe, model, tokenizer, pairs)
        return {
            "run": {task: measured(model, batches[task]) for task in batches},
            "task": {
                task: measured(loaded(recipe, of_task[task]), batches[task]) for task in batches
            },
            "mean": {task: measured(with_mean, batches[task]) for task in batches},
        }


def batches_of(
    recipe: Any, model: Any, tokenizer: Any, instances: Sequence[tuple[Any, Any]]
) -> dict[str, list[Any]]:
    """Returns the batches of each task, from pairs of a task and one of its instances."""
    examples = encoded(tokenizer, recipe, instances, model)
    # Batches of similar length have little padding.
    examples.sort(key=lambda example: len(example["input_ids"]))
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, BATCH_SIZE)
    return {name: list(of_task) for name, of_task in batches.items()}


def measured(model: Any, batches: list[Any]) -> list[float]:
    """Returns the NLL per answer token of each instance."""
    sums_P, counts_P = prompt_losses(model, batches)
    return (sums_P / counts_P).tolist()


def loaded(recipe: Any, exported: Export) -> PeftModel:
    """Returns the base model with an export, as PEFT loads it."""
    base, _ = load_base(recipe)
    return PeftModel.from_pretrained(base, str(exported.folder)).eval()


def mean_export(run: badit.Run, of_task: Mapping[str, Export], folder: Path) -> Export:
    """Exports a run with the mean of the gates of its exports per task.

    `badit export` refuses the mean gates of several tasks for clusters.
    """
    gates = [read_json(export.folder / GATES_FILE) for export in of_task.values()]
    means = {
        name: np.mean([of_export[name] for of_export in gates], axis=0).tolist()
        for name in gates[0]
    }
    write_json(folder / "mean.json", means)
    return run.export(folder / "mean", gates=folder / "mean.json", progress=False)


def cost(runs: list[dict[str, Losses]], gates: str) -> dict[str, float]:
    """Returns the mean difference of fixed gates to the runs' own, with its interval."""
    differences = {
        task: np.array([np.subtract(run[gates][task], run["run"][task]) for run in runs])
        for task in runs[0]["run"]
    }
    return paired_bootstrap(differences)._asdict()


if __name__ == "__main__":
    main()
