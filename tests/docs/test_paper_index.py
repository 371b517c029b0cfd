"""Checks docs/paper-index.md against the code: it lists every default with its value."""

import dataclasses
import inspect
import re
from importlib import import_module

import pytest
from peft import LoraConfig, PeftConfig
from pydantic import BaseModel

from badit import BaditConfig, RegroupCallback
from badit.baselines import BASELINES
from badit.baselines.neurons import NeuronOptions
from badit.recipe.loading import load_recipe
from badit.recipe.schema import CompareSection, Recipe
from badit.tuner.config import FORMAT_FIELD, ExpertConfig, RegroupOptions
from docs.pages import ROOT, Page

# Rows: an option, its default and, for recipe keys, the value in the paper's recipes if it differs
# or if the table has a column for it.
ROWS = re.findall(
    r"^\| `([\w.]+)` \| `([^`]+)` \|(?: `([^`]+)`)?", Page("docs/paper-index.md").text, flags=re.M
)
DOCUMENTED = {option: value for option, value, _ in ROWS}
SECTIONS = [
    name for name, field in Recipe.model_fields.items() if isinstance(field.default, BaseModel)
]
CONFIGS = {cls.__name__: cls for cls in (BaditConfig, NeuronOptions, LoraConfig)} | {
    "RegroupCallback": RegroupOptions
}
CONFIGS |= {each.config_cls.__name__: each.config_cls for each in BASELINES.values()}


def fields(cls):
    return {field.name: field.default for field in dataclasses.fields(cls) if field.init}


def default_of(option):
    """Returns the default of a field, recipe key or parameter, or the value of a constant."""
    place, _, name = option.rpartition(".")
    module, _, owner = place.rpartition(".")
    if place == "RegroupCallback" and name not in fields(RegroupOptions):
        return inspect.signature(RegroupCallback).parameters[name].default
    if place == "compare":
        return CompareSection.model_fields[name].default
    if place in SECTIONS:
        return getattr(getattr(Recipe(), place), name)
    if owner in CONFIGS:
        return fields(CONFIGS[owner])[name]
    if name.isupper():
        return getattr(import_module(place), name)
    return inspect.signature(getattr(import_module(module), owner)).parameters[name].default


@pytest.mark.parametrize("option", DOCUMENTED)
def test_documented_defaults_match_the_code(option):
    assert DOCUMENTED[option] == repr(default_of(option))


def test_documented_paper_values_match_the_paper_recipe():
    recipe = load_recipe(ROOT / "recipes/paper/qwen3-4b.yaml")
    for option, default, value in ROWS:
        section, _, name = option.partition(".")
        if section in SECTIONS:
            assert (value or default) == repr(getattr(getattr(recipe, section), name)), option


def test_every_default_is_documented():
    peft = {*fields(PeftConfig), FORMAT_FIELD, "past_branches", "tasks", "extensions"}
    names = {
        "BaditConfig": fields(BaditConfig).keys() - peft,
        "NeuronOptions": fields(NeuronOptions),
    }
    names |= {section: type(getattr(Recipe(), section)).model_fields for section in SECTIONS}
    names["compare"] = CompareSection.model_fields.keys() - {"methods"}  # which has no default
    names["RegroupCallback"] = {
        *inspect.signature(RegroupCallback).parameters,
        *fields(RegroupOptions),
    } - {"options"}
    for config in (baseline.config_cls for baseline in BASELINES.values()):
        if issubclass(config, ExpertConfig):
            own = fields(config).items() - fields(ExpertConfig).items()
            names[config.__name__] = {name for name, _ in own} - peft
    assert {
        f"{place}.{name}" for place, own in names.items() for name in own
    } - DOCUMENTED.keys() == set()
