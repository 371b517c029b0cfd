"""The content of results.json, from the folders of a comparison's runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from badit.comparison.finished import FinishedCells
from badit.comparison.grid import Cell, Grid, order_name
from badit.comparison.results import FORMAT, SINGLE_TASK
from badit.metrics.answers import mean_scores
from badit.metrics.statistics import both_forms
from badit.runs.folder import ERROR, RunFolder
from badit.runs.scores import read_scores
from badit.support.errors import explained
from badit.support.files import read_json
from badit.training.fit import joint_training

# The fields of a line of regroupings.jsonl that results.json keeps.
_OF_REGROUPINGS = ("step", "module", "components_moved", "objective_before", "objective_after")


def results_content(
    grid: Grid,
    finished: FinishedCells,
    rates: Mapping[str, float | None],
    tasks: Sequence[str],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """Returns the results of the runs that are finished so far.

    ``finished`` has those whose folders are gone, ``rates`` the chosen learning rate of each method
    whose search has ended, ``tasks`` the names of all tasks, ``counts`` the trainable parameters of
    each method.
    """
    section = grid.section
    entries = []
    for method in grid.start_rates:
        # The cells at the chosen learning rate, done or not, then the others of the search.
        chosen = grid.chosen(method, rates[method]) if method in rates else []
        searched = [grid.searched(method, rate) for rate in section.learning_rates or ()]
        entries += [finished.entry(cell) or run_entry(grid, cell, selected=True) for cell in chosen]
        for cell in searched:
            # Without compare.search, the trial of the chosen rate is also a final run.
            if cell in chosen:
                continue
            entry = finished.entry(cell, selected=False)
            # The search does not try every rate.
            if entry is None and grid.folder_of(cell).path.is_dir():
                entry = run_entry(grid, cell, selected=False)
            if entry is not None:
                entries.append(entry)
    alone = [method for method in section.single_task if rates.get(method) is not None]
    for method in alone:
        for seed in grid.seeds_of(method):
            cell = Cell(method, rates[method], seed)
            # One entry stands for the runs on all tasks, so any task finds it.
            entry = finished.entry(replace(cell, task=tasks[0]))
            entries.append(entry or single_task_entry(grid, cell, tasks))
    return {
        "format": FORMAT,
        "protocol": "mixed" if section.orders is None else "sequential",
        "reference": section.reference,
        "methods": [*grid.start_rates, *(method + SINGLE_TASK for method in alone)],
        "trainable_parameters": dict(counts),
        "cells": entries,
    }


def run_entry(grid: Grid, cell: Cell, *, selected: bool) -> dict[str, Any]:
    """Returns the entry of one run; ``selected`` if its learning rate was chosen."""
    folder = grid.folder_of(cell)
    done = (folder.instances_path if selected else folder.validation_path).is_file()
    entry = _entry(cell, [folder], done, selected=selected)
    loss = validation_loss(folder)
    if loss is not None and math.isfinite(loss):  # JSON has no NaN or infinity
        entry["validation_loss"] = loss
    recipe = grid.run_of(cell).recipe
    # A later comparison recognises changed recipes by it if the run's folder is gone.
    entry["config"] = recipe.model_dump(mode="json", exclude={"compare"})
    entry["environment"] = folder.known_environment
    if cell.order is not None and entry["scores"] is not None:
        entry |= _sequence(grid, cell, folder)
    return entry


def single_task_entry(grid: Grid, cell: Cell, tasks: Sequence[str]) -> dict[str, Any]:
    """Returns the joint entry of a method's single-task runs with one seed."""
    folders = _single_task_folders(grid, cell, tasks)
    done = all(folder.instances_path.is_file() for folder in folders)
    entry = _entry(cell, folders, done, selected=True)
    entry["method"] += SINGLE_TASK
    if done:
        trainings = [folder.environment["training"] for folder in folders]
        # As one model per task, whose parameters add up; joint_training takes the maximum.
        trained = sum(training["trainable_parameters"] for training in trainings)
        joint = {**joint_training(trainings), "trainable_parameters": trained}
        entry["environment"] = {**folders[0].known_environment, "training": joint}
    return entry


def _single_task_folders(grid: Grid, cell: Cell, tasks: Sequence[str]) -> list[RunFolder]:
    return [grid.folder_of(replace(cell, order=None, task=task)) for task in tasks]


def _entry(
    cell: Cell, folders: Sequence[RunFolder], done: bool, *, selected: bool
) -> dict[str, Any]:
    """Returns what the entries of a run and of several single-task runs have in common."""
    errors = [
        (folder.path / ERROR).read_text(encoding="utf-8").strip()
        for folder in folders
        if (folder.path / ERROR).is_file()
    ]
    status = "missing"
    if done:
        status = "done"
    elif errors:
        status = "failed"
    # Each single-task run has the instances of its own task.
    instances: dict[str, Any] = {}
    for folder in folders:
        if folder.instances_path.is_file():
            instances |= read_json(folder.instances_path)
    scores = None
    if done and instances:
        fix = "delete the file to write it again"
        with explained(folders[0].instances_path, fix=fix, any_error=True):
            # From the instances, so that single-task runs get the same means as a run on all tasks.
            scores = mean_scores(instances)
    entry = {
        "method": cell.method,
        "seed": cell.seed,
        "order": None if cell.order is None else order_name(cell.order),
        "learning_rate": cell.learning_rate,
        "status": status,
        "error": errors[0] if status == "failed" else None,
        "selected": selected,
        "validation_loss": None,
        "config": {},
        "environment": {},
        "scores": scores,
        "instances": None if scores is None else instances,
    }
    if done and (regroupings := logged_regroupings(folders)):
        entry["regroupings"] = regroupings
    return entry


def logged_regroupings(folders: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Returns the columns of the runs' logs of regroupings, without labels; empty without a log.

    There is a row for each layer and regrouping. The column ``run`` is the name of its folder.
    """
    rows = []
    for folder in folders:
        with explained(folder.regroupings_path, fix="delete the file to skip it", any_error=True):
            rows += [
                [folder.path.name, *(line[field] for field in _OF_REGROUPINGS)]
                for line in folder.log(folder.regroupings_path)
            ]
    if not rows:
        return {}
    names = ("run", *_OF_REGROUPINGS)
    return {name: [*column] for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _sequence(grid: Grid, cell: Cell, folder: RunFolder) -> dict[str, Any]:
    """Returns the fields of a sequence's entry: tasks, matrix, and scores of continual learning."""
    scores = read_scores(folder.scores_path)
    # Forward transfer needs the score of a model trained on each task alone.
    singles = _single_task_folders(grid, cell, scores["order"])
    scores_alone = None
    if all(single.instances_path.is_file() for single in singles):
        scores_alone = [read_scores(single.scores_path)["rouge_l"] for single in singles]
    return {
        "tasks": scores["order"],
        "matrix": scores["matrix"],
        "continual": both_forms(scores["matrix"], scores_alone),
    }


def validation_loss(folder: RunFolder) -> float | None:
    """Returns the validation loss: infinity if the cell failed, None if it has not ended."""
    path = folder.validation_path
    if path.is_file():
        fix = "delete the file to measure the loss again"
        with explained(path, fix=fix, any_error=True):
            return float(read_json(path)["loss"])
    # The search continues without the rates that failed.
    if (folder.path / ERROR).is_file():
        return math.inf
    return None
