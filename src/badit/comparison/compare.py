"""``badit compare``: searches every method's learning rate, then trains and scores the cells at the rates found.

A finished cell is not done again, a failed one is tried anew, and one that fails stops no other.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from badit.comparison.assemble import assemble
from badit.comparison.budget import refuse_unequal, trainable_parameters
from badit.comparison.grid import Cell, Grid
from badit.comparison.search import climb
from badit.comparison.worker import CellProcess
from badit.data import ordered
from badit.errors import BaditError
from badit.evaluation.results import RESULTS
from badit.files import read_json, write_json
from badit.recipe import Recipe
from badit.runs import RunFolder
from badit.train import device, make_plan, warn_of_slow_dtype


def compare(recipe: Recipe, *, jobs: int = 1, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs a comparison to its end, or to its end from where it stopped.

    Args:
        recipe: with a ``compare`` section.
        jobs: cells that run at a time, each with its share of the processor's cores and, in turn, one of the GPUs.
        report: takes a line for every cell that begins or ends.

    Returns:
        What ``OUTPUT/results.json`` then holds: every cell with its configuration, environment and scores.

    Raises:
        BaditError: bad input. What goes wrong within a cell is in its ``error`` and stops nothing.
    """
    grid = Grid(recipe)
    tasks, counts = check(grid)
    warn_of_slow_dtype(recipe.model.dtype, device())  # its cells' own words go to their logs
    run = _Comparison(grid, tasks, jobs, report)
    try:
        run.methods()
    finally:
        results = assemble(grid, tasks, run.rates, counts)
        write_json(Path(recipe.output) / RESULTS, results)
    return results


def check(grid: Grid) -> tuple[list[str], dict[str, int]]:
    """Validates every method, the data, the budgets and what is in the folder already.

    Returns:
        The tasks' names, and the number of parameters that each method trains.

    Raises:
        BaditError: something that would stop the comparison, or make it unfair.
    """
    for method in grid.methods.values():
        method.refuse_recipe(grid.recipe)
    first = next(iter(grid.chosen(grid.section.reference, grid.recipe.training.learning_rate)))
    recipe = grid.recipe_of(first)
    plan = make_plan(recipe)
    if grid.section.learning_rates is not None:
        make_plan(recipe, split="validation")
    for order in grid.orders:
        if order is not None:
            ordered(plan.tasks, order)
    tasks = [task.name for task in plan.tasks]
    counts = trainable_parameters(grid, tasks)
    refuse_unequal(grid, counts)
    _refuse_other_recipes(grid, tasks)
    return tasks, counts


def _refuse_other_recipes(grid: Grid, tasks: Sequence[str]) -> None:
    """What another recipe has left in the folder must not be taken for this comparison's."""
    for cell in grid.candidates(tasks):
        recipe = grid.recipe_of(cell)
        if RunFolder(recipe.output).config.is_file():
            RunFolder.prepare(recipe)


class _Comparison:
    def __init__(self, grid: Grid, tasks: list[str], jobs: int, report: Callable[[str], None]) -> None:
        self.grid = grid
        self._tasks = tasks
        self.rates: dict[str, float | None] = {}
        self._jobs = jobs
        self._report = report
        self._output = Path(grid.recipe.output)
        self._running: set[CellProcess] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._started = 0

    def methods(self) -> None:
        """All methods, as many at a time as there are jobs; each one's cells follow one another."""
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                for future in [pool.submit(self._method, name) for name in self.grid.methods]:
                    future.result()
            except BaseException:
                self._stop()
                try:
                    pool.shutdown(wait=True, cancel_futures=True)
                except KeyboardInterrupt:  # asked again: what the cells have done since their last checkpoints is lost
                    self._stop(at_once=True)
                raise

    def _stop(self, *, at_once: bool = False) -> None:
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.kill() if at_once else process.stop()

    def _method(self, name: str) -> None:
        self.rates[name] = rate = self._rate(name)
        for cell in self.grid.chosen(name, rate, self._tasks):
            self._run(cell, score=True)

    def _rate(self, name: str) -> float | None:
        start, ladder = self.grid.recipe.training.learning_rate, self.grid.section.learning_rates
        if not self.grid.trains(name):
            return None
        if ladder is None:
            return start
        rate, _ = climb(ladder, start, lambda rate: self._loss(self.grid.searched(name, rate)))
        self._report(f"{name}: learning rate {rate:g}")
        return rate

    def _loss(self, cell: Cell) -> float:
        kept = self._output / cell.path / "validation.json"
        if not kept.is_file() and self._run(cell, score=False) is not None:
            return math.inf
        loss = read_json(kept).get("loss")
        if isinstance(loss, bool) or not isinstance(loss, int | float):
            raise BaditError(f"{kept}: loss: must be a number; remove the file to measure it anew")
        return float(loss)

    def _run(self, cell: Cell, *, score: bool) -> str | None:
        """Runs a cell unless it has been; returns what went wrong, if anything."""
        recipe = self.grid.recipe_of(cell)
        run = RunFolder.prepare(recipe)
        if (run.instances if score else run.path / "validation.json").is_file():
            return None
        with self._lock:
            if self._stopping:
                raise KeyboardInterrupt
            self._report(f"{cell}: {'training and scoring' if score else 'training'}")
            process = CellProcess(
                json.dumps(recipe.model_dump(mode="json", exclude={"compare"})),
                run.path,
                score=score,
                threads=max(1, (os.cpu_count() or 1) // self._jobs) if self._jobs > 1 else None,
                device=self._next_device(),
            )
            self._running.add(process)
        began = time.monotonic()
        try:
            error = process.wait()
        finally:
            with self._lock:
                self._running.discard(process)
        if self._stopping and error is not None:
            raise KeyboardInterrupt
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        self._report(f"{cell}: {'done' if error is None else f'FAILED ({error})'} in {minutes}:{seconds:02d}")
        return error

    def _next_device(self) -> int | None:
        """The GPUs in turn; None with one job, which may have them all, and without any."""
        if self._jobs == 1:
            return None
        import torch

        self._started += 1
        return (self._started - 1) % torch.cuda.device_count() if torch.cuda.device_count() else None


def report_to_stderr(line: str) -> None:
    """For a terminal, whose standard output is for the table."""
    print(line, file=sys.stderr, flush=True)
