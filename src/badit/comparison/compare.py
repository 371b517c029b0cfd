"""``badit compare``: runs the cells of a grid, several at a time, and writes results.json."""

import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

import torch

from badit.comparison.checks import check
from badit.comparison.entries import results_content, validation_loss
from badit.comparison.finished import FinishedCells
from badit.comparison.grid import Cell, Grid
from badit.comparison.rates import find_rate
from badit.comparison.results import RESULTS, Results, load_results, write_results
from badit.comparison.worker import error_of, progress_of, start_cell
from badit.metrics.answers import METRICS, score_text
from badit.models import device, warn_of_slow_dtype
from badit.recipe.loading import make_recipe
from badit.recipe.schema import RecipeLike
from badit.runs.folder import RunFolder
from badit.runs.scores import read_scores
from badit.support.console import say, status
from badit.support.errors import BaditError
from badit.support.files import exclusive

if TYPE_CHECKING:
    from badit.comparison.cluster import Cluster, ClusterCell

    Process = Popen[bytes] | ClusterCell
_BETWEEN_LINES = 30  # seconds between two lines on the progress in a log
Task = Callable[[], "list[Task] | None"]  # what a thread does; a search returns further tasks


def compare(
    recipe: RecipeLike | None = None,
    /,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    progress: bool = True,
    **values: Any,
) -> Results:
    """Trains and scores several methods, or resumes an interrupted comparison.

    A failed run does not stop the others.

    Args:
        recipe: as for :func:`train`, with a ``compare`` section.
        jobs: number of runs at a time (default: 1; with ``ray``, as many as fit). Without ``ray``,
            each gets an equal share of the CPU cores, and the GPU with the fewest runs.
        ray: the address of a running Ray cluster, or "auto" for that of this machine. Each run is a
            task with the resources ``compare.resources``, and all nodes share the file system.
        progress: print a line to stderr when a run starts or ends.
        values: override the recipe's values, such as ``compare={"seeds": [0]}``.

    Returns:
        The results of all runs; :func:`badit.summarise` averages them by method,
        :func:`badit.table` formats them.

    Raises:
        BaditError: invalid input. The error of a failed run is in the column ``error`` of the
            results' ``cells``.
    """
    if jobs is not None and jobs < 1:
        raise BaditError(f"jobs: must be at least 1, not {jobs}")
    grid = Grid(make_recipe(recipe, values))
    output = Path(grid.recipe.output)
    cluster = None if ray is None else _cluster(grid, ray)
    if jobs is None:
        jobs = 1 if cluster is None else cluster.places()
    with exclusive(output):
        with status("checking data and methods", in_logs=True):
            comparison = _Comparison(grid, jobs, say if progress else _say_nothing, cluster)
        # Those of the cells go to their log files.
        if cluster is None:
            warn_of_slow_dtype(grid.recipe.model.dtype, device())
        try:
            comparison.run()
        finally:
            # Also after an error or Ctrl-C: results.json has all cells that finished.
            comparison.save()
    return load_results(output)


def _cluster(grid: Grid, address: str) -> "Cluster":
    from badit.comparison.cluster import Cluster

    sources = " ".join(entry["path"] for entry in grid.recipe.data.entries)
    return Cluster(address, grid.section.resources, re.findall(r"\w+", sources))


def _say_nothing(line: str) -> None:
    pass


def _scores_of(folder: RunFolder) -> str:
    scores = read_scores(folder.scores_path)
    texts = [
        f"{metric.label} {score_text(scores[name], name)}"
        for name, metric in METRICS.items()
        if name in scores
    ]
    return f": {', '.join(texts)}"


