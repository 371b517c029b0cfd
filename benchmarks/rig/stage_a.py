#!/usr/bin/env python3
"""Stage A of the rig experiments: run every cell without a result.

Plan and results: benchmarks/experiments/rig-a.md

    python benchmarks/rig/stage_a.py search      # learning rates, on a third of the training data
    python benchmarks/rig/stage_a.py finals      # five seeds per cell, three with gates

An interrupted run leaves no result and is repeated. Results go to benchmarks/results/rig-a.
"""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from results import runs_in

HERE = Path(__file__).parent
OUT = HERE.parent / "results" / "rig-a"
Cell = tuple[str, str]  # adapter and optimizer

# Optimizer: rig options and the three initial learning rates of the search, in ascending order.
OPTIMIZERS = {
    "adamw": (["--opt", "adamw"], [1e-3, 2e-3, 4e-3]),
    "lora+4": (["--opt", "adamw", "--b-rate", "4"], [5e-4, 1e-3, 2e-3]),
    "lora+16": (["--opt", "adamw", "--b-rate", "16"], [2.5e-4, 5e-4, 1e-3]),
    "orthogonal": (["--opt", "orthogonal"], [1e-3, 2e-3, 4e-3]),
    "riemannian": (["--opt", "riemannian"], [5e-4, 1e-3, 2e-3]),  # PEFT's, for plain LoRA only
}
# Adapter: rig options. Routers have their own learning rate, relative to that of the factors.
DIRECTIONS = ["--init", "dirs"]
EXPERT = [*DIRECTIONS, "--gate", "expert"]
COMPONENT = [*DIRECTIONS, "--gate", "component", "--act", "exp", "--router-rate", "0.3"]
ADAPTERS = {
    "lora": ["--init", "lora"],
    "directions": DIRECTIONS,
    "oracle": [*DIRECTIONS, "--gate", "oracle", "--act", "exp", "--router-rate", "3"],
    "expert": [*EXPERT, "--router-rate", "0.3"],
    # Used by stage B.
    "expert-1": EXPERT,
    "shared": [*EXPERT, "--router-rate", "0.3", "--shared"],
    "component": COMPONENT,
    "component-fixed": [*COMPONENT, "--fixed-projection"],
}
PLAIN: list[Cell] = [
    *itertools.product(("lora", "directions"), ("adamw", "lora+4", "lora+16", "orthogonal")),
    ("lora", "riemannian"),
]
# The optimizers and seeds of cells with gates (the second change in the plan).
GATED: list[Cell] = [*itertools.product(("oracle", "expert"), ("adamw", "orthogonal"))]
SEEDS = range(5)
GATED_SEEDS = range(3)
SEARCH = ["--train", "100"]
TASKS = ["073", "1510", "1687", "181", "363", "591", "639", "748", "875"]


def run(name: str, options: Sequence[str]) -> float:
    """Returns the held-out NLL of a run; starts the run if it has no result."""
    if name not in runs_in(OUT):
        command = [sys.executable, str(HERE / "rig.py"), "--name", name, "--out", str(OUT)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *options], check=True, env=environment)
    nll = runs_in(OUT)[name]["nll"]
    return nll if math.isfinite(nll) else math.inf


def options_of(cell: Cell, rate: float) -> list[str]:
    adapter, optimizer = cell
    return [*ADAPTERS[adapter], *OPTIMIZERS[optimizer][0], "--lr", f"{rate:g}"]


def varied(seed: int) -> list[str]:
    return ["--seed", str(seed), "--data-seed", str(seed + 7)]


def search(cell: Cell) -> tuple[float, float]:
    """Returns the best learning rate and its held-out NLL.

    The ladder grows by factors of two while one of its ends is the best.
    """
    adapter, optimizer = cell
    losses: dict[float, float] = {}

    def measure(rate: float) -> None:
        name = f"search_{adapter}_{optimizer}_{rate:g}"
        losses[rate] = run(name, [*options_of(cell, rate), *SEARCH])

    for rate in OPTIMIZERS[optimizer][1]:
        measure(rate)
    while True:
        best = min(losses, key=losses.__getitem__)
        if best == min(losses):
            measure(best / 2)
        elif best == max(losses):
            measure(best * 2)
        else:
            return best, losses[best]


def finals(cells: Sequence[Cell], rates: dict[Cell, float], seeds: range) -> None:
    """Runs the cells at their best learning rates, seed by seed."""
    for seed, cell in itertools.product(seeds, cells):
        adapter, optimizer = cell
        options = [*options_of(cell, rates[cell]), *varied(seed)]
        run(f"{adapter}_{optimizer}_s{seed}", options)


def main() -> None:
    found = {cell: search(cell) for cell in (*PLAIN, *GATED)}
    for cell, (rate, loss) in found.items():
        print(f"{cell}: best rate {rate:g}, NLL {loss:.4f}", flush=True)
    if sys.argv[1:] != ["finals"]:
        return

    rates = {cell: rate for cell, (rate, _) in found.items()}
    worse_ratio = max(("lora+4", "lora+16"), key=lambda optimizer: found["lora", optimizer][1])
    finals([cell for cell in PLAIN if cell[1] != worse_ratio], rates, SEEDS)
    finals(GATED, rates, GATED_SEEDS)
    # The search of this cell was a near tie (the third change in benchmarks/experiments/rig-a.md).
    for seed in SEEDS:
        options = [*options_of(("expert", "orthogonal"), 2e-3), *varied(seed)]
        run(f"expert_orthogonal_0.002_s{seed}", options)
    # The reference: one LoRA per task.
    for seed, task in itertools.product(GATED_SEEDS, TASKS):
        options = [*options_of(("lora", "adamw"), rates["lora", "adamw"]), *varied(seed)]
        run(f"per-task_{task}_s{seed}", [*options, "--only", task])


if __name__ == "__main__":
    main()
