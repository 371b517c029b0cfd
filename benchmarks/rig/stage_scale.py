#!/usr/bin/env python3
"""Gates by rank and number of tasks, with the corrected optimizer (docs/experiments/rig-scale.md).

python benchmarks/rig/stage_scale.py [PROCESSES]
"""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

from stage_a import ADAPTERS, OPTIMIZERS, SEARCH, run, varied

RANKS = (32, 8)  # N, divided among eight experts
TASKS = {"9": [], "5": ["--tasks", "073,181,363,639,875"], "15": ["--tasks", "all"]}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LEVEL = 0.01  # nats; the lowest rate within this distance of the best is chosen


def cell(adapter: str, rank: int, tasks: str, rate: float) -> tuple[str, list[str]]:
    options = [
        *ADAPTERS[adapter],
        *OPTIMIZERS["orthogonal"][0],
        "--N",
        str(rank),
        *TASKS[tasks],
        "--lr",
        f"{rate:g}",
    ]
    return f"scale_{adapter}_{rank}_{tasks}", options


def run_all(runs: list[tuple[str, list[str]]]) -> list[float]:
    with ThreadPoolExecutor(int(sys.argv[1]) if sys.argv[1:] else 1) as pool:
        return list(pool.map(run, *zip(*runs, strict=True)))


chosen = {}
for rank in RANKS:
    searched = []
    for rate in RATES:
        name, options = cell("directions", rank, "9", rate)
        searched.append((f"search_{name}_{rate:g}", [*options, *SEARCH]))
    losses = run_all(searched)
    chosen[rank] = min(
        rate for rate, loss in zip(RATES, losses, strict=True) if loss <= min(losses) + LEVEL
    )
    print(f"N = {rank}: rate {chosen[rank]:g}", flush=True)

compared = [("lora", 32, "9"), ("directions", 32, "9"), ("expert", 32, "9")]
compared += itertools.product(("directions", "expert", "oracle"), RANKS, ("5", "15"))
compared += [("component", 32, "9"), ("component-fixed", 32, "9")]  # docs/experiments/rig-b.md
finals = []
for seed, (adapter, rank, tasks) in itertools.product(range(3), compared):
    name, options = cell(adapter, rank, tasks, chosen[rank])
    finals.append((f"{name}_s{seed}", [*options, *varied(seed)]))
run_all(finals)
