"""The effect of the machine on stage C: LoRA's seeds trained and scored on two machines.

    python benchmarks/machines.py

The differences are paired by seed and instance. Question and rule:
benchmarks/experiments/harness-c.md#the-same-machine
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from badit.comparison.results import load_results, paired_differences
from badit.metrics.answers import METRICS
from badit.metrics.statistics import paired_bootstrap

RESULTS = Path(__file__).parent / "results"
FIRST = "lora, first machine"
PAIRS = (("lora", FIRST), ("badit", "lora"), ("badit", FIRST))


def main() -> None:
    first = load_results(RESULTS / "evidence-cpu").instances
    results = load_results(RESULTS / "evidence-processor")
    seeds = results.instances.loc[results.instances["method"] == "lora", "seed"].unique()
    is_repeated = (first["method"] == "lora") & first["seed"].isin(seeds)
    instances = pd.concat([results.instances, first.loc[is_repeated].assign(method=FIRST)])
    for method, reference in PAIRS:
        compared = replace(results, instances=instances, reference=reference)
        for metric in METRICS:
            mean, low, high, *_, runs = paired_bootstrap(
                paired_differences(compared, method, metric)
            )
            interval = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}] over {runs} seeds"
            print(f"{method} − {reference}: {metric} {interval}")


if __name__ == "__main__":
    main()
