"""Broken adapters and weights, through ``badit generate``: a run is trained once, then each of its files is broken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.recipe import build_recipe
from badit.train import fit
from fuzz.command import cases, ends_well
from fuzz.damage import REPLACEMENTS, as_json, damaged_bytes, damaged_value

WEIGHTS = {"badit": "adapter_model.safetensors", "lora": "adapter_model.safetensors", "full": "weights.safetensors"}
METHODS: dict[str, dict[str, Any]] = {
    "badit": {"name": "badit", "num_experts": 2, "r": 2, "regroup": {"every": 1}},
    "lora": {"name": "lora", "r": 2},
    "full": {"name": "full"},
}
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of each method, after one step."""
    values = {
        "model": {"name": str(material / "model"), "dtype": "float32"},
        "data": {"source": str(material / "tasks.jsonl")},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    output = tmp_path_factory.mktemp("runs")
    recipes = {name: {**values, "method": method, "output": str(output / name)} for name, method in METHODS.items()}
    return {name: fit(build_recipe(recipe), progress=False).path for name, recipe in recipes.items()}


def copied(runs: Runs, name: str) -> Path:
    run = runs[name].with_name("broken")
    shutil.rmtree(run, ignore_errors=True)
    return Path(shutil.copytree(runs[name], run))


def generated(run: Path) -> bool:
    return ends_well("generate", str(run), "Name the capital.", "--max-new-tokens", "1")


@st.composite
def damaged_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file: its header's values, the header's length, or any bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    match draw(st.sampled_from(["header", "header", "length", "bytes", "tensors"])):
        case "header":
            text = as_json(draw(damaged_value(header)))
            return struct.pack("<Q", len(text)) + text + tensors
        case "length":
            return (
                struct.pack("<Q", draw(st.sampled_from([0, 1, length - 1, length + 1, 2**40, 2**64 - 1]))) + content[8:]
            )
        case "tensors":
            return content[: 8 + length] + draw(damaged_bytes(tensors))
        case _:
            return draw(damaged_bytes(content))


def test_broken_weights(runs: Runs) -> None:
    @cases(12)
    @given(data=st.data(), method=st.sampled_from(list(METHODS)))
    def try_one(data: st.DataObject, method: str) -> None:
        run = copied(runs, method)
        file = run / "adapter" / WEIGHTS[method]
        file.write_bytes(data.draw(damaged_tensors(file.read_bytes())))
        generated(run)

    assert all(generated(run) for run in runs.values()), "valid before they are broken"
    try_one()


def test_broken_configurations(runs: Runs) -> None:
    @cases(24)
    @given(data=st.data(), method=st.sampled_from(["badit", "lora"]))
    def try_one(data: st.DataObject, method: str) -> None:
        run = copied(runs, method)
        file = run / "adapter" / "adapter_config.json"
        settings = json.loads(file.read_text())
        file.write_bytes(data.draw(damaged_value(settings).map(as_json) | damaged_bytes(as_json(settings))))
        generated(run)

    try_one()


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize(("method", "file"), [*WEIGHTS.items(), ("badit", "adapter_config.json")])
def test_something_else_in_a_files_place(runs: Runs, method: str, file: str, replace: Callable[[Path], None]) -> None:
    run = copied(runs, method)
    replace(run / "adapter" / file)
    generated(run)
