"""The recipe of a run that adds tasks to another run."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from badit.recipe.loading import build_recipe, merged
from badit.recipe.schema import Recipe, source_of
from badit.runs.folder import AnyPath, RunFolder
from badit.support.errors import BaditError

# Overrides of the command that stand for keys of the section.
_SHORT = ("merge",)


def extended_recipe(
    run: RunFolder,
    data: AnyPath,
    output: AnyPath | None,
    overrides: Sequence[str],
    values: Mapping[str, Any],
) -> Recipe:
    """Returns the recipe of a run, with new tasks and the folder of the run that they extend."""
    path = os.path.abspath(run.path)
    keys = [*values, *(override.partition("=")[0] for override in overrides)]
    for key in keys:
        if key.partition(".")[0] == "method":
            fix = "leave it out, or train a new run"
            raise BaditError(f"{key}: badit extend takes the method of {path}; {fix}")
    recipe = run.trusted_recipe().model_dump(mode="json", exclude={"compare", "data", "extend"})
    recipe["data"] = {"source": source_of(os.fspath(data))}
    recipe["extend"] = {"run": path}
    recipe["output"] = os.fspath(output or f"{path}-extended")
    overrides = [
        f"extend.{override}" if override.partition("=")[0] in _SHORT else override
        for override in overrides
    ]
    return build_recipe(merged(recipe, values), overrides, where=path)
