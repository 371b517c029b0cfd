"""``badit train``."""

from badit.cli.app import Overrides, app, load, read_recipe
from badit.support.console import is_main_process


@app.command
def train(
    recipe: str, *overrides: Overrides, dry_run: bool = False, allow_changed_inputs: bool = False
) -> str | None:
    """Train and score a recipe.

    The same command resumes an interrupted run. Finished work is not repeated.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with badit, such as own-tasks.
        dry_run: check recipe, data and model, print the steps and the estimated costs, and exit
            without training.
        allow_changed_inputs: resume the run even if its data or base weights have changed, and
            record the change.
    """
    loaded_recipe = read_recipe(recipe, overrides)
    if dry_run:
        text = load("badit.recipe.saved").dump_recipe(loaded_recipe)
        return "\n".join([text, *load("badit.authoring.dry_run").check(loaded_recipe)])
    run = load("badit.api").train(loaded_recipe, allow_changed_inputs=allow_changed_inputs)
    # Only rank 0 scores.
    if not is_main_process():
        return None
    return f"{load('badit.runs.scores').score_table(run.scores)}\n\nRun: {run.path}"
