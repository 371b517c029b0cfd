"""``badit keys``: every key of a recipe, as a list and as a JSON schema for editors."""

import json
import math
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from badit.recipe.arguments import argument_names, fixed_reason
from badit.recipe.loading import nearest_key
from badit.recipe.options import read_method_table
from badit.recipe.schema import Recipe, section_of
from badit.recipe.yaml_text import to_yaml
from badit.support.errors import BaditError

_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
_TYPES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}

Key = tuple[str, str, str]  # the dotted name, the default as YAML, and the description


def recipe_keys() -> Iterator[Key]:
    """Yields every key, once for an option that several methods have."""
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        if name == "method":
            names = read_method_table()["names"]
            yield "method.name", "badit", f"one of {', '.join(names)}"
            yield from _method_keys()
        elif section is None:
            yield name, as_yaml(field.default), field.description or ""
        else:
            for key, default, text in described_section(section):
                yield f"{name}.{key}", as_yaml(default), text
        if name == "training":
            others = "any other field of TrainingArguments, such as optim or adam_beta2"
            yield "training.NAME", "", others


def matching_keys(text: str) -> list[Key]:
    """Returns the keys that start with a text, else those that contain it; BaditError if none."""
    keys = list(recipe_keys())
    starting = [key for key in keys if key[0].startswith(text)]
    if starting:
        return starting
    lowered = text.lower()
    containing = [key for key in keys if lowered in f"{key[0]} {key[2]}".lower()]
    if not containing:
        fix = "list them all with: badit keys"
        raise BaditError(f"{text!r:.60}: no recipe key has this{nearest_key(text)}; {fix}")
    return containing


def _method_keys() -> Iterator[Key]:
    for option in read_method_table()["options"]:
        text = f"[{', '.join(option['methods'])}] {option['text']}"
        yield f"method.{option['key']}", option["default"], text


def schema() -> dict[str, Any]:
    """Returns a JSON schema of recipes, for editors."""
    recipe = Recipe.model_json_schema()
    definitions = recipe["$defs"]
    method_options = _method_properties()
    of_transformers = {name: {} for name in sorted(argument_names()) if not fixed_reason(name)}
    # The pydantic models accept any key here; an editor needs the names.
    for section, properties in (
        (recipe["properties"]["method"], method_options),
        (definitions["ComparedMethod"], method_options),
        (definitions["TrainingSection"], of_transformers),
    ):
        section["properties"] = {**properties, **section.get("properties", {})}
        section["additionalProperties"] = False
    # Keys that are removed before the recipe is validated.
    recipe["properties"] |= {
        "extends": {"type": "string", "description": "the recipe that this recipe extends"},
        "format": {"type": "integer", "description": "the version of a run's config.yaml"},
    }
    # One tracker may be given without a list.
    definitions["TrainingSection"]["properties"]["report_to"]["type"] = ["array", "string"]
    return recipe


def _method_properties() -> dict[str, Any]:
    """Returns the JSON schema of the options of all methods, by name."""
    regroup: dict[str, Any] = {}
    properties: dict[str, Any] = {
        "name": {"enum": read_method_table()["names"]},
        "regroup": {"type": ["object", "null"], "properties": regroup},
    }
    for key, _, text in _method_keys():
        _, *names = key.split(".")
        section = regroup if len(names) > 1 else properties
        section.setdefault(names[-1], {})["description"] = text
    return properties


def described_section(section: type[BaseModel]) -> Iterator[tuple[str, Any, str]]:
    """Yields the name, default and description of each field of a section."""
    for name, field in section.model_json_schema()["properties"].items():
        limits = [f"{word} {field[key]}" for key, word in _LIMITS.items() if key in field]
        values = ", ".join(filter(None, [_type_text(field), *limits]))
        text = "; ".join(filter(None, [values, field.get("description")]))
        yield name, field.get("default", "required"), text


def _type_text(field: dict[str, Any]) -> str:
    """Describes the type of a field, given by its JSON schema; empty for a section."""
    if "anyOf" in field:
        return " or ".join(map(_type_text, field["anyOf"]))
    if "enum" in field:
        return f"one of {', '.join(field['enum'])}"
    return _TYPES.get(field.get("type", ""), "")


def as_yaml(value: Any) -> str:
    """Formats a plain value as YAML on one line."""
    # YAML would need several lines; a JSON string is YAML too.
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    # PyYAML ends a plain scalar with a line "...".
    return to_yaml(value, default_flow_style=True, width=math.inf).split("\n")[0]
