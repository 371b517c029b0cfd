"""Checks of a comparison that need no torch, whose import takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager

from badit.recipe.options import refuse_method
from badit.recipe.schema import CompareSection, Recipe
from badit.runs.folder import refuse_run
from badit.runs.unresolved import read_tasks
from badit.support.errors import BaditError


def refuse_comparison(recipe: Recipe) -> None:
    """Raises BaditError if the folder has a run, or for invalid methods or data."""
    refuse_run(recipe.output)
    for name, entry in section_of(recipe).methods.items():
        with of_key(f"methods.{name}"):
            refuse_method(entry.model_extra or {})
    read_tasks(recipe)


def section_of(recipe: Recipe) -> CompareSection:
    """Returns the ``compare`` section; BaditError if the recipe has none."""
    if recipe.compare is None:
        fix = "add one, as in recipes/superni-cpu.yaml"
        raise BaditError(f"compare: the recipe has no compare section; {fix}")
    return recipe.compare


@contextmanager
def of_key(key: str) -> Iterator[None]:
    """Lets errors begin with a key of the ``compare`` section."""
    try:
        yield
    except BaditError as error:
        raise BaditError(f"compare.{key}: {str(error).removeprefix('recipe: ')}") from None