class _Comparison:
    """Runs up to ``jobs`` cells at a time.

    The search of a method runs its cells one by one, before the method's other cells.
    """

    def __init__(
        self, grid: Grid, jobs: int, report: Callable[[str], None], cluster: "Cluster | None" = None
    ) -> None:
        self._grid = grid
        self._jobs = jobs
        self._cluster = cluster
        self._report = report
        self._finished = FinishedCells(grid)
        self._tasks, self._counts = check(grid, self._finished)
        self._rates: dict[str, float | None] = {}  # of the methods whose search has ended
        # The cell and the GPU of each process.
        self._running: dict[Process, tuple[Cell, int | None]] = {}
        self._lock = threading.Lock()  # for _running, _stopping and the file of results
        self._stopping = False
        self._logged = time.monotonic()

    def run(self) -> None:
        self._find_known_rates()
        # Each method starts with its search, which returns its further cells.
        todo = deque[Task](partial(self._search, name) for name in self._grid.start_rates)
        running: set[Future[list[Task] | None]] = set()
        with ThreadPoolExecutor(self._jobs) as pool, status("starting") as show:
            try:
                while todo or running:
                    while todo and len(running) < self._jobs:
                        running.add(pool.submit(todo.popleft()))
                    # The timeout keeps the progress up to date while no cell ends.
                    done, running = wait(running, timeout=2, return_when=FIRST_COMPLETED)
                    progress = self._progress()
                    show(progress)
                    self._log(progress)
                    for future in done:
                        cells = future.result() or []
                        # The first cell of each method comes before further ones.
                        todo.extendleft(cells[:1])
                        todo.extend(cells[1:])
            except BaseException:
                # Each cell saves a checkpoint and ends, so the same command continues all of them.
                self._stop(signal.SIGTERM)
                try:
                    pool.shutdown(wait=True, cancel_futures=True)
                except KeyboardInterrupt:
                    # Second Ctrl-C: the cells lose all steps since their last checkpoints.
                    self._stop(signal.SIGKILL)
                raise

    def _find_known_rates(self) -> None:
        """Finds the rates of finished searches.

        So results.json has all finished cells if this comparison stops.
        """
        for name in self._grid.start_rates:
            with suppress(LookupError):
                self._rates[name] = self._rate(name, run=False)

    def _progress(self) -> str:
        with self._lock:
            cells = [cell for cell, _ in self._running.values()]
        lines = [f"{cell}: {progress_of(self._grid.folder_of(cell).path)}" for cell in cells]
        return "; ".join(lines) or "starting"

    def _log(self, progress: str) -> None:
        """Reports the progress every half minute, where no terminal shows it all the time."""
        if sys.stderr.isatty() or time.monotonic() - self._logged < _BETWEEN_LINES:
            return
        self._logged = time.monotonic()
        self._report(progress)

    def save(self) -> None:
        """Writes results.json with the runs that are finished so far."""
        with self._lock:
            content = results_content(
                self._grid, self._finished, self._rates, self._tasks, self._counts
            )
            write_results(Path(self._grid.recipe.output) / RESULTS, content)

    def _stop(self, how: signal.Signals) -> None:
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.send_signal(how)

    def _search(self, name: str) -> "list[Task]":
        """Finds a method's learning rate; returns the functions that run its cells."""
        rate = self._rate(name, run=True)
        self._rates[name] = rate
        if rate is not None and self._grid.section.learning_rates is not None:
            self._report(f"{name}: learning rate {rate:g}")
        cells = self._grid.chosen(name, rate, self._tasks)
        return [partial(self._run_cell, cell, score=True) for cell in cells]

    def _rate(self, name: str, *, run: bool) -> float | None:
        """Returns a method's rate; LookupError if a search cell has not ended and not ``run``."""
        start = self._grid.start_rates[name]
        ladder = self._grid.section.learning_rates
        if start is None or ladder is None:
            return start

        def loss_of(rate: float) -> float:
            cell = self._grid.searched(name, rate)
            finished_loss = self._finished.validation_loss(cell)
            # The cell's folder is gone, but its entry is in results.json.
            if finished_loss is not None:
                return finished_loss
            if run:
                self._run_cell(cell, score=False)
            loss = validation_loss(self._grid.folder_of(cell))
            if loss is None:
                raise LookupError(cell)
            return loss

        return find_rate(ladder, start, loss_of, METRICS["nll"].margin)

    def _run_cell(self, cell: Cell, *, score: bool) -> None:
        """Runs a cell unless it is done. Its error, if any, is written to its folder."""
        if self._finished.entry(cell) is not None:
            return
        run = self._grid.run_of(cell)
        run.prepare_folder()
        # The file that a cell writes last, so it says that the cell is done.
        result = run.folder.instances_path if score else run.folder.validation_path
        if result.is_file():
            return
        process = self._start(cell, run.folder.path, score)
        began = time.monotonic()
        with process:
            code = process.wait()
        with self._lock:
            del self._running[process]
        # The comparison stopped the cell, so its end is not a failure.
        if self._stopping and code != 0:
            raise KeyboardInterrupt

        error = error_of(run.folder.path, code)
        outcome = "done" if error is None else f"FAILED ({error})"
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        scores = _scores_of(run.folder) if score and error is None else ""
        self._report(f"{cell}: {outcome} in {minutes}:{seconds:02d}{scores}")
        # badit table and report can show the results while other cells run.
        if score:
            self.save()

    def _start(self, cell: Cell, folder: Path, score: bool) -> "Process":
        """Starts a cell's process; KeyboardInterrupt if the comparison is stopping."""
        threads = gpu = None  # a single job uses all cores and GPUs
        with self._lock:
            # Under the lock: a process started after the signal to all cells would not receive it.
            if self._stopping:
                raise KeyboardInterrupt
            self._report(f"{cell}: {'training and scoring' if score else 'training'}")
            if self._cluster is None and self._jobs > 1:
                threads = max(1, (os.cpu_count() or 1) // self._jobs)
                in_use = [used for _, used in self._running.values()]
                gpus = range(torch.cuda.device_count())
                gpu = min(gpus, key=in_use.count, default=None)
            if self._cluster is None:
                process = start_cell(folder, score=score, threads=threads, device=gpu)
            else:
                process = self._cluster.start(folder, score=score)
            self._running[process] = cell, gpu
        return process
