"""Data-parallel training: every rank ends with the same adapter, which is the one that a single process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

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
