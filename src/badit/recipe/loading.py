"""Reads recipes: a file or plain values, the recipes that they extend, and overrides."""

import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from badit.data.source import SUFFIXES
from badit.presets import saved_section
from badit.recipe.arguments import TrainingSection, argument_names, fixed_reason
from badit.recipe.options import read_method_table
from badit.recipe.schema import ComparedMethod, Recipe, RecipeLike, section_of
from badit.recipe.yaml_text import parse_yaml
from badit.support.errors import BaditError, nearest, problems
from badit.support.files import inside, read_text, refuse_other_format

# The version of a run's config.yaml. In version 4, the method has only the options of the recipe;
# in version 5, BADIT has no options ``gated`` to ``codes``.
FORMAT = 6
READABLE_FORMATS = (4, 5, FORMAT)


def make_recipe(recipe: RecipeLike | None, values: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from a file, plain values or a Recipe (None: the defaults).

    ``values`` override its own.
    """
    if isinstance(recipe, str | os.PathLike):
        path = _file_or_shipped(Path(recipe))
        return build_recipe(merged(_values_with_base(path), values), where=path)
    if isinstance(recipe, Recipe):
        # Without defaults: some checks ask whether the recipe sets a value, as the learning rate.
        recipe = recipe.model_dump(exclude_unset=True)
    return build_recipe(merged(recipe or {}, values))


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies ``key=value`` overrides.

    If there is no such file, reads the recipe of this name that comes with badit, such as
    superni-cpu. A top-level ``extends`` names another recipe in the file's folder or below it, or
    one that comes with badit. The file's values override those of that recipe, key by key within
    sections. A section with another ``name`` (of a method or a model) replaces the whole section,
    because the options of one method do not apply to another.

    Raises:
        BaditError: if a file cannot be read or extended, a key is unknown, or a value is invalid.
    """
    path = _file_or_shipped(Path(path))
    return build_recipe(_values_with_base(path), overrides, where=path)


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with badit, by name."""
    package = Path(__file__).parents[1]
    checkout = package.parents[1]
    # In an installed package, and in a checkout.
    for folder in (package / "recipes", checkout / "recipes"):
        if folder.is_dir():
            files = sorted(folder.glob("**/*.yaml"))
            return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {}


def _file_or_shipped(path: Path, name: str | None = None) -> Path:
    """Returns the path or, if there is no such file, the recipe of this name with badit."""
    # With this suffix, a missing file is reported as such when it is read.
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    name = name or str(path)
    shipped = shipped_recipes()
    if name not in shipped:
        hint = nearest(name, shipped)
        raise BaditError(f"{name}: no such file, and no recipe of this name comes with badit{hint}")
    return shipped[name]


def read_values(path: Path) -> dict[str, Any]:
    """Returns a recipe file's values without validation."""
    fix = "for a data file, write a recipe with badit init"
    # A .json file is valid YAML, and is read.
    if path.suffix in SUFFIXES[1:]:
        raise BaditError(f"{path}: is not a recipe (.yaml); {fix}")
    content = parse_yaml(read_text(path), where=path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise BaditError(f"{path}: must contain 'key: value' lines, not a {kind}; {fix}")
    return content


def _values_with_base(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns a file's values merged over the recipe that it extends.

    ``extending`` are the files that extend this one.
    """
    real_path = Path(os.path.realpath(path))  # Path.resolve raises for a symlink loop
    if real_path in extending:
        problem = f"extends: {path.name} already extends this file; remove one of the two"
        raise BaditError(f"{extending[-1]}: {problem}")
    content = read_values(path)
    # The config.yaml of a run is a recipe too.
    take_format(content, path)
    if "extends" not in content:
        return content

    base_path = _base_path(path, content.pop("extends"))
    base = _values_with_base(base_path, (*extending, real_path))
    build_recipe(base, where=base_path)  # its errors name its own file
    return merged(base, content)


def take_format(content: dict[str, Any], path: Path) -> int | None:
    """Removes the version of a run's config.yaml from its values, and returns it.

    Options that the version left out are added. BaditError for a version that is not read.
    """
    if not isinstance(content.get("format"), int):
        return None
    version = content.pop("format")
    if version not in READABLE_FORMATS:
        refuse_other_format({"format": version}, path, FORMAT)
    section = content.get("method", {})
    if version != FORMAT and isinstance(section, Mapping):
        content["method"] = saved_section(section)
    return version


def _base_path(path: Path, name: Any) -> Path:
    """Returns the file that the recipe at ``path`` extends."""
    try:
        base_path = inside(path.parent, path.parent / name)
        base_path.exists()
    except (BaditError, OSError, TypeError):  # outside, too long a name, not a string
        fix = "must be a file in the recipe's folder, such as base.yaml"
        raise BaditError(f"{path}: extends: {fix}, not {name!r:.60}") from None
    return _file_or_shipped(base_path, name)


def merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's values with ``values`` overriding them, as in :func:`load_recipe`."""
    result = dict(base)
    for key, value in values.items():
        if not isinstance(value, Mapping):
            result[key] = value
            continue
        base_value: Any = base.get(key)
        if not isinstance(base_value, Mapping) or not _same_name(base_value, value):
            base_value = {}  # the result is a copy of the value
        result[key] = merged(base_value, value)
    return result


def _same_name(base: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return "name" not in values or values["name"] == base.get("name")


def build_recipe(
    content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str | Path = "recipe"
) -> Recipe:
    """Builds a recipe from plain values and ``key=value`` overrides.

    Every line of an error message starts with ``where``.
    """
    # merged copies all sections, which the overrides change.
    values = merged({}, content)
    # The method's name first, because another name clears the method's options.
    for override in sorted(overrides, key=lambda text: not text.startswith(_METHOD_NAMES)):
        _override(values, override)

    # All problems are collected, so that every mistake is reported at once.
    lines = list(_unknown_keys(values))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines += [f"{place}: {text}" for place, text in problems(error, values, _hint)]
    else:
        if not lines:
            # Only now, because it may import transformers, which takes seconds.
            lines = list(recipe.training.value_problems())
        if not lines:
            return recipe
    raise BaditError(*(f"{where}: {line}" for line in lines))


_METHOD_NAMES = ("method=", "method.name=")


def _override(values: dict[str, Any], override: str) -> None:
    """Sets the value of a ``key=value`` override in a recipe's values."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        form = "an override has the form key=value, such as data.train_per_task=20"
        raise BaditError(f"{override!r:.80}: {form}")
    *parents, last = key.split(".")
    section: Any = values
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise BaditError(f"{override!r:.80}: {parent} is a single value and has no keys")
    if key == "method.name" and section.get("name", "badit") != text:
        section.clear()  # the options of one method do not apply to another
    section[last] = _override_value(text.strip(), override)


def _override_value(text: str, override: str) -> Any:
    """Returns YAML in quotes, brackets or braces, a number, true, false, null, or other text."""
    if text.startswith(("[", "{", "'", '"')):
        return parse_yaml(text, where=override)
    try:
        value = parse_yaml(text, where=override)
    except BaditError:  # such as *.csv, which YAML reads as an alias
        return text
    if value is None or isinstance(value, int | float):
        return value
    return text  # also what YAML would read as a date, or as a key and a value


def _unknown_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields problems with the keys of the training and method sections.

    They are checked without importing transformers and the methods, which takes seconds.
    """
    training = values.get("training")
    if isinstance(training, Mapping):
        yield from TrainingSection.key_problems(training)
    yield from _unknown_method_keys("method", values.get("method"))
    compare = values.get("compare")
    if isinstance(compare, Mapping) and isinstance(compare.get("methods"), Mapping):
        for name, section in compare["methods"].items():
            yield from _unknown_method_keys(f"compare.methods.{name}", section)


def _unknown_method_keys(place: str, section: Any) -> Iterator[str]:
    if not isinstance(section, Mapping):
        return
    names = read_method_table()["names"]
    options = {*_option_names(), *ComparedMethod.model_fields}
    for key, value in section.items():
        if key not in options:
            yield f"{place}.{key!s:.120}: unknown key{nearest(key, options)}"
        elif key == "name" and str(value) not in names:
            yield f"{place}.name: unknown method {value!r:.60}{nearest(value, names)}"
        elif key == "regroup":
            yield from _unknown_method_keys(f"{place}.regroup", value)


def _option_names() -> set[str]:
    table = read_method_table()
    keys = [option["key"] for option in table["options"]] + table["of_other_releases"]
    # Nested options, such as regroup.every, are checked by their last part.
    return {key.rpartition(".")[2] for key in keys}


def _hint(location: Sequence[int | str], key: str) -> str:
    """Returns a hint for an unknown key of the section at a location in the recipe."""
    if not location:
        return nearest_key(key)
    return nearest(key, _known_keys(location))


def nearest_key(text: str) -> str:
    """Returns a hint for a dotted key that is misspelt, or that lacks its section."""
    keys = _all_keys()
    by_last_part: dict[str, list[str]] = {}
    for key in keys:
        by_last_part.setdefault(key.rpartition(".")[2], []).append(key)
    if text not in by_last_part:
        hint = nearest(text, [*Recipe.model_fields, *keys])
        similar = get_close_matches(text, by_last_part, n=1)
        if not similar or (hint and "." not in text and "." not in hint):
            return hint
        text = similar[0]
    return f" (did you mean {' or '.join(map(repr, by_last_part[text]))}?)"


def _all_keys() -> list[str]:
    """Returns every dotted key of a recipe."""
    keys = []
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            keys += [f"{name}.{key}" for key in section.model_fields]
    others = sorted(argument_names() - TrainingSection.model_fields.keys())
    keys += [f"training.{name}" for name in others if not fixed_reason(name)]
    options = dict.fromkeys(option["key"] for option in read_method_table()["options"])
    return [*keys, "method.name", *(f"method.{key}" for key in options)]


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Returns the keys of the section at a location in the recipe."""
    section: Any = Recipe
    for step in location:
        field = section.model_fields.get(str(step))
        if field is not None:  # else an index, or the alternative of a union
            section = section_of(field.annotation)
    return list(section.model_fields)
