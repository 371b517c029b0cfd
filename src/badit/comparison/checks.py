"""Checks of a comparison before its first run."""

from collections.abc import Mapping

from badit.comparison.finished import FinishedCells
from badit.comparison.grid import Cell, Grid
from badit.comparison.refusals import of_key
from badit.data import ordered
from badit.runs.fingerprints import keep_inputs, task_fingerprints
from badit.runs.folder import refuse_run
from badit.runs.resolved import ResolvedRun
from badit.support.errors import BaditError
from badit.training.methods import on_skeleton

# Relative, of parameter counts: ranks are integers, so the counts match only approximately.
_TOLERANCE = 0.05


def check(grid: Grid, finished: FinishedCells) -> tuple[list[str], dict[str, int]]:
    """Returns the tasks' names and each method's number of trainable parameters.

    BaditError if the comparison cannot run.
    """
    section = grid.section
    refuse_run(grid.recipe.output)
    start_rate = grid.start_rates[section.reference]
    # All methods train on the reference's data, so its tasks are checked for all.
    reference = grid.run_of(grid.chosen(section.reference, start_rate)[0])
    if section.learning_rates is not None:
        # The search compares validation losses.
        reference.refuse_unscorable("validation")
    _refuse_equal_orders(grid, reference)
    if section.single_task:
        _refuse_single_tasks(reference)
    tasks = [task.name for task in reference.tasks]
    counts = {}
    for name in section.methods:
        # The model is a skeleton on the meta device: counting needs no weights.
        with of_key(f"methods.{name}"):
            run = grid.run_of(Cell(name))
            method, model = on_skeleton(run.recipe, run.method, tasks)
            counts[name] = method.trained_parameters(model)
    _refuse_other_budget(grid, counts)
    _refuse_changed_runs(grid, finished, tasks)
    return tasks, counts


def _refuse_equal_orders(grid: Grid, reference: ResolvedRun) -> None:
    sequences = []
    for order in grid.section.orders or ():
        # Orders with different names can be equal for the chosen tasks.
        sequence = [task.name for task in ordered(reference.tasks, order)]
        if sequence in sequences:
            problem = "two of them order these tasks in the same way; remove one"
            raise BaditError(f"compare.orders: {problem}")
        sequences.append(sequence)


def _refuse_single_tasks(reference: ResolvedRun) -> None:
    split = reference.recipe.evaluation.split
    for task in reference.tasks:
        if not task.train or not getattr(task, split):
            problem = f"task {task.name} cannot be both trained and scored"
            fix = "remove it from data.tasks, or leave out compare.single_task"
            raise BaditError(f"compare.single_task: {problem}; {fix}")


def _refuse_other_budget(grid: Grid, counts: Mapping[str, int]) -> None:
    section = grid.section
    if section.budget is None:
        return
    budget = counts[section.budget]
    for name, count in counts.items():
        # A method that trains nothing cannot match a budget.
        is_exempt = not count or name in section.unmatched
        if not is_exempt and abs(count - budget) > _TOLERANCE * budget:
            problem = f"trains {count:,} parameters, {section.budget} trains {budget:,}"
            fix = f"change its rank to agree within {_TOLERANCE:.0%}, or list it in "
            raise BaditError(f"compare.methods.{name}: {problem}; {fix}compare.unmatched")


def _refuse_changed_runs(grid: Grid, finished: FinishedCells, tasks: list[str]) -> None:
    """Raises BaditError for runs and results that were made with other recipes or other data."""
    fingerprints: dict[str, dict[str, str]] = {}
    cells = _all_cells(grid, tasks)
    finished.refuse_others(cells)
    for cell in cells:
        has_folder = grid.folder_of(cell).config_path.is_file()
        if not has_folder and not finished.entries_of(cell):
            continue
        run = grid.run_of(cell)
        data = run.recipe.data.model_dump_json()
        # Hashing the tasks takes long, and most cells have the same data.
        if data not in fingerprints:
            fingerprints[data] = task_fingerprints(run.tasks)
        if has_folder:
            # Refuses a folder with a run of another recipe.
            run.prepare_folder()
            keep_inputs(run.folder, fingerprints[data])
        else:
            finished.refuse_changed(run, fingerprints[data], cell)


def _all_cells(grid: Grid, tasks: list[str]) -> list[Cell]:
    ladder = grid.section.learning_rates
    cells = []
    for name, start_rate in grid.start_rates.items():
        # The search may choose any rate of the ladder, so the final cells of each are checked.
        for rate in ladder or [start_rate]:
            cells += grid.chosen(name, rate, tasks)
            if ladder:
                cells.append(grid.searched(name, rate))
    return cells
