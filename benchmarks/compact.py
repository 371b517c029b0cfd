"""Write a comparison's results into one compact file, to be committed.

    python benchmarks/compact.py runs/mine benchmarks/results/mine
    python benchmarks/compact.py runs/mine benchmarks/results/mine --files 'lora/*/metrics.jsonl'

The file is a results.json as `badit compare` writes it: one line per run, with its recipe,
versions, machine and the scores of every instance, which are rounded. Runs that regroup have their
log of regroupings, without labels. Runs that the comparison's own file does not have are added: to
its cells if they are scored, otherwise, with their losses on held-out instances, to ``trials``.
``--files`` adds the logs and tables that a page cites; its patterns are relative to the
comparison's folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from badit.comparison.entries import logged_regroupings
from badit.comparison.results import FORMAT, RESULTS, write_results
from badit.runs.folder import RunFolder
from badit.support.files import read_json, read_jsonl


def compact(folder: Path, patterns: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the results of all runs in a comparison's folder, with the files that match."""
    content: dict[str, Any] = {"format": FORMAT, "protocol": "mixed", "methods": [], "cells": []}
    if (folder / RESULTS).is_file():
        content = read_json(folder / RESULTS)
    cells = content["cells"]
    trials = []
    for config in sorted(folder.rglob("config.yaml")):
        run = RunFolder(config.parent)
        name = run.path.relative_to(folder).as_posix()
        if "/single/" in name:
            continue  # one cell has the results of all single-task runs of a seed
        cell = next((cell for cell in cells if is_of(cell, name)), None)
        if cell is None:
            cell = cell_of(run, name.split("/")[0])
            (cells if cell["scores"] else trials).append(cell)
        if regroupings := logged_regroupings([run]):
            cell["regroupings"] = regroupings
        if files := files_of(run, folder, patterns):
            cell["files"] = files
    for cell in [*cells, *trials]:
        round_values(cell)
    if trials:
        content["trials"] = trials
    if not cells:
        return {"format": FORMAT, "trials": trials}

    methods = dict.fromkeys([*content["methods"], *(cell["method"] for cell in cells)])
    content["methods"] = [*methods]
    content.setdefault("reference", "lora" if "lora" in methods else content["methods"][0])
    return content


def round_values(cell: dict[str, Any]) -> None:
    """Rounds the scores of a cell's instances, and its objectives of regroupings."""
    regroupings = cell.get("regroupings", {})
    objectives = {
        name: values for name, values in regroupings.items() if name.startswith("objective")
    }
    for columns in (*(cell["instances"] or {}).values(), objectives):
        for values in columns.values():
            values[:] = [rounded(value) for value in values]


def is_of(cell: dict[str, Any], name: str) -> bool:
    """Returns whether a cell has the results of the run with this folder."""
    return f"/{cell['config'].get('output')}".endswith(f"/{name}")


def cell_of(run: RunFolder, method: str) -> dict[str, Any]:
    """Returns the cell of a run's folder, in the form of results.json."""
    config = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
    config.pop("format", None)  # so that it is a recipe
    training = config["training"] if "training" in run.known_environment else {}
    validation = read_if_exists(run.validation_path)
    return {
        "method": method,
        "seed": training.get("seed"),
        "order": config["data"].get("order"),
        "learning_rate": training.get("learning_rate"),
        "status": "done",
        "error": None,
        "selected": True,
        "validation_loss": validation.get("loss"),
        "validation_losses": validation.get("tasks"),
        "config": config,
        "environment": run.known_environment,
        "scores": read_if_exists(run.scores_path) or None,
        "instances": read_if_exists(run.instances_path) or None,
    }


def read_if_exists(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def files_of(run: RunFolder, folder: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """Returns the contents of a run's .json and .jsonl files that match a pattern, by path."""
    files = {}
    for file in sorted(run.path.rglob("*.json*")):
        if any(file.relative_to(folder).match(pattern) for pattern in patterns):
            content = [*read_jsonl(file)] if file.suffix == ".jsonl" else read_json(file)
            files[file.relative_to(run.path).as_posix()] = content
    return files


def rounded(score: float) -> float:
    """Returns a score with seven significant digits, the precision of float32."""
    return float(f"{score:.7g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of a comparison, or of trials")
    parser.add_argument("target", type=Path, help="the folder of the compact file")
    parser.add_argument("--files", nargs="+", default=[], help="patterns of files to include")
    options = parser.parse_args()
    content = compact(options.folder, options.files)
    options.target.mkdir(parents=True, exist_ok=True)
    write_results(options.target / RESULTS, content)
    print(options.target / RESULTS)


if __name__ == "__main__":
    main()
