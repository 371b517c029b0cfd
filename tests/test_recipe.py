"""Recipes: what they accept, what they refuse and how they say so."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badit.errors import BaditError
from badit.recipe import Recipe, build_recipe, differing_keys, dump_recipe, expand_source, load_recipe
from badit.training.methods import build_method

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(path)
    build_method(recipe.method)
    assert f"badit train recipes/{path.name}" in path.read_text()


def test_there_are_recipes() -> None:
    assert RECIPES


def test_a_recipe_survives_being_written(tmp_path: Path) -> None:
    recipe = build_recipe({"training": {"learning_rate": 3e-4}, "method": {"name": "lora", "r": 8}})
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_overrides_reach_nested_keys_with_yaml_values() -> None:
    recipe = build_recipe(
        {"training": {"epochs": 1}},
        [
            "training.epochs=2.5",
            "training.learning_rate=5e-4",
            "data.tasks=[a, b]",
            "method.r=2",
            "method.regroup=null",
        ],
    )
    assert recipe.training.epochs == 2.5
    assert recipe.training.learning_rate == 5e-4
    assert recipe.data.tasks == ["a", "b"]
    assert recipe.method == {"r": 2, "regroup": None}


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"trainig": {}}, [], r"trainig: unknown key \(did you mean 'training'\?\)"),
        ({"training": {"epoch": 1}}, [], r"training\.epoch: unknown key \(did you mean 'epochs'\?\)"),
        ({"training": {"epochs": "many"}}, [], r"training\.epochs: input should be a valid number.*'many'"),
        ({"training": {"epochs": 0}}, [], r"training\.epochs: input should be greater than 0"),
        ({"training": 3}, [], r"training: "),
        ({"prompt": {"encoding": "pos"}}, [], r"prompt\.encoding: "),
        ({}, ["training.epochs"], r"has the form key=value"),
        ({}, ["=3"], r"has the form key=value"),
        ({}, ["training.epochs.more=3"], r"training\.epochs: "),
        ({"output": "x"}, ["output.name=3"], r"output is a single value"),
        ({}, ["data.tasks=[a"], r"is not valid YAML"),
    ],
)
def test_mistakes_are_named_on_one_line(content: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(BaditError, match=message) as caught:
        build_recipe(content, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"training: [", "line 1.* is not valid YAML"),
        (b"- a\n- b\n", "must hold 'key: value' lines, not a list"),
        (b"\xff\xfe", "is not valid UTF-8"),
        (b"!!python/object/apply:os.system ['true']", "is not valid YAML"),
        (b"a: " + b"[" * 5000, "is not valid YAML"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    with pytest.raises(BaditError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaditError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.touch()
    assert load_recipe(path) == Recipe()


@settings(deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "data", "training", "epochs", "name", "method", "output", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_content_is_a_recipe_or_a_named_mistake(content: Any) -> None:
    if not isinstance(content, dict):
        content = {"training": content}
    with contextlib.suppress(BaditError):
        build_method(build_recipe(content).method)


def test_variables_in_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS", "/somewhere")
    monkeypatch.delenv("NO_TASKS", raising=False)
    assert expand_source("$TASKS/superni") == "/somewhere/superni"
    with pytest.raises(BaditError, match=r"NO_TASKS is not set; set it, or give data\.source=PATH"):
        expand_source("${NO_TASKS}/superni")


def test_differing_keys_are_dotted() -> None:
    assert differing_keys({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 3}) == ["a.c", "d", "e"]
    assert differing_keys({"a": {"b": None}}, {"a": {}}) == ["a.b"]
