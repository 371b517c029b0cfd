"""From a grid of run folders to results.json: every cell's configuration, environment, cost and raw scores.

The schema is that of :mod:`badit.evaluation.results`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from badit.comparison.grid import Cell, Grid, order_name
from badit.comparison.worker import ERROR
from badit.evaluation.results import FORMAT, SINGLE_TASK, read_scores
from badit.files import read_json
from badit.metrics import mean_scores
from badit.runs import RunFolder
from badit.statistics import FORMS, continual_scores


def assemble(
    grid: Grid, tasks: Sequence[str], rates: Mapping[str, float | None], counts: Mapping[str, int]
) -> dict[str, Any]:
    """What a comparison has come to, finished or not.

    Args:
        grid: the comparison.
        tasks: the names of all its tasks.
        rates: the learning rates found so far.
        counts: the numbers of trainable parameters.
    """
    cells = [cell for method in grid.methods for cell in _cells_of(grid, method, rates)]
    singles = [cell for method in grid.section.single_task for cell in _single_task_cells(grid, method, tasks, rates)]
    methods = [*grid.methods, *dict.fromkeys(cell["method"] for cell in singles)]
    return {
        "format": FORMAT,
        "protocol": "mixed" if grid.section.orders is None else "sequential",
        "reference": grid.section.reference,
        "methods": methods,
        "trainable_parameters": dict(counts),
        "cells": [*cells, *singles],
    }


def _cells_of(grid: Grid, method: str, rates: Mapping[str, float | None]) -> Iterator[dict[str, Any]]:
    """The chosen cells, whether they are done or not, then what was trained to choose the learning rate."""
    chosen = set()
    if method in rates:
        for cell in grid.chosen(method, rates[method]):
            chosen.add(cell)
            yield _described(grid, cell, selected=True)
    for rate in grid.section.learning_rates or ():
        cell = grid.searched(method, rate)
        if cell not in chosen and (Path(grid.recipe.output) / cell.path).is_dir():
            yield _described(grid, cell, selected=False)


def _described(grid: Grid, cell: Cell, *, selected: bool) -> dict[str, Any]:
    run = RunFolder(Path(grid.recipe.output) / cell.path)
    done = run.instances.is_file() if selected else (run.path / "validation.json").is_file()
    error = None if done else _error(run)
    scores = read_scores(run.scores) if run.instances.is_file() else None
    loss = _read(run.path / "validation.json").get("loss", math.nan)
    description = {
        "method": cell.method,
        "seed": cell.seed,
        "order": None if cell.order is None else order_name(cell.order),
        "learning_rate": cell.learning_rate,
        "status": _status(done, error),
        "error": error,
        "selected": selected,
        "validation_loss": loss if math.isfinite(loss) else None,  # a run that diverged has a NaN, which JSON has not
        "config": grid.recipe_of(cell).model_dump(mode="json", exclude={"compare"}),
        "environment": _read(run.environment),
        "scores": scores and {key: scores[key] for key in scores if key not in ("order", "matrix", "continual")},
        "instances": _read(run.instances) or None,
    }
    if cell.order is not None and scores is not None:
        alone = _single_task_scores(grid, cell, scores["order"])
        description |= {"tasks": scores["order"], "matrix": scores["matrix"], "continual": _continual(scores, alone)}
    return description


def _continual(scores: Mapping[str, Any], alone: list[float] | None) -> dict[str, Any]:
    matrix = [[math.nan if score is None else score for score in row] for row in scores["matrix"]]
    return {form: continual_scores(matrix, alone, form=form)._asdict() for form in FORMS}


def _single_task_scores(grid: Grid, cell: Cell, tasks: list[str]) -> list[float] | None:
    """Each task's score when the method trains on it alone, with the same seed; None unless all are there."""
    scores = []
    for task in tasks:
        run = RunFolder(Path(grid.recipe.output) / replace(cell, order=None, task=task).path)
        if not run.instances.is_file():
            return None
        scores.append(read_scores(run.scores)["rouge_l"])
    return scores


def _single_task_cells(
    grid: Grid, method: str, tasks: Sequence[str], rates: Mapping[str, float | None]
) -> Iterator[dict[str, Any]]:
    """The single-task runs of a seed, one task each, as one cell of a method of their own."""
    output, rate = Path(grid.recipe.output), rates.get(method)
    for seed in grid.section.seeds if rate is not None else ():
        parts = [RunFolder(output / Cell(method, rate, seed, task=task).path) for task in tasks]
        done = all(part.instances.is_file() for part in parts)
        error = None if done else next((error for part in parts if (error := _error(part))), None)
        instances = {task: scores for part in parts for task, scores in _read(part.instances).items()} if done else None
        yield {
            "method": method + SINGLE_TASK,
            "seed": seed,
            "order": None,
            "learning_rate": rate,
            "status": _status(done, error),
            "error": error,
            "selected": True,
            "validation_loss": None,
            "config": {},
            "environment": _joint_environment(parts) if done else {},
            "scores": mean_scores(instances) if instances else None,
            "instances": instances,
        }


def _joint_environment(parts: Sequence[RunFolder]) -> dict[str, Any]:
    """Of runs one after another: what they took together, and the most memory of any."""
    environments = [read_json(part.environment) for part in parts]
    trainings = [environment["training"] for environment in environments]
    sums = {key: sum(t[key] for t in trainings) for key in ("trainable_parameters", "steps", "tokens", "seconds")}
    peak = max(training["peak_memory_gib"] for training in trainings)
    return {**environments[0], "training": {**sums, "peak_memory_gib": peak}}


def _status(done: bool, error: str | None) -> str:
    return "done" if done else "missing" if error is None else "failed"


def _error(run: RunFolder) -> str | None:
    path = run.path / ERROR
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
