#!/usr/bin/env python3
"""summary.py OUT REFERENCE METHOD…: summarise runs, selected by the prefix of their names.

Prints the difference of each method to the reference, paired over instances and seeds, with a 95 %
interval from resampling seeds and, within tasks, instances.
"""

import glob
import json
import sys
from pathlib import Path

import numpy as np

folder, *prefixes = sys.argv[1:]


def by_seed(found):
    """Groups runs by seed: one run per seed, or one per task and seed."""
    return {
        seed: [run for run in found if run["arguments"]["seed"] == seed]
        for seed in sorted({r["arguments"]["seed"] for r in found})
    }


def own_rows(run):
    """Returns a run's instances; for a run trained on a single task, only that task's instances."""
    rows, only = np.array(run["instances"]), run["arguments"]["only"]
    return (
        rows[rows[:, 0] == sorted(run["arguments"]["tasks"].split(",")).index(only)]
        if only
        else rows
    )


runs = {}
for prefix in prefixes:
    found = [
        json.loads(Path(file).read_text()) for file in sorted(glob.glob(f"{folder}/{prefix}*.json"))
    ]
    runs[prefix] = {
        seed: np.vstack([own_rows(run) for run in of_seed])
        for seed, of_seed in by_seed(found).items()
    }


def by_task(rows, column, picked=None):
    """Returns the mean over tasks; ``picked`` are the resampled instances of each task."""
    means = []
    for task in np.unique(rows[:, 0]):
        values = rows[rows[:, 0] == task, column]
        means.append(values[picked[task]].mean() if picked else values.mean())
    return float(np.mean(means))


def interval(seeds, reference, column, unit):
    """Returns the mean difference and its 95 % interval."""
    shared = sorted(set(seeds) & set(reference))
    sizes = dict(zip(*np.unique(reference[shared[0]][:, 0], return_counts=True), strict=True))
    rng, draws = np.random.default_rng(0), []
    for _ in range(10_000):
        picked = {task: rng.integers(0, n, n) for task, n in sizes.items()}
        chosen = rng.choice(shared, len(shared))
        differences = [
            by_task(seeds[s], column, picked) - by_task(reference[s], column, picked)
            for s in chosen
        ]
        draws.append(unit * np.mean(differences))
    mean = np.mean([by_task(seeds[s], column) - by_task(reference[s], column) for s in shared])
    return unit * mean, *np.percentile(draws, [2.5, 97.5])


reference = runs[prefixes[0]]
for prefix, seeds in runs.items():
    nll, em = (np.array([by_task(rows, column) for rows in seeds.values()]) for column in (1, 2))
    line = f"{prefix:28s} seeds {sorted(seeds)}  nll {nll.mean():.4f} ± {nll.std():.4f}"
    line += f"  em {100 * em.mean():.2f} ± {100 * em.std():.2f}"
    if prefix != prefixes[0] and set(seeds) & set(reference):
        for column, unit, name in ((1, 1, "nll"), (2, 100, "em")):
            mean, low, high = interval(seeds, reference, column, unit)
            line += f"  Δ{name} {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    print(line)
