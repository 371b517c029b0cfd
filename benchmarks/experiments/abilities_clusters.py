#!/usr/bin/env python3
"""Measures numbers of clusters and of tasks for BADIT's default: abilities-clusters.md.

export BADIT_SUPERNI=/path/to/superni
python benchmarks/experiments/abilities_clusters.py          # trains all cells; resumable
python benchmarks/experiments/abilities_clusters.py table    # prints the results as Markdown
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cell_losses import difference_columns
from measured import BENCHMARKS, RECIPES, held_out_loss

from badit.support.files import read_json

RECIPE = RECIPES / "evidence-seeds-cpu.yaml"
RESULTS = BENCHMARKS / "results" / "abilities-clusters"
SEEDS = (35, 36, 37)
# Every third and two of three of the fifteen tasks, by name.
# fmt: off
ALL_TASKS = [
    "002", "073", "1290", "1510", "1572", "1590", "1687", "1729",
    "181", "363", "511", "591", "639", "748", "875",
]
# fmt: on
TASKS = {5: ALL_TASKS[::3], 10: [task for i, task in enumerate(ALL_TASKS) if i % 3], 15: ALL_TASKS}
CLUSTERS = (8, 16, 32)
LORA = {"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05}


def cells_of(num_tasks: int) -> dict[str, tuple[dict[str, Any], float]]:
    """Returns the method section and the learning rate of the cells of a number of tasks."""
    numbers = sorted({*CLUSTERS, num_tasks})
    cells: dict[str, tuple[dict[str, Any], float]] = {
        f"badit-{number}": ({"name": "badit", "lora_dropout": 0.05, "num_clusters": number}, 2e-3)
        for number in numbers
    }
    return {"lora": (LORA, 1e-3), **cells}


def path_of(cell: str, num_tasks: int, seed: int) -> Path:
    return RESULTS / f"{cell}-{num_tasks}-tasks-{seed}.json"


def train() -> None:
    for seed in SEEDS:
        for num_tasks in TASKS:
            for cell, (method, rate) in cells_of(num_tasks).items():
                values = {
                    "method": method,
                    "training": {"learning_rate": rate, "seed": seed},
                    "data": {"tasks": TASKS[num_tasks], "seed": seed},
                }
                held_out_loss(RECIPE, values, path_of(cell, num_tasks, seed))


def table() -> str:
    lines = [
        "| tasks | cell | seeds | held-out loss | minus the row's best | minus LoRA |",
        "|---:|---|---:|---|---:|---|",
    ]
    for num_tasks in TASKS:
        losses = {}
        for cell in cells_of(num_tasks):
            losses[cell] = [read_json(path_of(cell, num_tasks, seed))["loss"] for seed in SEEDS]
        of_lora = losses.pop("lora")
        lines.append(f"| {num_tasks} | `lora` | {_spread(of_lora)} | | |")
        best = min(fmean(of_cell) for of_cell in losses.values())
        for cell, of_cell in losses.items():
            differences = [loss - lora for loss, lora in zip(of_cell, of_lora, strict=True)]
            _, mean, interval = difference_columns(differences, "+.3f")
            lines.append(
                f"| {num_tasks} | `{cell}` | {_spread(of_cell)} | {fmean(of_cell) - best:+.4f} "
                f"| {mean} {interval} |"
            )
    return "\n".join(lines).replace("-0.", "−0.")


def _spread(losses: Sequence[float]) -> str:
    return f"{len(losses)} | {fmean(losses):.4f} ± {stdev(losses):.4f}"


def main() -> None:
    if sys.argv[1:] != ["table"]:
        train()
    print(table())


if __name__ == "__main__":
    main()
