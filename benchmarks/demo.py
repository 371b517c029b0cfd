"""The demo over several seeds: mean and standard deviation of its three methods.

    python benchmarks/demo.py --seeds 0 1 2 --runs runs/demo

Runs the missing seeds and writes benchmarks/results/demo: each run's configuration, environment and scores, and
summary.json with the raw values per seed, the source of the README's table.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from keep_run import RESULTS, keep

from badit.cli import main
from badit.demo import METHODS
from badit.files import read_json, write_json
from badit.run import Run


def summarise(runs: str, seeds: list[int]) -> dict[str, Any]:
    """Copies the finished runs and returns mean, standard deviation and raw values of each method's two scores."""
    summary: dict[str, Any] = {"seeds": seeds, "methods": {}}
    for method in map(str.lower, METHODS):
        kept = [keep(Run(f"{runs}-{seed}/{method}"), f"demo/{seed}/{method}") for seed in seeds]
        scores = [read_json(folder / "scores.json") for folder in kept]
        summary["methods"][method] = {key: _spread([one[key] for one in scores]) for key in ("rouge_l", "exact_match")}
    return summary


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/demo", help="the runs go to RUNS-SEED (default: runs/demo)")
    options = parser.parse_args()
    for seed in options.seeds:
        if code := main(["demo", "--seed", str(seed), "--output", f"{options.runs}-{seed}"]):
            raise SystemExit(code)
    write_json(RESULTS / "demo" / "summary.json", summarise(options.runs, options.seeds))
