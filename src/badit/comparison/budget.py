"""Equal budgets: how many parameters each method trains, counted before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from badit.comparison.grid import Grid
from badit.errors import BaditError
from badit.methods import build_method
from badit.models import load_skeleton

#: Ranks are whole numbers, so budgets can only be near each other.
TOLERANCE = 0.05


def trainable_parameters(grid: Grid, tasks: Sequence[str]) -> dict[str, int]:
    """The number of parameters that each method trains on the recipe's model, without the model's weights.

    Raises:
        BaditError: a method that does not go with the model.
    """
    section = grid.recipe.model
    counts = {}
    for name in grid.methods:
        method = build_method(grid.section.methods[name])  # a fresh one: applying it may settle some of its options
        skeleton = load_skeleton(section.name, revision=section.revision, trust_remote_code=section.trust_remote_code)
        try:
            with torch.device("meta"):
                counts[name] = method.trained_parameters(method.apply(skeleton, tasks))
        except BaditError as error:
            raise BaditError(f"compare.methods.{name}: {error}") from None
    return counts


def refuse_unequal(grid: Grid, counts: Mapping[str, int]) -> None:
    """Refuses a comparison in which a method trains more, or fewer, parameters than the budget.

    Raises:
        BaditError: one is more than 5 % off and not listed as unmatched.
    """
    section = grid.section
    if section.budget is None:
        return
    budget = counts[section.budget]
    for name, count in counts.items():
        free = name in section.unmatched or not grid.trains(name)
        if not free and abs(count - budget) > TOLERANCE * budget:
            raise BaditError(
                f"compare.methods.{name}: trains {count:,} parameters, {section.budget} {budget:,}: change its rank "
                f"until they agree to {TOLERANCE:.0%}, or list it in compare.unmatched"
            )
