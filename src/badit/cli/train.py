"""``badit train RECIPE [key=value …]``."""

from __future__ import annotations

import argparse

from badit.cli.quiet import quiet_loading


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, such as recipes/superni-cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.epochs=2 output=runs/mine")
    parser.add_argument("--dry-run", action="store_true", help="validate recipe and data, say what would be done, stop")
    parser.epilog = "Run it again to go on after an interruption: what is done is not done twice."


def execute(options: argparse.Namespace) -> None:
    from badit.api import plan, train
    from badit.recipe import dump_recipe, load_recipe
    from badit.render import score_table
    from badit.runs import is_main_process

    quiet_loading()
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        planned = plan(recipe)
        print(dump_recipe(recipe))
        print(
            f"{len(planned.tasks)} tasks, {planned.training_instances} training and {planned.test_instances} "
            f"{recipe.evaluation.split} instances; the run would be written to {recipe.output}"
        )
        return
    run = train(recipe)
    if is_main_process():  # of several processes the first prints for all
        print(score_table({recipe.method.get("name", "badit"): run.scores}))
        print(f"\nRun: {run.path}")
