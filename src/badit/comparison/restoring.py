"""Continues a comparison from its results.json where the folders of its runs are gone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from badit.comparison.grid import Cell, Grid
from badit.comparison.results import RESULTS, SINGLE_TASK, finished_cells
from badit.metrics.answers import mean_scores
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.support.errors import BaditError, explained
from badit.support.files import write_text

_MAXIMA = ("parameters", "peak_memory_gib")  # of several runs; other numbers are sums

Files = dict[Path, str]


def restore_runs(grid: Grid) -> None:
    """Writes the folders of finished runs if only results.json has these runs.

    So they count as finished. A restored run has its recipe, environment and scores, but no adapter
    and no predictions.
    """
    output = Path(grid.recipe.output)
    entries = finished_cells(output)
    methods = {entry["method"].removesuffix(SINGLE_TASK) for entry in entries}
    if any((output / method).is_dir() for method in methods):
        return
    files: Files = {}
    for entry in entries:
        with explained(output / RESULTS, fix="move the file, to begin anew", any_error=True):
            if entry["method"].endswith(SINGLE_TASK):
                files |= _single_task_files(grid, entry)
            else:
                files |= _run_files(grid, entry)
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def _run_files(grid: Grid, entry: dict[str, Any]) -> Files:
    is_search = not entry["selected"] and grid.section.search is not None
    folder = grid.folder_of(replace(_cell_of(entry), is_search=is_search))
    files = {
        folder.config_path: dump_recipe(build_recipe(entry["config"])),
        folder.environment_path: json.dumps(entry["environment"], indent=2),
    }
    if entry["validation_loss"] is not None:
        files[folder.validation_path] = json.dumps({"loss": entry["validation_loss"]})
    if entry["scores"] is not None:
        scores = dict(entry["scores"])
        if "matrix" in entry:
            scores |= {"order": entry["tasks"], "matrix": entry["matrix"]}
            scores["continual"] = entry["continual"]
        files[folder.scores_path] = json.dumps(scores, indent=2)
        files[folder.instances_path] = json.dumps(entry["instances"])
    return files


def _single_task_files(grid: Grid, entry: dict[str, Any]) -> Files:
    """Returns the files of a method's single-task runs with one seed.

    Their entry has sums over the runs, so each run gets the mean.
    """
    cell = _cell_of(entry)
    if cell.method not in grid.section.single_task:
        problem = f"{RESULTS} has its single-task runs; add it to compare.single_task"
        raise BaditError(f"{grid.recipe.output}: {cell.method}: {problem}")
    environment = dict(entry["environment"])
    environment.pop("inputs", None)  # of only one of the tasks
    environment["training"] = {
        key: value if key in _MAXIMA else value / len(entry["instances"])
        for key, value in entry["environment"]["training"].items()
    }
    files: Files = {}
    for task, scores in entry["instances"].items():
        run = grid.run_of(replace(cell, task=task))
        files[run.folder.config_path] = dump_recipe(run.recipe)
        files[run.folder.environment_path] = json.dumps(environment, indent=2)
        files[run.folder.scores_path] = json.dumps(mean_scores({task: scores}), indent=2)
        files[run.folder.instances_path] = json.dumps({task: scores})
    return files


def _cell_of(entry: dict[str, Any]) -> Cell:
    method = entry["method"].removesuffix(SINGLE_TASK)
    return Cell(method, entry["learning_rate"], entry["seed"], entry["order"])
