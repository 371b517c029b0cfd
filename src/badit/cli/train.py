"""``badit train RECIPE [key=value …]``."""

from __future__ import annotations

import argparse

from badit.cli.quiet import quiet_loading
from badit.cli.tables import score_table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, such as recipes/superni-cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.epochs=2 output=runs/mine")
    parser.add_argument("--dry-run", action="store_true", help="validate recipe and data, say what would be done, stop")
    parser.epilog = "Run it again to go on after an interruption: what is done is not done twice."


def execute(options: argparse.Namespace) -> None:
    from badit.recipe import dump_recipe, load_recipe
    from badit.training.plan import make_plan
    from badit.training.run import train

    quiet_loading()
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        plan = make_plan(recipe)
        print(dump_recipe(recipe))
        print(
            f"{len(plan.tasks)} tasks, {plan.training_instances} training and {plan.test_instances} "
            f"{recipe.evaluation.split} instances; the run would be written to {recipe.output}"
        )
        return
    scores = train(recipe)
    if not scores:  # one of several processes, which the first prints for
        return
    print(score_table({recipe.method.get("name", "badit"): scores}))
    print(f"\nRun: {recipe.output}")
