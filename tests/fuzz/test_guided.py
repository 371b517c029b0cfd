"""The readers under a fuzzer that is guided by the code it reaches. `make stress` installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from badit.recipe import build_recipe
from fuzz import command
from fuzz.damage import as_json, as_lines, as_yaml
from fuzz.test_recipes import METHODS, values
from fuzz.test_results import PROTOCOLS
from fuzz.test_tasks import LINES, OFFICIAL

if find_spec("atheris") is None:
    pytest.skip("atheris is not installed; `make stress` installs it and runs this", allow_module_level=True)

SEEDS = {
    "tasks": [as_lines(LINES)],
    "superni": [as_json(OFFICIAL)],
    "recipe": [as_yaml(values(method)) for method in METHODS] + [as_yaml(build_recipe({}).model_dump(mode="json"))],
    "results": [as_json(content) for content in PROTOCOLS.values()],
    "weights": [save({"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})],
}
_RUNS = 4000


@pytest.mark.parametrize("reader", SEEDS)
def test_guided_by_coverage(tmp_path: Path, reader: str) -> None:
    (tmp_path / "corpus").mkdir()
    for number, content in enumerate(SEEDS[reader]):
        (tmp_path / "corpus" / f"seed-{number}").write_bytes(content)
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.guided", reader, str(tmp_path), f"-runs={_RUNS}", "-seed=1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])},
        cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    assert f"Done {_RUNS} runs" in done.stderr, done.stderr[-2000:]
    command.tried += _RUNS
