"""``badit compare``: one run per method, learning rate, seed (and task order), with all results in one file.

OUTPUT/METHOD/lr-RATE/seed-N                    all tasks mixed
OUTPUT/METHOD/order-NAME/lr-RATE/seed-N         sequence of tasks
OUTPUT/METHOD/[order-NAME/]search/lr-RATE/...   learning-rate search, if compare.search is set
OUTPUT/METHOD/single/lr-RATE/seed-N/TASK        single task
OUTPUT/METHOD                                   method that does not train
OUTPUT/results.json                             all results, see badit.comparison.results
"""

import hashlib
import math
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch

from badit.comparison.results import FORMAT, RESULTS, SINGLE_TASK, Results, load_results
from badit.comparison.worker import error_of, progress, start_cell
from badit.data import ordered
from badit.metrics.answers import METRICS, mean_scores
from badit.metrics.statistics import both_forms
from badit.models import device, warn_of_slow_dtype
from badit.recipe.schema import Recipe, RecipeLike, build_recipe, make_recipe, merged
from badit.runs.folder import ERROR, RunFolder
from badit.runs.scores import read_scores
from badit.support.console import say, status
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import exclusive, inside, read_json, write_json
from badit.training.fit import joint_training, keep_inputs, make_plan, task_fingerprints
from badit.training.methods import build_method, on_skeleton

_TOLERANCE = 0.05  # relative, of parameter counts; ranks are integers, so the counts match only approximately

Order = str | list[str] | None


def compare(
    recipe: RecipeLike | None = None, /, *, jobs: int = 1, progress: bool = True, **values: Any
) -> Results:
    """Trains and scores several methods, or resumes an interrupted comparison. A failed run does not stop the others.

    Args:
        recipe: as for :func:`train`, with a ``compare`` section.
        jobs: number of runs at a time; each gets an equal share of the CPU cores, and the GPU with the fewest runs.
        progress: print a line to stderr when a run starts or ends.
        values: override the recipe's values, such as ``compare={"seeds": [0]}``.

    Returns:
        The results of all runs; :func:`badit.summarise` averages them by method, :func:`badit.table` formats them.

    Raises:
        BaditError: invalid input. The error of a failed run is in the column ``error`` of the results' ``cells``.
    """
    if jobs < 1:
        raise BaditError(f"jobs: must be at least 1, not {jobs}")
    made = make_recipe(recipe, values)
    grid, output = Grid(made), Path(made.output)
    with exclusive(output):
        with status("checking data and methods"):
            comparison = _Comparison(grid, jobs, say if progress else lambda line: None)
        warn_of_slow_dtype(
            made.model.dtype, device()
        )  # warnings of the cells go to their log files
        try:
            comparison.run()
        finally:
            comparison.save()
    return load_results(output)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison. Learning rate and seed are None for a method that does not train."""

    method: str
    learning_rate: float | None = None
    seed: int | None = None
    order: Order = None
    task: str | None = None
    is_search: bool = (
        False  # trained with the values of compare.search, to choose the learning rate
    )

    def __str__(self) -> str:
        """The cell's folder, relative to the folder of the comparison."""
        if self.learning_rate is None:
            return self.method
        kind = "single" if self.task else f"order-{order_name(self.order)}" if self.order else None
        search = "search" if self.is_search else None
        parts = [
            self.method,
            kind,
            search,
            f"lr-{self.learning_rate:g}",
            f"seed-{self.seed}",
            self.task,
        ]
        return "/".join(filter(None, parts))


