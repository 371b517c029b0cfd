#!/usr/bin/env python3
"""Gates by rank and number of tasks, with the corrected optimizer (docs/experiments/rig-scale.md).

python benchmarks/rig/stage_scale.py
"""

import itertools

from stage_a import ADAPTERS, OPTIMIZERS, SEARCH, run, varied

RANKS = (32, 8)  # N, divided among eight experts
TASKS = {"9": [], "5": ["--tasks", "073,181,363,639,875"], "15": ["--tasks", "all"]}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LEVEL = 0.01  # nats; the lowest rate within this distance of the best is chosen


def cell(adapter: str, rank: int, tasks: str, rate: float) -> tuple[str, list[str]]:
    options = [*ADAPTERS[adapter], *OPTIMIZERS["orthogonal"][0], "--N", str(rank), *TASKS[tasks], "--lr", f"{rate:g}"]
    return f"scale_{adapter}_{rank}_{tasks}", options


chosen = {}
for rank in RANKS:
    losses = {}
    for rate in RATES:
        name, options = cell("directions", rank, "9", rate)
        losses[rate] = run(f"search_{name}_{rate:g}", [*options, *SEARCH])
    chosen[rank] = min(rate for rate, loss in losses.items() if loss <= min(losses.values()) + LEVEL)
    print(f"N = {rank}: rate {chosen[rank]:g}", flush=True)

compared = [("lora", 32, "9"), ("directions", 32, "9"), ("expert", 32, "9")]
compared += itertools.product(("directions", "expert", "oracle"), RANKS, ("5", "15"))
for seed, (adapter, rank, tasks) in itertools.product(range(3), compared):
    name, options = cell(adapter, rank, tasks, chosen[rank])
    run(f"{name}_s{seed}", [*options, *varied(seed)])
