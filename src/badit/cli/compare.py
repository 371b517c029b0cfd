"""``badit compare``, and ``badit demo``, which is a comparison."""

import signal
from pathlib import Path
from typing import Any

from cyclopts.types import PositiveInt

from badit.api import analyze, table
from badit.cli.analyze import shown_verdict
from badit.cli.app import Overrides, app, load, read_recipe, write_report_if_possible
from badit.support.console import say, show

_INSTANCES = 4  # of each task, that the demo analyzes


@app.command
def compare(
    recipe: str,
    *overrides: str,
    jobs: PositiveInt | None = None,
    ray: str | None = None,
    dry_run: bool = False,
) -> str | int:
    """Train and score methods, each at its best learning rate of compare.learning_rates.

    The same command resumes an interrupted comparison: finished runs are kept, failed runs are
    repeated. It prints a table (again, also in other formats: badit table OUTPUT) and writes
    OUTPUT/report.html.

    Args:
        recipe: a YAML file with a compare section, or the name of one that comes with badit, such
            as own-tasks.
        overrides: key=value, such as compare.seeds=[0] output=runs/mine.
        jobs: number of runs at a time; they share the cores and GPUs (default: 1; with --ray, as
            many as fit).
        ray: the address of a Ray cluster whose nodes run the cells, or auto for the running one;
            needs badit[ray]. See docs/several-gpus.md.
        dry_run: check everything, print the methods, their budgets and the estimated costs of one
            run, and exit.
    """
    loaded_recipe = read_recipe(recipe, overrides)
    if dry_run:
        return "\n".join(load("badit.authoring.dry_run").check_comparison(loaded_recipe))
    cells = _compared(loaded_recipe, jobs=jobs, ray=ray)
    _report(loaded_recipe.output)
    return _exit_code(cells)


@app.command
def demo(*overrides: Overrides) -> str | int:
    """Tune SmolLM2 on built-in tasks with LoRA and with BADIT, and analyze the latter.

    It does 'badit compare demo' and 'badit analyze' on BADIT's run, and writes one report. The same
    command resumes an interrupted demo. To start over, remove the output folder.
    """
    recipe = read_recipe(str(load("badit.recipe.loading").shipped_recipes()["demo"]), overrides)
    cells = _compared(recipe)
    of_badit = cells[cells["method"] == "badit"]
    # Values on the command line may have removed BADIT.
    is_analysed = not _exit_code(cells) and len(of_badit)
    if is_analysed:
        first = of_badit.iloc[0]
        cell_of = load("badit.comparison.grid").Cell
        cell = cell_of("badit", first["learning_rate"], int(first["seed"]))
        run = Path(recipe.output, str(cell))
        say("badit: measuring on BADIT's run which tasks conflict, and what its experts do")
        tables = analyze(run, instances=_INSTANCES, output=recipe.output)
        show(f"\n{shown_verdict(tables, Path(recipe.output), run)}")
    _report(recipe.output)
    if is_analysed:
        show("Next, your own tasks: badit init my-tasks.csv")
    return _exit_code(cells)


def _compared(recipe: Any, **options: Any) -> Any:
    """Runs a comparison and prints its table; returns its cells."""
    # SIGTERM (from a batch system) is handled like Ctrl-C: the cells run in separate sessions and
    # must be stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = load("badit.comparison.compare").compare(recipe, **options)
    path = Path(recipe.output, load("badit.comparison.results").RESULTS)
    # Printed here, because the command returns the exit code.
    show(f"{table(path)}\n\nResults: {path}")
    return results.cells


def _report(output: str) -> None:
    show(write_report_if_possible([output], Path(output, "report.html")))


def _exit_code(cells: Any) -> int:
    return int("failed" in set(cells["status"]))
