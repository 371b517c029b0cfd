#!/usr/bin/env python3
"""noise.py [RESULTS [METRIC [REFERENCE]]]: what a method's difference to the reference depends on.

Prints the mean paired difference and its standard errors: by the choice of seeds, by the choice of
test instances, and by single scores (the part that neither a seed nor an instance explains), from
an analysis of variance per task. `all` is the root of the sum of their squares. `bootstrap` is the
standard error that the pigeonhole bootstrap of `badit table` expects. It counts single scores three
times (Owen 2007, doi:10.1214/07-AOAS122), so its intervals are too wide. `t interval` is the paired
95 % t interval over the seeds, for these test instances.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import badit
from badit.comparison.results import paired_differences

RESULTS = Path(__file__).parent / "results/evidence-cpu/results.json"


def by_run(tasks_SN: list[np.ndarray]) -> np.ndarray:
    """Returns the mean over tasks of each seed's differences (S seeds, N instances)."""
    return np.mean([task_SN.mean(axis=1) for task_SN in tasks_SN], axis=0)


def components(tasks_SN: list[np.ndarray]) -> dict[str, float]:
    """Returns the mean over tasks of differences (S seeds, N instances) and its standard errors."""
    runs = len(tasks_SN[0])
    by_seed = by_run(tasks_SN).var(ddof=1) / runs
    by_instance = 0.0
    single = 0.0
    for task_SN in tasks_SN:
        size = task_SN.shape[1]
        of_instance_N = task_SN.mean(axis=0)
        of_seed_S1 = task_SN.mean(axis=1, keepdims=True)
        residual_SN = task_SN - of_instance_N - of_seed_S1 + task_SN.mean()
        residual_variance = (residual_SN**2).sum() / ((runs - 1) * (size - 1))
        by_instance += of_instance_N.var(ddof=1) / size / len(tasks_SN) ** 2
        single += residual_variance / (runs * size) / len(tasks_SN) ** 2

    # The variances by seed and by instance contain that of single scores. Below it, they are 0.
    seeds = max(0.0, by_seed - single)
    instances = max(0.0, by_instance - single)
    total = seeds + instances + single
    variances = {
        "seeds": seeds,
        "instances": instances,
        "single scores": single,
        "all": total,
        "bootstrap": total + 2 * single,
    }
    errors = {name: np.sqrt(variance) for name, variance in variances.items()}
    return {"difference": by_run(tasks_SN).mean(), **errors}


def t_interval(tasks_SN: list[np.ndarray]) -> tuple[float, float]:
    """Returns the 95 % t interval of the mean difference over seeds, for these test instances."""
    return interval_over_seeds(by_run(tasks_SN))


def interval_over_seeds(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the 95 % t interval of the mean of one difference per seed."""
    mean = float(np.mean(differences))
    return stats.t.interval(0.95, len(differences) - 1, mean, stats.sem(differences))


def score_differences(
    runs: Mapping[str, Mapping[str, Mapping[str, float]]], method: str, reference: str, score: str
) -> list[float]:
    """Returns a method's score minus that of the reference, for each seed that both have.

    ``runs`` are the scores by method and seed, as mixed_score.py writes them.
    """
    of_method, of_reference = runs[method], runs[reference]
    shared = sorted(of_method.keys() & of_reference.keys())
    return [of_method[seed][score] - of_reference[seed][score] for seed in shared]


def table(path: str | Path = RESULTS, metric: str = "rouge_l", reference: str = "") -> str:
    """Returns a Markdown table with a row per method that has pairs of runs with the reference."""
    results = badit.load_results(path)
    if reference:
        results = replace(results, reference=reference)
    rows = {}
    for method in results.scored_methods:
        tasks_SN = list(paired_differences(results, method, metric).values())
        if method == results.reference or not tasks_SN or len(tasks_SN[0]) == 1:
            continue
        row = {"pairs of runs": len(tasks_SN[0])}
        row |= {name: f"{value:.3f}" for name, value in components(tasks_SN).items()}
        row["t interval"] = " to ".join(f"{end:.3f}" for end in t_interval(tasks_SN))
        rows[method] = row
    return pd.DataFrame(rows).T.rename_axis("method").to_markdown(disable_numparse=True)


if __name__ == "__main__":
    print(table(*sys.argv[1:]))
