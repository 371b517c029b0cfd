"""LoRA's seeds of stage C trained and scored on two machines, paired by seed and instance.

    python benchmarks/machines.py

Question and rule: docs/experiments/harness-c.md#the-same-machine
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from badit.comparison.results import load_results, paired_differences
from badit.metrics.answers import METRICS
from badit.metrics.statistics import paired_bootstrap

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    first, again = (load_results(RESULTS / name) for name in ("evidence-cpu", "evidence-processor"))
    seeds = again.instances.loc[again.instances["method"] == "lora", "seed"].unique()
    own = first.instances.loc[
        (first.instances["method"] == "lora") & first.instances["seed"].isin(seeds)
    ]
    own = own.assign(method="lora, first machine")
    both = replace(again, instances=pd.concat([again.instances, own]))
    for method, reference in (
        ("lora", "lora, first machine"),
        ("badit", "lora"),
        ("badit", "lora, first machine"),
    ):
        for metric in METRICS:
            found = paired_bootstrap(
                paired_differences(replace(both, reference=reference), method, metric)
            )
            interval = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
            print(f"{method} − {reference}: {metric} {interval} over {found.runs} seeds")


if __name__ == "__main__":
    main()
