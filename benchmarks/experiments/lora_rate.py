#!/usr/bin/env python3
"""Compares LoRA at 2e-3, LoRA at 1e-3 and BADIT, paired by seed: the tables of lora-rate.md.

python benchmarks/experiments/lora_rate.py
"""

from pathlib import Path
from statistics import fmean

import numpy as np
from cell_losses import difference_columns

from badit.support.files import read_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
SEEDS = (0, 1, 2)
METRICS = {"nll": ".4f", "rouge_l": ".2f", "exact_match": ".2f"}
#: By name, the folder of the results and the method there.
RUNS = {
    "LoRA, 1e-3": ("evidence-cpu", "lora"),
    "LoRA, 2e-3": ("evidence-rate-cpu", "lora-2e-3"),
    "BADIT": ("evidence-cpu", "badit"),
}
PAIRS = [("LoRA, 2e-3", "LoRA, 1e-3"), ("BADIT", "LoRA, 1e-3"), ("BADIT", "LoRA, 2e-3")]


def scores(name: str, metric: str) -> list[float]:
    """Returns a method's scores, means over tasks, in the order of the seeds."""
    folder, method = RUNS[name]
    by_seed = {
        cell["seed"]: cell["scores"][metric]
        for cell in read_json(RESULTS / folder / "results.json")["cells"]
        if cell["method"] == method and cell["selected"]
    }
    return [by_seed[seed] for seed in SEEDS]


def main() -> None:
    for metric, form in METRICS.items():
        print(f"\n| {metric} | seeds 0, 1, 2 | mean | 95 % t interval |\n|---|---|---:|---|")
        for name in RUNS:
            values = scores(name, metric)
            by_seed = ", ".join(f"{value:{form}}" for value in values)
            print(f"| {name} | {by_seed} | {fmean(values):{form}} | |")
        for name, other in PAIRS:
            difference = np.subtract(scores(name, metric), scores(other, metric)).tolist()
            row = [f"{name} − {other}", *difference_columns(difference, f"+{form}")]
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
