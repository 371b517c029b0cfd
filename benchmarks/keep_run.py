"""Keeps a finished run as a committed result: its configuration, environment, metrics and raw scores.

    python benchmarks/keep_run.py runs/superni-cpu superni-cpu/badit

copies them to benchmarks/results/superni-cpu/badit. The adapter and the predictions stay in the run's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from badit.recipe import build_recipe, dump_recipe
from badit.runs import RunFolder, write_text

RESULTS = Path(__file__).parent / "results"
KEPT = ("environment.json", "metrics.jsonl", "scores.json")


def keep(run: RunFolder, name: str) -> Path:
    """Copies a run's small files; its output path, which means something on one machine only, becomes the name."""
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (run.path / file).is_file():
            write_text(target / file, (run.path / file).read_text())
    recipe = build_recipe(run.recipe().model_dump(), [f"output=runs/{name}"])
    write_text(target / "config.yaml", dump_recipe(recipe))
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a finished run's folder")
    parser.add_argument("name", help="where to keep it, below benchmarks/results")
    options = parser.parse_args()
    print(keep(RunFolder.existing(options.run), options.name))
