#!/usr/bin/env python3
"""summary.py FOLDER REFERENCE METHOD…: summarise runs, selected by the prefix of their names.

Prints the difference of each method to the reference, paired over instances and seeds, with a 95 %
interval from resampling seeds and, within tasks, instances.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from results import runs_in

RESAMPLES = 10_000
NLL, EXACT_MATCH = 1, 2  # columns of a run's instances; the first one is the task
UNITS = {NLL: 1, EXACT_MATCH: 100}

Instances = np.ndarray  # (instances, 3)


def by_seed(runs: Mapping[str, Any], prefix: str) -> dict[int, Instances]:
    """Returns the instances of a method's runs by seed; a seed may have one run per task."""
    rows: dict[int, list[Instances]] = {}
    for name in sorted(runs):
        if name.startswith(prefix):
            rows.setdefault(runs[name]["arguments"]["seed"], []).append(own_instances(runs[name]))
    return {seed: np.vstack(rows[seed]) for seed in sorted(rows)}


def own_instances(run: dict[str, Any]) -> Instances:
    """Returns a run's instances; of a run trained on a single task, only this task's."""
    instances = np.array(run["instances"])
    only = run["arguments"]["only"]
    if not only:
        return instances
    task = sorted(run["arguments"]["tasks"].split(",")).index(only)
    return instances[instances[:, 0] == task]


def task_mean(
    instances: Instances, column: int, drawn: Mapping[float, np.ndarray] | None = None
) -> float:
    """Returns the mean over tasks; ``drawn`` are the resampled instances of each task."""
    means = []
    for task in np.unique(instances[:, 0]):
        values = instances[instances[:, 0] == task, column]
        if drawn is not None:
            values = values[drawn[task]]
        means.append(values.mean())
    return float(np.mean(means))


def interval(
    method: Mapping[int, Instances], reference: Mapping[int, Instances], column: int
) -> tuple[float, float, float]:
    """Returns the mean difference over the seeds that both have, and its 95 % interval."""
    seeds = sorted(set(method) & set(reference))
    tasks, counts = np.unique(reference[seeds[0]][:, 0], return_counts=True)
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(RESAMPLES):
        drawn = {
            task: rng.integers(0, count, count) for task, count in zip(tasks, counts, strict=True)
        }
        differences = [
            task_mean(method[seed], column, drawn) - task_mean(reference[seed], column, drawn)
            for seed in rng.choice(seeds, len(seeds))
        ]
        estimates.append(UNITS[column] * np.mean(differences))
    differences = [
        task_mean(method[seed], column) - task_mean(reference[seed], column) for seed in seeds
    ]
    low, high = np.percentile(estimates, [2.5, 97.5])
    return UNITS[column] * float(np.mean(differences)), low, high


def line(
    prefix: str, method: Mapping[int, Instances], reference: Mapping[int, Instances] | None
) -> str:
    nll, exact_match = (
        np.array([UNITS[column] * task_mean(of_seed, column) for of_seed in method.values()])
        for column in (NLL, EXACT_MATCH)
    )
    text = f"{prefix:28s} seeds {list(method)}  nll {nll.mean():.4f} ± {nll.std():.4f}"
    text += f"  em {exact_match.mean():.2f} ± {exact_match.std():.2f}"
    if reference is not None and set(method) & set(reference):
        for column, name in ((NLL, "nll"), (EXACT_MATCH, "em")):
            mean, low, high = interval(method, reference, column)
            text += f"  Δ{name} {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    return text


def main() -> None:
    folder, *prefixes = sys.argv[1:]
    runs = runs_in(Path(folder))
    reference = None
    for prefix in prefixes:
        method = by_seed(runs, prefix)
        print(line(prefix, method, reference))
        reference = reference or method


if __name__ == "__main__":
    main()
