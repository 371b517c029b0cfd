"""Data-parallel training: every rank ends with the same adapter, which is the one that a single process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from badit.run import Run

SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(folder: Path, processes: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(batch_size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(processes)]


def test_two_ranks_end_equal_and_as_one_process_does(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", processes=2, batch_size=2)
    (alone,) = run(tmp_path / "one", processes=1, batch_size=4)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-5)

    logs = [(tmp_path / which / "regroupings.jsonl").read_text().splitlines() for which in ("two", "one")]
    two, one = ([json.loads(line) for line in log] for log in logs)
    assert [line["labels"] for line in two] == [line["labels"] for line in one]
    assert sum(line["components_moved"] for line in two) > 0


@pytest.mark.parametrize(("order", "steps"), [(None, 6), ("seeded-0", 8)])
def test_two_processes_of_the_command_leave_one_whole_run(
    recipe_values: dict[str, Any], tmp_path: Path, order: str | None, steps: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {**recipe_values, "data": {**recipe_values["data"], "order": order}}
    recipe.write_text(yaml.safe_dump(values))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "badit", "train", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean over tasks") == 1
    run = Run.existing(tmp_path / "run")
    assert set(json.loads(run.scores_path.read_text())["tasks"]) == {"cities", "rivers"}
    assert load_file(run.adapter_path / "adapter_model.safetensors")
    assert not list(tmp_path.rglob("*.partial"))
    # Batches of four on each rank: two epochs of 24 instances, or of 12 in each of two stages.
    assert json.loads(run.environment_path.read_text())["training"]["steps"] == steps