def order_name(order: str | Sequence[str]) -> str:
    """Returns a short folder name for an order; a name of more than 80 characters is cut and ends with a hash."""
    if isinstance(order, str):
        return order
    short = [re.sub(r"^(task\d+)_.*", r"\1", name) for name in order]
    name = "-".join(short if len(set(short)) == len(short) else order)
    return (
        name if len(name) <= 80 else f"{name[:71]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    )


class Grid:
    """The methods and cells of a recipe; BaditError if its ``compare`` section is missing or inconsistent."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.compare is None:
            raise BaditError(
                "compare: the recipe has no compare section; add one, as in recipes/superni-cpu.yaml"
            )
        self.recipe = recipe
        self.section = section = recipe.compare
        self.orders: Sequence[Order] = section.orders or [None]
        self.start_rates: dict[str, float | None] = {}  # of each method; None if it does not train
        for name in section.methods:
            if not re.fullmatch(r"[\w][\w.+-]*", name):
                raise BaditError(
                    f"compare.methods: {name!r:.60} is not a valid name; use letters, digits, - and _"
                )
            with _named(f"methods.{name}"):
                own = self.recipe_of(Cell(name, order=self.orders[0]))
                method = build_method(own.method)
                method.refuse_recipe(own)
            rate = own.training.learning_rate
            self.start_rates[name] = rate if method.trains else None
            if (
                method.trains
                and section.learning_rates is not None
                and rate not in section.learning_rates
            ):
                problem = f"the search starts at the training.learning_rate {rate:g}"
                raise BaditError(
                    f"compare.methods.{name}: {problem}; add it to compare.learning_rates"
                )
        if recipe.data.order is not None and not section.orders:
            raise BaditError(
                "data.order: not used in a comparison; set compare.orders, a list of orders"
            )
        for field in ("reference", "budget", "unmatched", "single_task"):
            value = getattr(section, field)
            for name in [value] if isinstance(value, str) else value or ():
                refuse_unknown(f"compare.{field}", name, section.methods)
        if fixed := [name for name in section.single_task if self.start_rates[name] is None]:
            raise BaditError(
                f"compare.single_task: {fixed[0]} trains nothing; remove it from the list"
            )
        listed: dict[str, list[Any]] = {
            "seeds": section.seeds,
            "orders": [order_name(o) for o in section.orders or ()],
        }
        listed |= {
            f"methods.{name}.seeds": entry.seeds or [] for name, entry in section.methods.items()
        }
        for field, values in listed.items():
            if twice := [value for value in values if values.count(value) > 1]:
                raise BaditError(
                    f"compare.{field}: {twice[0]} is listed more than once; list it once"
                )
        if section.vary_data and recipe.evaluation.split == "validation":
            fix = "set evaluation.split=test, or remove compare.vary_data"
            raise BaditError(
                f"compare.vary_data: every seed would be scored on different held-out instances; {fix}"
            )
        with _named("search"):
            self.recipe_of(self.searched(section.reference, self.start_rates[section.reference]))

    def searched(self, method: str, rate: float | None) -> Cell:
        """Returns the cell that measures a learning rate in the search, with the first seed and order."""
        return Cell(
            method,
            rate,
            self.seeds_of(method)[0],
            self.orders[0],
            is_search=self.section.search is not None,
        )

    def seeds_of(self, method: str) -> Sequence[int]:
        return self.section.methods[method].seeds or self.section.seeds

    def chosen(self, method: str, rate: float | None, tasks: Sequence[str] = ()) -> list[Cell]:
        """Returns all cells of a method at its chosen learning rate, and with ``tasks`` its single-task cells."""
        if self.start_rates[method] is None:
            return [Cell(method)]
        seeds = self.seeds_of(method)
        cells = [Cell(method, rate, seed, order) for seed in seeds for order in self.orders]
        if method in self.section.single_task:
            cells += [Cell(method, rate, seed, task=task) for seed in seeds for task in tasks]
        return cells

    def recipe_of(self, cell: Cell) -> Recipe:
        values = merged(
            {"training": {}, "data": {}},
            self.recipe.model_dump(exclude={"compare"}, exclude_unset=True),
        )
        entry = self.section.methods[cell.method]
        values["method"] = dict(entry.model_extra or {})
        values["training"] |= entry.training
        if cell.is_search:
            values = merged(values, self.section.search or {})
        values["output"] = str(self.run_of(cell).path)
        values["data"]["order"] = cell.order
        if cell.learning_rate is not None:
            values["training"] |= {"learning_rate": cell.learning_rate, "seed": cell.seed}
            if self.section.vary_data:
                values["data"]["seed"] = (
                    values["data"].get("seed", self.recipe.data.seed) + cell.seed
                )
        if cell.task is not None:
            values["data"]["tasks"] = [cell.task]
        return build_recipe(values)

    def run_of(self, cell: Cell) -> RunFolder:
        output = Path(self.recipe.output)
        return RunFolder.at(inside(output, output / str(cell)))


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except BaditError as error:
        raise BaditError(f"compare.{key}: {str(error).removeprefix('recipe: ')}") from None


def check(grid: Grid) -> tuple[list[str], dict[str, int]]:
    """Returns the tasks' names and each method's trainable parameters; BaditError if the comparison cannot run."""
    section, counts, output = grid.section, dict[str, int](), grid.recipe.output
    if RunFolder.at(output).config_path.is_file():
        raise BaditError(
            f"{output}: contains a run; choose another output=FOLDER for the comparison"
        )
    if (file := Path(output) / RESULTS).is_file():
        done = (
            load_results(output)
            .cells.query("status == 'done'")["method"]
            .str.removesuffix(SINGLE_TASK)
        )
        if len(done) and not any(
            (Path(output) / name).is_dir() for name in done
        ):  # it would be replaced
            raise BaditError(
                f"{file}: has results without their runs; choose another output=FOLDER, or move the file"
            )
    plan = make_plan(
        grid.recipe_of(grid.chosen(section.reference, grid.start_rates[section.reference])[0])
    )
    if section.learning_rates is not None:
        make_plan(plan.recipe, split="validation")
    sequences = [
        [task.name for task in ordered(plan.tasks, order)] for order in section.orders or ()
    ]
    if any(sequences.count(each) > 1 for each in sequences):
        raise BaditError(
            "compare.orders: two of them order these tasks in the same way; remove one"
        )
    tasks = [task.name for task in plan.tasks]
    for task in plan.tasks if section.single_task else ():
        if not task.train or not getattr(task, plan.recipe.evaluation.split):
            fix = "remove it from data.tasks, or leave out compare.single_task"
            raise BaditError(
                f"compare.single_task: task {task.name} cannot be both trained and scored; {fix}"
            )
    for name in section.methods:
        with _named(f"methods.{name}"):
            method, model = on_skeleton(grid.recipe_of(Cell(name)), tasks)
            counts[name] = method.trained_parameters(model)
    if section.budget is not None:
        budget = counts[section.budget]
        for name, count in counts.items():
            if (
                count
                and name not in section.unmatched
                and abs(count - budget) > _TOLERANCE * budget
            ):
                found = f"trains {count:,} parameters, {section.budget} trains {budget:,}"
                fix = f"change its rank to agree within {_TOLERANCE:.0%}, or list it in compare.unmatched"
                raise BaditError(f"compare.methods.{name}: {found}; {fix}")
    # Refuse runs in the folder that were made with another recipe or other data.
    fingerprints: dict[str, dict[str, str]] = {}
    for name, start in grid.start_rates.items():
        for rate in section.learning_rates or [start]:
            trials = [grid.searched(name, rate)] if section.learning_rates else []
            for cell in (*grid.chosen(name, rate, tasks), *trials):
                if grid.run_of(cell).config_path.is_file():
                    recipe = grid.recipe_of(cell)
                    run, data = RunFolder.prepare(recipe), recipe.data.model_dump_json()
                    if data not in fingerprints:
                        fingerprints[data] = task_fingerprints(make_plan(recipe).tasks)
                    keep_inputs(run, fingerprints[data])
    return tasks, counts


def find_rate(
    ladder: Sequence[float], start: float, loss_of: Callable[[float], float], level: float = 0.0
) -> float:
    """Searches an ascending list of learning rates for the lowest loss, until both neighbours of the best are worse.

    The loss is assumed to have a single minimum: a higher rate is not tried if the next lower one is better. A
    non-finite loss (a diverged or failed run) counts as the worst. Returns the lowest of the rates whose losses are
    less than ``level`` above the best loss, because a rate that is too high costs more than one that is too low.
    """
    best, losses = ladder.index(start), dict[int, float]()

    def loss_at(index: int) -> float:
        if index not in losses and 0 <= index < len(ladder):
            loss = loss_of(ladder[index])
            losses[index] = loss if math.isfinite(loss) else math.inf
        return losses.get(index, math.inf)

    while True:
        if loss_at(best) > loss_at(best - 1) or (best and min(losses.values()) == math.inf):
            best -= 1
        elif loss_at(best) > loss_at(best + 1):
            best += 1
        else:
            return ladder[
                min(
                    index
                    for index, loss in losses.items()
                    if loss < losses[best] + level or index == best
                )
            ]


class _Comparison:
    """Runs up to ``jobs`` cells at a time. The search of a method runs its cells one by one, before the others."""

    def __init__(self, grid: Grid, jobs: int, report: Callable[[str], None]) -> None:
        self._tasks, self._counts = check(grid)
        self._rates: dict[str, float | None] = {}
        self._grid, self._jobs, self._report = grid, jobs, report
        self._running: dict[
            Popen[bytes], tuple[Cell, int | None]
        ] = {}  # the cell and GPU of each process
        self._lock = threading.Lock()
        self._stopping = False

    def run(self) -> None:
        for name in (
            self._grid.start_rates
        ):  # known rates, so that results.json has all finished cells if this stops
            with suppress(LookupError):
                self._rates[name] = self._rate(name, run=False)
        todo = deque[Callable[[], Any]](
            partial(self._search, name) for name in self._grid.start_rates
        )
        running: set[Future[Any]] = set()
        with ThreadPoolExecutor(self._jobs) as pool, status("starting") as show:
            try:
                while todo or running:
                    while todo and len(running) < self._jobs:
                        running.add(pool.submit(todo.popleft()))
                    done, running = wait(running, timeout=2, return_when=FIRST_COMPLETED)
                    with self._lock:
                        now = [
                            (cell, self._grid.run_of(cell).path)
                            for cell, _ in self._running.values()
                        ]
                    show(
                        "; ".join(f"{cell}: {progress(folder)}" for cell, folder in now)
                        or "starting"
                    )
                    for cells in [
                        future.result() or [] for future in done
                    ]:  # a search returns its method's cells
                        todo.extendleft(
                            cells[:1]
                        )  # the first of each method comes before further ones
                        todo.extend(cells[1:])
            except BaseException:
                self._stop(signal.SIGTERM)
                try:
                    pool.shutdown(wait=True, cancel_futures=True)
                except (
                    KeyboardInterrupt
                ):  # second Ctrl-C: the cells lose all steps since their last checkpoints
                    self._stop(signal.SIGKILL)
                raise

    def save(self) -> None:
        """Writes results.json with the runs that are finished so far."""
        grid, rates, cells = self._grid, self._rates, list[dict[str, Any]]()
        with self._lock:
            for method in grid.start_rates:
                # The cells at the chosen learning rate, done or not, then the other cells of the search.
                chosen = grid.chosen(method, rates[method]) if method in rates else []
                searched = [
                    grid.searched(method, rate) for rate in grid.section.learning_rates or ()
                ]
                tried = [
                    cell
                    for cell in searched
                    if cell not in chosen and grid.run_of(cell).path.is_dir()
                ]
                cells += [_entry(grid, cell, selected=cell in chosen) for cell in (*chosen, *tried)]
            alone = [method for method in grid.section.single_task if rates.get(method) is not None]
            joint = [
                Cell(method, rates[method], seed)
                for method in alone
                for seed in grid.seeds_of(method)
            ]
            cells += [_entry(grid, cell, selected=True, tasks=self._tasks) for cell in joint]
            content = {
                "format": FORMAT,
                "protocol": "mixed" if grid.section.orders is None else "sequential",
                "reference": grid.section.reference,
                "methods": [*grid.start_rates, *(method + SINGLE_TASK for method in alone)],
                "trainable_parameters": self._counts,
                "cells": cells,
            }
            write_json(Path(grid.recipe.output) / RESULTS, content)

    def _stop(self, how: signal.Signals) -> None:
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.send_signal(how)

    def _search(self, name: str) -> list[Callable[[], None]]:
        """Finds a method's learning rate; returns the functions that run its cells."""
        self._rates[name] = rate = self._rate(name, run=True)
        if rate is not None and self._grid.section.learning_rates is not None:
            self._report(f"{name}: learning rate {rate:g}")
        return [
            partial(self._run_cell, cell, score=True)
            for cell in self._grid.chosen(name, rate, self._tasks)
        ]

    def _rate(self, name: str, *, run: bool) -> float | None:
        """Returns a method's learning rate; LookupError if a search cell has not ended and ``run`` is False."""
        start, ladder = self._grid.start_rates[name], self._grid.section.learning_rates

        def loss_of(rate: float) -> float:
            cell = self._grid.searched(name, rate)
            if run:
                self._run_cell(cell, score=False)
            loss = _validation_loss(self._grid.run_of(cell))
            if loss is None:
                raise LookupError(cell)
            return loss

        return (
            start
            if start is None or ladder is None
            else find_rate(ladder, start, loss_of, METRICS["nll"].margin)
        )

    def _run_cell(self, cell: Cell, *, score: bool) -> None:
        """Runs a cell unless it is done. Its error, if any, is written to its folder."""
        run = RunFolder.prepare(self._grid.recipe_of(cell))
        if (run.instances_path if score else run.validation_path).is_file():
            return
        threads = gpu = None  # a single job uses all cores and GPUs
        with self._lock:
            if self._stopping:
                raise KeyboardInterrupt
            self._report(f"{cell}: {'training and scoring' if score else 'training'}")
            if self._jobs > 1:
                threads = max(1, (os.cpu_count() or 1) // self._jobs)
                in_use = [gpu for _, gpu in self._running.values()]
                gpu = min(range(torch.cuda.device_count()), key=in_use.count, default=None)
            process = start_cell(run.path, score=score, threads=threads, device=gpu)
            self._running[process] = cell, gpu
        began = time.monotonic()
        with process:
            code = process.wait()
        with self._lock:
            del self._running[process]
        if self._stopping and code != 0:
            raise KeyboardInterrupt
        error = error_of(run.path, code)
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        self._report(
            f"{cell}: {'done' if error is None else f'FAILED ({error})'} in {minutes}:{seconds:02d}"
        )
        if score:
            self.save()


def _entry(grid: Grid, cell: Cell, *, selected: bool, tasks: Sequence[str] = ()) -> dict[str, Any]:
    """Returns one cell of results.json, from one run or, under a name with a suffix, from single-task runs."""

    def runs_alone(tasks: Sequence[str]) -> list[RunFolder]:
        return [grid.run_of(replace(cell, order=None, task=task)) for task in tasks]

    runs = runs_alone(tasks) or [grid.run_of(cell)]
    done = all((run.instances_path if selected else run.validation_path).is_file() for run in runs)
    errors = [
        file.read_text(encoding="utf-8").strip()
        for run in runs
        if (file := run.path / ERROR).is_file()
    ]
    scored = [read_json(run.instances_path) for run in runs if run.instances_path.is_file()]
    instances = {task: scores for of_run in scored for task, scores in of_run.items()}
    environment = runs[0].known_environment if done or not tasks else {}
    if tasks and done:  # sums and maxima over the single-task runs
        trainings = [run.environment["training"] for run in runs]
        trained = sum(training["trainable_parameters"] for training in trainings)
        environment["training"] = {**joint_training(trainings), "trainable_parameters": trained}
    loss = _validation_loss(runs[0])
    with explained(runs[0].instances_path, fix="delete the file to write it again", any_error=True):
        scores = mean_scores(instances) if done and instances else None
    entry = {
        "method": cell.method + (SINGLE_TASK if tasks else ""),
        "seed": cell.seed,
        "order": None if cell.order is None else order_name(cell.order),
        "learning_rate": cell.learning_rate,
        "status": "done" if done else "failed" if errors else "missing",
        "error": None if done or not errors else errors[0],
        "selected": selected,
        "validation_loss": None
        if loss is None or not math.isfinite(loss)
        else loss,  # JSON has no NaN or infinity
        "config": {}
        if tasks
        else grid.recipe_of(cell).model_dump(mode="json", exclude={"compare"}),
        "environment": environment,
        "scores": scores,
        "instances": instances if scores else None,
    }
    if cell.order is not None and scores is not None:
        sequence = read_scores(runs[0].scores_path)
        singles = runs_alone(sequence["order"])
        known = all(single.instances_path.is_file() for single in singles)
        alone = (
            [read_scores(single.scores_path)["rouge_l"] for single in singles] if known else None
        )
        entry |= {"tasks": sequence["order"], "matrix": sequence["matrix"]}
        entry["continual"] = both_forms(sequence["matrix"], alone)
    return entry


def _validation_loss(run: RunFolder) -> float | None:
    """Returns the validation loss: infinity if the cell failed, None if it has not ended."""
    if run.validation_path.is_file():
        with explained(
            run.validation_path, fix="delete the file to measure the loss again", any_error=True
        ):
            return float(read_json(run.validation_path)["loss"])
    return math.inf if (run.path / ERROR).is_file() else None
