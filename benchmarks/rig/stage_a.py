#!/usr/bin/env python3
"""Stage A of the evidence programme (docs/experiments/rig-a.md): runs every cell that has no result yet, one at a time.

    python benchmarks/rig/stage_a.py search      # learning rates, on a third of the training data
    python benchmarks/rig/stage_a.py finals      # five seeds of every cell at its best rate, on all of it

A run that is interrupted leaves no result and is repeated. Results go to benchmarks/results/rig-a.
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

# Optimizer: rig options and the three rates that the search starts with, in ascending order.
OPTIMIZERS = {
    "adamw": (["--opt", "adamw"], [1e-3, 2e-3, 4e-3]),
    "lora+4": (["--opt", "adamw", "--b-rate", "4"], [5e-4, 1e-3, 2e-3]),
    "lora+16": (["--opt", "adamw", "--b-rate", "16"], [2.5e-4, 5e-4, 1e-3]),
    "orthogonal": (["--opt", "orthogonal"], [1e-3, 2e-3, 4e-3]),
}
# PEFT's own, for comparison with the orthogonal updates of a plain LoRA.
OF_LORA_ALONE = {"riemannian": (["--opt", "riemannian"], [5e-4, 1e-3, 2e-3])}
# Adapter: rig options. Routers have a rate of their own, relative to the factors'.
ADAPTERS = {
    "lora": ["--init", "lora"],
    "directions": ["--init", "dirs"],
    "oracle": ["--init", "dirs", "--gate", "oracle", "--act", "exp", "--router-rate", "3"],
    "component": ["--init", "dirs", "--gate", "component", "--act", "exp", "--router-rate", "0.3"],
    "expert": ["--init", "dirs", "--gate", "expert", "--router-rate", "0.3"],
    "bad": ["--init", "bad"],
}
SEARCH = ["--train", "100"]
SEEDS = range(5)
TASKS = ["073", "1510", "1687", "181", "363", "591", "639", "748", "875"]


def run(name: str, options: list[str]) -> float:
    """The held-out NLL of a run, which is started unless its result is there."""
    result = OUT / f"{name}.json"
    if not result.is_file():
        command = [sys.executable, str(HERE / "rig.py"), "--name", name, "--out", str(OUT), *options]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    nll = json.loads(result.read_text(encoding="utf-8"))["nll"]
    return nll if math.isfinite(nll) else math.inf


def search(adapter: str, optimizer: str) -> tuple[float, float]:
    """The rate with the lowest held-out NLL, and that NLL. A ladder grows by factors of two while its end is best."""
    options, ladder = (OPTIMIZERS | OF_LORA_ALONE)[optimizer]
    losses: dict[float, float] = {}

    def measure(rate: float) -> None:
        name = f"search_{adapter}_{optimizer}_{rate:g}"
        losses[rate] = run(name, [*ADAPTERS[adapter], *options, *SEARCH, "--lr", f"{rate:g}"])

    for rate in ladder:
        measure(rate)
    while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
        measure(best / 2 if best == min(losses) else best * 2)
    return best, losses[best]


def finals(rates: dict[tuple[str, str], float], losses: dict[tuple[str, str], float]) -> None:
    """Five seeds of the finalists, and one model per task as the reference, seed by seed."""
    plus = min(("lora+4", "lora+16"), key=lambda optimizer: losses["lora", optimizer])
    cells = [(adapter, optimizer) for adapter in ADAPTERS for optimizer in ("orthogonal", "adamw", plus)]
    cells += [("lora", optimizer) for optimizer in OF_LORA_ALONE]
    for seed in SEEDS:
        varied = ["--seed", str(seed), "--data-seed", str(seed + 7)]
        for adapter, optimizer in cells:
            options = [*ADAPTERS[adapter], *(OPTIMIZERS | OF_LORA_ALONE)[optimizer][0]]
            options += ["--lr", f"{rates[adapter, optimizer]:g}"]
            run(f"{adapter}_{optimizer}_s{seed}", [*options, *varied])
        for task in TASKS:
            options = [*ADAPTERS["lora"], *OPTIMIZERS["adamw"][0], "--lr", f"{rates['lora', 'adamw']:g}"]
            run(f"per-task_{task}_s{seed}", [*options, *varied, "--only", task])


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    rates, losses = {}, {}
    cells = [*itertools.product(ADAPTERS, OPTIMIZERS), *itertools.product(["lora"], OF_LORA_ALONE)]
    for adapter, optimizer in cells:
        rates[adapter, optimizer], losses[adapter, optimizer] = best = search(adapter, optimizer)
        print(f"{adapter} {optimizer}: best rate {best[0]:g}, NLL {best[1]:.4f}", flush=True)
    if sys.argv[1:] == ["finals"]:
        finals(rates, losses)


if __name__ == "__main__":
    main()
