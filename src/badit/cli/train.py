"""``badit train``."""

import shlex
from typing import Any

from badit.cli.app import Overrides, app, load, read_recipe
from badit.support.console import is_main_process, show
from badit.support.errors import BaditError


@app.command
def train(
    recipe: str,
    /,
    *overrides: Overrides,
    dry_run: bool = False,
    verbose: bool = False,
    allow_changed_inputs: bool = False,
) -> str | None:
    """Train and score a recipe.

    The same command resumes an interrupted run. Finished work is not repeated. If the last
    gradient norms are 0 or not finite, the exit code is 2, after everything is written. It ends
    with the scores of the untuned model on a few instances (evaluation.untuned=0: without them).

    Args:
        recipe: a YAML file, or the name of a recipe that comes with badit, such as own-tasks.
        dry_run: check recipe, data and model, print the steps and the estimated costs, and exit
            without training.
        verbose: with --dry-run, also print the recipe with every default.
        allow_changed_inputs: resume the run even if its data, base model or tokenizer have
            changed, and record the change.
    """
    loaded_recipe = read_recipe(recipe, overrides)
    if dry_run:
        command = shlex.join(["badit", "train", recipe, *overrides])
        return _checked(loaded_recipe, verbose, f"Next: {command}")
    if verbose:
        raise BaditError("--verbose: prints the recipe of a dry run; add --dry-run")
    run = load("badit.api").train(loaded_recipe, allow_changed_inputs=allow_changed_inputs)
    return show_trained(run)


def show_trained(run: Any) -> str | None:
    """Shows the scores of a trained run, and returns the next commands.

    Raises:
        BaditError: the training has diverged.
    """
    # Only rank 0 scores.
    if not is_main_process():
        return None
    problem = run.environment.get("diverged")
    if problem is not None:
        fix = "its files are complete; train again with a lower training.learning_rate"
        raise BaditError(f"{run.path}: the training has diverged ({problem}); {fix}")
    scores = load("badit.runs.scores")
    show(scores.score_table(run.scores))
    if run.earlier_scores_path.is_file():
        earlier = scores.scores_frame(scores.read_scores(run.earlier_scores_path))
        show(f"\nEarlier tasks:\n{scores.score_table(earlier)}")
    trained = load("badit.runs.resolved").open_run(run)
    both = load("badit.evaluation.untuned").beside_untuned(trained)
    if both is not None:
        show(f"\n{both.text()}")
    path = str(run.path)
    answer = load("badit.evaluation.prompts").answer_command(trained)
    analysis = shlex.join(["badit", "analyze", path])
    return f"\nRun: {path}\nAnswer an input: {answer}\nWhich tasks conflict: {analysis}"


def _checked(recipe: Any, verbose: bool, command: str) -> str:
    tasks = load("badit.runs.unresolved").read_run(recipe).tasks
    lines = load("badit.authoring.dry_run").check(recipe, tasks)
    if not verbose:
        return "\n".join([*lines, "the recipe with every default: add --verbose", command])
    resolved = load("badit.runs.resolved").resolve(recipe, tasks).recipe
    # The recipe comes last, so that it can be cut off and saved.
    return "\n".join([*lines, command, "", load("badit.recipe.saved").dump_recipe(resolved)])
