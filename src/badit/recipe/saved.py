"""The recipe in a run's folder, config.yaml, with every field."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badit.recipe.loading import FORMAT, build_recipe, read_values, take_format
from badit.recipe.schema import Recipe
from badit.recipe.yaml_text import to_yaml
from badit.support.files import refuse_other_format


def dump_recipe(recipe: Recipe) -> str:
    """Returns a run's recipe as YAML with every field."""
    # A single run ignores the section compare.
    values = {"format": FORMAT, **recipe.model_dump(mode="json", exclude={"compare"})}
    return to_yaml(values, sort_keys=False)


def load_config(path: Path) -> Recipe:
    """Reads the recipe in a run's folder; BaditError if it is of a version that is not read."""
    content = read_values(path)
    if take_format(content, path) is None:
        refuse_other_format(content, path, FORMAT)
    return saved_recipe(content, where=path)


def saved_recipe(content: Mapping[str, Any], *, where: str | Path = "recipe") -> Recipe:
    """Builds a recipe that an earlier version may have saved with every field."""
    recipe = build_recipe(content, where=where)
    if recipe.data.order is not None and "extend" not in content:
        # Before this section existed, all tasks of a sequence trained the same experts.
        extend = recipe.extend.model_copy(update={"own_experts": False})
        return recipe.model_copy(update={"extend": extend})
    return recipe


def differing_keys(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Returns the dotted keys in which two nested mappings differ."""
    keys = []
    for key in first.keys() | second.keys():
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        # get returns None for a missing key, which differs from a key that is null.
        elif a != b or (key in first) != (key in second):
            keys.append(f"{prefix}{key}")
    return sorted(keys)
