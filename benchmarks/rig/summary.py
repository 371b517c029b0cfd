#!/usr/bin/env python3
"""summary.py OUT REFERENCE METHOD…: runs by the prefix of their names; the difference of each method to the reference,
paired over instances and seeds, with a 95 % interval from resampling seeds and, within tasks, instances."""

import glob
import json
import sys

import numpy as np

folder, *prefixes = sys.argv[1:]
runs = {}
for prefix in prefixes:
    found = [json.load(open(f)) for f in sorted(glob.glob(f"{folder}/{prefix}*.json"))]
    runs[prefix] = {r["arguments"]["seed"]: np.array(r["instances"]) for r in found}
rng = np.random.default_rng(0)


def by_task(rows, column, picked=None):
    tasks = np.unique(rows[:, 0])
    means = []
    for t in tasks:
        values = rows[rows[:, 0] == t, column]
        means.append(values[picked[t]].mean() if picked else values.mean())
    return float(np.mean(means))


reference = runs[prefixes[0]]
for prefix, seeds in runs.items():
    nll, em = ([by_task(rows, c) for rows in seeds.values()] for c in (1, 2))
    line = f"{prefix:28s} seeds {sorted(seeds)}  nll {np.mean(nll):.4f} ± {np.std(nll):.4f}  em {100 * np.mean(em):.2f} ± {100 * np.std(em):.2f}"
    shared = sorted(set(seeds) & set(reference))
    if prefix != prefixes[0] and shared:
        for column, unit, name in ((1, 1, "nll"), (2, 100, "em")):
            draws = []
            for _ in range(2000):
                rows = reference[shared[0]]
                picked = {
                    t: rng.integers(0, n, n) for t, n in zip(*np.unique(rows[:, 0], return_counts=True), strict=True)
                }
                draws.append(
                    unit
                    * np.mean(
                        [
                            by_task(seeds[s], column, picked) - by_task(reference[s], column, picked)
                            for s in rng.choice(shared, len(shared))
                        ]
                    )
                )
            low, high = np.percentile(draws, [2.5, 97.5])
            line += f"  Δ{name} {np.mean(draws):+.4f} [{low:+.4f}, {high:+.4f}]"
    print(line)
