"""Broken recipes, through ``badit train --dry-run`` and ``badit compare --dry-run``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from badit.recipe import build_recipe
from fuzz.command import STRESS, cases, ends_well, written
from fuzz.damage import NASTY_VALUES, REPLACEMENTS, as_lines, as_yaml, damaged
from fuzz.test_tasks import LINES

METHODS: list[dict[str, Any]] = [
    {"name": "badit", "num_experts": 4, "r": 2, "lora_alpha": 8, "regroup": {"every": 3, "solver": "paper"}},
    {"name": "lora", "r": 8, "target_modules": ["q_proj"]},
    {"name": "loramoe", "num_experts": 2, "r": 2},
    {"name": "task-neurons", "share": 0.1},
    {"name": "base"},
]


def values(method: dict[str, Any]) -> dict[str, Any]:
    """Every field of a recipe, written out."""
    content = build_recipe({"method": method}).model_dump(mode="json")
    content["data"] |= {"source": "tasks.jsonl", "tasks": ["capital", "river"], "train_per_task": 2}
    content["compare"] = {
        "methods": {"lora": {"name": "lora", "r": 4}, "badit": {"name": "badit"}},
        "reference": "lora",
        "seeds": [0, 1],
        "learning_rates": [0.0005, 0.001],
        "single_task": ["lora"],
    }
    return content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tasks.jsonl").write_bytes(as_lines(LINES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_the_recipes_are_valid_before_they_are_broken(folder: Path, method: dict[str, Any]) -> None:
    (folder / "recipe.yaml").write_bytes(as_yaml(values(method)))
    assert ends_well("train", "recipe.yaml", "--dry-run")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
@cases(40)
@given(data=st.data())
def test_broken_recipes(folder: Path, method: dict[str, Any], data: st.DataObject) -> None:
    (folder / "recipe.yaml").write_bytes(data.draw(damaged(values(method), as_yaml)))
    before = written(folder)
    ends_well("train", "recipe.yaml", "--dry-run")
    assert written(folder) == before


@cases(30)
@given(data=st.data())
def test_broken_extended_recipes(folder: Path, data: st.DataObject) -> None:
    (folder / "base.yaml").write_bytes(data.draw(damaged(values(METHODS[0]), as_yaml)))
    (folder / "recipe.yaml").write_bytes(data.draw(damaged({"extends": "base.yaml", "training": {"seed": 1}}, as_yaml)))
    ends_well("train", "recipe.yaml", "--dry-run")


def fields() -> list[str]:
    content = values(METHODS[0])
    return [f"{section}.{key}" for section, keys in content.items() if isinstance(keys, dict) for key in keys]


@pytest.mark.parametrize("field", fields())
def test_every_field_with_every_nasty_value(folder: Path, field: str) -> None:
    (folder / "recipe.yaml").write_bytes(as_yaml(values(METHODS[0])))
    for value in NASTY_VALUES[:: 1 if STRESS > 1 else 5]:
        try:
            written_out = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        except UnicodeEncodeError:
            continue
        ends_well("train", "recipe.yaml", f"{field}={written_out}", "--dry-run")


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("file", ["base.yaml", "tasks.jsonl"])
def test_something_else_in_a_files_place(folder: Path, file: str, replace: Callable[[Path], None]) -> None:
    (folder / "base.yaml").write_bytes(as_yaml(values(METHODS[0])))
    (folder / "recipe.yaml").write_text("extends: base.yaml\n")
    replace(folder / file)
    ends_well("train", "recipe.yaml", "--dry-run")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGED,
        "model: &m {name: *m}\n",
        "model: &m [*m]\n",
        "a: *nowhere\n",
        "!!python/object/apply:os.system ['touch ran']\n",
        "output: !!python/object/apply:os.system ['touch ran']\n",
        "output: !!python/name:os.system\n",
        "output: !!python/module:os\n",
        "output: !custom x\n",
        "output: !!binary aGk=\n",
        "output: !!set {a, b}\n",
        "output: !!timestamp 2001-99-99\n",
        "output: 2001-12-14\n",
        "output: " + "9" * 5000 + "\n",
        "? [a, b]\n: c\n",
        "? {a: b}\n: c\n",
        "training: {seed: 1}\ntraining: {num_train_epochs: 2}\n",
        "training: {seed: 1, seed: 2}\n",
        "1: 2\n",
        "null: 1\n",
        "[" * 2000,
        "a:\n" + "".join(" " * i + "- \n" for i in range(400)),
        "--- a\n--- b\n",
        "training: {seed: 0b1" + "1" * 5000 + "}\n",
        "training: {seed: 1:2:3}\n",
        "training: {num_train_epochs: 1_0.5e+3}\n",
        "\ufefftraining: {seed: 1}\n",
        "training: {seed: 1}\r\noutput: x\r\n",
        'output: "\\ud800"\n',
        'output: "\\0"\n',
        "#" * 10_000_000,
        "output: " + "x" * 10_000_000,
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_does_more_than_hold_values(folder: Path, text: str) -> None:
    (folder / "recipe.yaml").write_text("data: {source: tasks.jsonl}\n" + text if text[0] not in "[#-!\ufeff" else text)
    ends_well("train", "recipe.yaml", "--dry-run")
    assert not (folder / "ran").exists()
