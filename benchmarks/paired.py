"""The differences between two methods of an unfinished comparison, over the seeds that both have.

    python benchmarks/paired.py benchmarks/results/evidence-cpu lora/lr-0.001 badit/lr-0.0005

Second minus first, paired by seed and instance, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from badit.files import read_json
from badit.statistics import paired_bootstrap

METRICS = {"rouge_l": 1, "exact_match": 1, "nll": 3}  # and their decimals


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("first", help="METHOD/lr-RATE")
    parser.add_argument("second", help="METHOD/lr-RATE")
    options = parser.parse_args()
    both = [{file.parent.name: read_json(file) for file in (options.comparison / cell).glob("seed-*/instances.json")}
            for cell in (options.first, options.second)]  # fmt: skip
    seeds = sorted(both[0].keys() & both[1].keys())
    print(", ".join(seeds))
    for metric, decimals in METRICS.items():
        scores = [
            {task: np.array([cells[seed][task][metric] for seed in seeds]) for task in cells[seeds[0]]}
            for cells in both
        ]
        found = paired_bootstrap({task: scores[1][task] - scores[0][task] for task in scores[0]})
        print(f"{metric:12} {found.mean:+.{decimals}f} [{found.low:+.{decimals}f}, {found.high:+.{decimals}f}]")
