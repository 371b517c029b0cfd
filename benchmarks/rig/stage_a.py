#!/usr/bin/env python3
"""Stage A of the rig (docs/experiments/rig-a.md): runs every cell without a result, one at a time.

    python benchmarks/rig/stage_a.py search      # learning rates, on a third of the training data
    python benchmarks/rig/stage_a.py finals      # five seeds (three with gates), on all data

An interrupted run leaves no result and is repeated. Results go to benchmarks/results/rig-a.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "results" / "rig-a"

# Optimizer: rig options and the three initial learning rates of the search, in ascending order.
OPTIMIZERS = {
    "adamw": (["--opt", "adamw"], [1e-3, 2e-3, 4e-3]),
    "lora+4": (["--opt", "adamw", "--b-rate", "4"], [5e-4, 1e-3, 2e-3]),
    "lora+16": (["--opt", "adamw", "--b-rate", "16"], [2.5e-4, 5e-4, 1e-3]),
    "orthogonal": (["--opt", "orthogonal"], [1e-3, 2e-3, 4e-3]),
    "riemannian": (["--opt", "riemannian"], [5e-4, 1e-3, 2e-3]),  # PEFT's, for plain LoRA only
}
# Adapter: rig options. Routers have their own learning rate, relative to that of the factors.
ADAPTERS = {
    "lora": ["--init", "lora"],
    "directions": ["--init", "dirs"],
    "oracle": ["--init", "dirs", "--gate", "oracle", "--act", "exp", "--router-rate", "3"],
    "expert": ["--init", "dirs", "--gate", "expert", "--router-rate", "0.3"],
    # Used by stage B.
    "expert-1": ["--init", "dirs", "--gate", "expert"],
    "shared": ["--init", "dirs", "--gate", "expert", "--router-rate", "0.3", "--shared"],
    "component": ["--init", "dirs", "--gate", "component", "--act", "exp", "--router-rate", "0.3"],
}
ADAPTERS["component-fixed"] = [*ADAPTERS["component"], "--fixed-projection"]
# The optimizers and seeds of cells with gates (the second change in docs/experiments/rig-a.md).
GATED, GATED_SEEDS = ("adamw", "orthogonal"), range(3)
# A cell whose search was a near tie; it also runs at the other learning rate (the third change
# there).
SECOND_RATE = ("expert", "orthogonal", 2e-3)
Cell = tuple[str, str]
SEARCH = ["--train", "100"]
SEEDS = range(5)
TASKS = ["073", "1510", "1687", "181", "363", "591", "639", "748", "875"]


def run(name: str, options: list[str]) -> float:
    """Returns the held-out NLL of a run; starts the run if it has no result."""
    result = OUT / f"{name}.json"
    if not result.is_file():
        command = [
            sys.executable,
            str(HERE / "rig.py"),
            "--name",
            name,
            "--out",
            str(OUT),
            *options,
        ]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    nll = json.loads(result.read_text(encoding="utf-8"))["nll"]
    return nll if math.isfinite(nll) else math.inf


def search(adapter: str, optimizer: str) -> tuple[float, float]:
    """Returns the best learning rate and its held-out NLL; extends the grid at its ends."""
    options, ladder = OPTIMIZERS[optimizer]
    losses: dict[float, float] = {}

    def measure(rate: float) -> None:
        name = f"search_{adapter}_{optimizer}_{rate:g}"
        losses[rate] = run(name, [*ADAPTERS[adapter], *options, *SEARCH, "--lr", f"{rate:g}"])

    for rate in ladder:
        measure(rate)
    while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
        measure(best / 2 if best == min(losses) else best * 2)
    return best, losses[best]


def finals(cells: list[Cell], found: dict[Cell, tuple[float, float]], seeds: range) -> None:
    """Runs the cells at their best learning rates, seed by seed, LoRA+ with its better ratio."""
    plus = min(("lora+4", "lora+16"), key=lambda optimizer: found["lora", optimizer][1])
    for seed, (adapter, optimizer) in itertools.product(seeds, cells):
        if optimizer == plus or not optimizer.startswith("lora+"):
            rate = f"{found[adapter, optimizer][0]:g}"
            options = [*ADAPTERS[adapter], *OPTIMIZERS[optimizer][0], "--lr", rate, *varied(seed)]
            run(f"{adapter}_{optimizer}_s{seed}", options)


def second_rate(adapter: str, optimizer: str, rate: float) -> None:
    """Runs all seeds of a cell at a learning rate other than the one that the search found."""
    for seed in SEEDS:
        options = [
            *ADAPTERS[adapter],
            *OPTIMIZERS[optimizer][0],
            "--lr",
            f"{rate:g}",
            *varied(seed),
        ]
        run(f"{adapter}_{optimizer}_{rate:g}_s{seed}", options)


def per_task(rate: float) -> None:
    """Runs the reference: one LoRA per task, with AdamW."""
    for seed, task in itertools.product(GATED_SEEDS, TASKS):
        run(
            f"per-task_{task}_s{seed}",
            ["--init", "lora", "--lr", f"{rate:g}", "--only", task, *varied(seed)],
        )


def varied(seed: int) -> list[str]:
    return ["--seed", str(seed), "--data-seed", str(seed + 7)]


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    found: dict[Cell, tuple[float, float]] = {}
    plain = [
        (adapter, name)
        for adapter in ("lora", "directions")
        for name in OPTIMIZERS
        if name != "riemannian"
    ]
    gated = [(adapter, name) for adapter in ("oracle", "expert") for name in GATED]
    for cells, seeds in (([*plain, ("lora", "riemannian")], SEEDS), (gated, GATED_SEEDS)):
        for cell in cells:
            found[cell] = search(*cell)
            print(f"{cell}: best rate {found[cell][0]:g}, NLL {found[cell][1]:.4f}", flush=True)
        if sys.argv[1:] == ["finals"]:
            finals(cells, found, seeds)
    if sys.argv[1:] == ["finals"]:
        second_rate(*SECOND_RATE)
        per_task(found["lora", "adamw"][0])


if __name__ == "__main__":
    main()
