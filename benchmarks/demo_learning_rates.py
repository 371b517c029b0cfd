"""The demo's two methods over learning rates, scored on held-out training instances.

    python benchmarks/demo_learning_rates.py --runs runs/rates

Writes benchmarks/results/demo/learning_rates.json: one seed, Rouge-L and exact match on 160 held-out
instances per cell.
"""

from __future__ import annotations

import argparse

from keep_run import RESULTS

from badit.demo import demo_recipe
from badit.environment import environment
from badit.evaluate import train_and_score
from badit.files import write_json
from badit.recipe import build_recipe

RATES = {"LoRA": (5e-4, 1e-3, 2e-3), "BADIT": (2.5e-4, 5e-4, 1e-3)}
HELD_OUT = ["data.validation_per_task=10", "evaluation.split=validation"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", default="runs/rates", help="where the runs go (default: runs/rates)")
    options = parser.parse_args()
    cells = []
    for method, rates in RATES.items():
        for rate in rates:
            content = demo_recipe(method, f"{options.runs}/{method}-{rate}", 1.0, 0)
            scores = train_and_score(build_recipe(content, [f"training.learning_rate={rate}", *HELD_OUT]))
            means = {key: scores[key] for key in ("rouge_l", "exact_match")}
            cells.append({"method": method, "learning_rate": rate, "seed": 0, **means})
    write_json(RESULTS / "demo" / "learning_rates.json", {"cells": cells, "environment": environment()})
