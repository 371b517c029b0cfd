#!/usr/bin/env python3
"""Gates by rank and number of tasks, with the corrected optimizer.

Plan and results: benchmarks/experiments/rig-scale.md

python benchmarks/rig/stage_scale.py [PROCESSES]
"""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

from stage_a import SEARCH, options_of, run, varied

RANKS = (32, 8)  # N, divided among eight experts
TASKS = {"9": [], "5": ["--tasks", "073,181,363,639,875"], "15": ["--tasks", "all"]}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LEVEL = 0.01  # nats; the lowest rate within this distance of the best is chosen
COMPARED = [
    *itertools.product(("lora", "directions", "expert"), [32], ["9"]),
    *itertools.product(("directions", "expert", "oracle"), RANKS, ("5", "15")),
    *itertools.product(("component", "component-fixed"), [32], ["9"]),  # rig-b.md
]

Run = tuple[str, list[str]]  # name and options


def run_of(adapter: str, rank: int, tasks: str, rate: float) -> Run:
    options = [*options_of((adapter, "orthogonal"), rate), "--N", str(rank), *TASKS[tasks]]
    return f"scale_{adapter}_{rank}_{tasks}", options


def run_all(runs: list[Run]) -> list[float]:
    """Returns the held-out NLLs of several runs, trained PROCESSES at a time."""
    processes = int(sys.argv[1]) if sys.argv[1:] else 1
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, *zip(*runs, strict=True)))


def search(rank: int) -> float:
    """Returns the learning rate of all cells of a rank."""
    runs = []
    for rate in RATES:
        name, options = run_of("directions", rank, "9", rate)
        runs.append((f"search_{name}_{rate:g}", [*options, *SEARCH]))
    losses = run_all(runs)
    highest = min(losses) + LEVEL
    return min(rate for rate, loss in zip(RATES, losses, strict=True) if loss <= highest)


def main() -> None:
    rates = {rank: search(rank) for rank in RANKS}
    print(f"rates by N: {rates}", flush=True)
    finals = []
    for seed, (adapter, rank, tasks) in itertools.product(range(3), COMPARED):
        name, options = run_of(adapter, rank, tasks, rates[rank])
        finals.append((f"{name}_s{seed}", [*options, *varied(seed)]))
    run_all(finals)


if __name__ == "__main__":
    main()
