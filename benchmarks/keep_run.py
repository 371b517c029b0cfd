"""Copy the small files of a finished run to benchmarks/results, to be committed.

    python benchmarks/keep_run.py runs/mine mine/badit

Copies configuration, environment, metrics, raw scores, regroupings by step and all analysis tables
but the largest to benchmarks/results/mine/badit. The adapter and the predictions stay in the run's
folder.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from badit.api import Run
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.support.files import read_jsonl, write_text

RESULTS = Path(__file__).parent / "results"
KEPT = ("environment.json", "metrics.jsonl", "scores.json", "analysis.json")
LEFT_OUT = "gradient_pairs.json"  # the largest table: one row per pair of tasks and module


def keep(run: Run, name: str) -> Path:
    """Copies a run's small files; the output path in the recipe becomes ``runs/NAME``."""
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    tables = [
        f"analysis/{path.name}"
        for path in sorted(run.analysis_path.glob("*.json"))
        if path.name != LEFT_OUT
    ]
    if tables:
        (target / "analysis").mkdir(exist_ok=True)
    for file in (*KEPT, *tables):
        if (run.path / file).is_file():
            write_text(target / file, (run.path / file).read_text())
    if regroupings := mean_over_modules(run.regroupings_path):
        write_text(
            target / "regroupings.jsonl", "".join(json.dumps(line) + "\n" for line in regroupings)
        )
    recipe = build_recipe(run.trusted_recipe().model_dump(), [f"output=runs/{name}"])
    write_text(target / "config.yaml", dump_recipe(recipe))
    return target


def mean_over_modules(log: Path) -> list[dict[str, Any]]:
    """Returns one line per regrouping, with the mean of each number over the layers."""
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in read_jsonl(log):
        by_step[line["step"]].append(line)
    means = []
    for step, lines in by_step.items():
        numbers = [
            key
            for key, value in lines[0].items()
            if isinstance(value, float | int) and key != "step"
        ]
        mean = {key: round(sum(line[key] for line in lines) / len(lines), 4) for key in numbers}
        means.append({"step": step, "modules": len(lines), **mean})
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", help="a finished run's folder")
    parser.add_argument("name", help="where to keep it, under benchmarks/results")
    options = parser.parse_args()
    print(keep(Run(options.run), options.name))
