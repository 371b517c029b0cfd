#!/usr/bin/env python3
"""evidence.py FOLDER: compares the finished cells of an unfinished comparison, such as results/evidence-cpu.

Writes FOLDER/summary.json. For each pair "A over B": the seeds that both have and, for each metric, the mean gain of A
over B (the difference in the metric; for NLL, how much lower it is) and its 95 % and 90 % bootstrap intervals.
"""

from __future__ import annotations

import json
import sys
from itertools import permutations
from pathlib import Path

import numpy as np

from badit.metrics import METRICS
from badit.statistics import paired_bootstrap

# The methods that all others are compared with.
REFERENCES = ("lora", "lora-orthogonal", "badit")


def instances(folder: Path) -> dict[str, dict[int, dict[str, dict[str, list[float]]]]]:
    """Returns the scores of each instance: {method: {seed: {task: {metric: [score, …]}}}}."""
    found: dict = {}
    for file in sorted(folder.glob("*/lr-*/seed-*/instances.json")):
        method, _, seed, _ = file.relative_to(folder).parts
        found.setdefault(method, {})[int(seed.removeprefix("seed-"))] = json.loads(file.read_text())
    return found


def gains(one: dict, other: dict) -> dict:
    """Returns the gain of one method over another in each metric, paired over seeds and instances."""
    seeds = sorted(one.keys() & other.keys())
    summary: dict = {"seeds": seeds}
    for metric, about in METRICS.items():
        sign = -1 if about.lower_is_better else 1
        differences = {
            task: np.array([np.subtract(one[s][task][metric], other[s][task][metric]) for s in seeds])
            for task in one[seeds[0]]
        }
        found = paired_bootstrap({task: sign * values for task, values in differences.items()})
        names = ("mean", "low", "high", "inner_low", "inner_high")
        summary[metric] = {name: round(getattr(found, name), 5) for name in names}
    return summary


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    scores = instances(folder)
    pairs = [pair for pair in permutations(scores, 2) if set(pair) & set(REFERENCES)]
    summary = {f"{a} over {b}": gains(scores[a], scores[b]) for a, b in pairs if scores[a].keys() & scores[b].keys()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
