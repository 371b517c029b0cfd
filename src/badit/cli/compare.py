"""``badit compare RECIPE [key=value …]``."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from badit.cli.quiet import quiet_loading


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file with a compare section, such as recipes/superni-cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as compare.seeds=[0] output=runs/mine")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; they share the cores and GPUs (default: 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="validate all, show methods and budgets, stop")
    parser.epilog = (
        "Run it again to go on after an interruption: what is done is not done twice, what failed is tried again. "
        "Print the table again, in other formats too, with: badit table OUTPUT"
    )


def execute(options: argparse.Namespace) -> int:
    from badit.api import compare
    from badit.compare import Grid, check
    from badit.recipe import load_recipe
    from badit.render import text_table

    quiet_loading()
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        grid = Grid(recipe)
        rows = [[name, f"{count:,}" if count else "–"] for name, count in check(grid)[1].items()]
        print(text_table(["method", "trainable parameters"], rows, right={1}))
        print(f"\nThe runs would be written to {recipe.output}")
        return 0
    with _sigterm_as_ctrl_c():
        results = compare(recipe, jobs=options.jobs)
    from badit.render import render
    from badit.results import RESULTS

    path = Path(recipe.output) / RESULTS
    print(render(path))
    print(f"\nResults: {path}")
    return int("failed" in set(results.cells["status"]))


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A batch system's SIGTERM, too, must reach the running cells, which have sessions of their own."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
