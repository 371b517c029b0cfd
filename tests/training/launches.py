"""Trainings in several processes, started as docs/several-gpus.md says, and what must be the same however they ran."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from badit.checkpoint import last_checkpoint
from badit.files import read_json, read_jsonl
from badit.run import Run

SCRIPT = Path(__file__).with_name("ranks.py")
FSDP2 = ["--config_file", str(Path(__file__).parents[2] / "docs" / "fsdp2.yaml")]
DEEPSPEED = ["--use_deepspeed"]
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
SHARDED_ON_CPU = {**ON_CPU, "BADIT_SHARD_ON_CPU": "1"}

# What comes after `accelerate launch`, and what else is in the environment. None: torchrun alone, which is DDP.
ENGINES: dict[str, tuple[list[str] | None, dict[str, str]]] = {
    "ddp": (None, ON_CPU),
    "fsdp2": (FSDP2, SHARDED_ON_CPU),
    "fsdp2, full state": ([*FSDP2, "--fsdp_state_dict_type", "FULL_STATE_DICT"], SHARDED_ON_CPU),
    "deepspeed, stage 2": ([*DEEPSPEED, "--zero_stage", "2"], {}),
    "deepspeed, stage 3": ([*DEEPSPEED, "--zero_stage", "3"], {}),
    # Stage 3 keeps small parameters whole unless it is told to divide every one.
    "deepspeed, all divided": (
        [*DEEPSPEED, "--deepspeed_config_file", str(Path(__file__).with_name("all_divided.json"))],
        {},
    ),
}


class Launches:
    """Trains a recipe in so many processes, with ``batch`` instances in each, into a folder of its own.

    Args:
        recipe_values: a recipe; what depends on chance within a process is switched off.
        folder: for the runs, NAME, and what their processes saw, NAME-record.
    """

    def __init__(self, recipe_values: dict[str, Any], folder: Path) -> None:
        values = {**recipe_values, "evaluation": {"batch_size": 4, "max_new_tokens": 2}}
        values["method"] |= {"lora_dropout": 0.0}
        self.folder = folder
        self._recipe = folder / "recipe.yaml"
        self._recipe.write_text(yaml.safe_dump(values))

    def train(
        self, name: str, processes: int, engine: str = "ddp", *, batch: int = 2, code: int = 0, stop_at: int = 0
    ) -> str:
        """Returns what was printed. ``code``: the exit code that is expected. ``stop_at``: see ranks.py."""
        self.record(name).mkdir(exist_ok=True)
        arguments, variables = ENGINES[engine]
        if processes == 1:
            launcher, variables = [], ON_CPU
        elif arguments is None:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        else:
            counts = ["--num_processes", str(processes), "--main_process_port", "0"]
            launcher = ["-m", "accelerate.commands.launch", *arguments, *counts]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "BADIT_STOP_AT": str(stop_at),
            **variables,
        }
        command = [sys.executable, *launcher, str(SCRIPT), str(self.record(name)), str(self._recipe)]
        settings = [
            f"output={self.folder / name}",
            f"training.per_device_train_batch_size={batch}",
            "training.max_steps=12",
        ]
        done = subprocess.run(
            [*command, *settings], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert (done.returncode != 0) == bool(code), done.stderr
        assert code == 0 or done.returncode == code or f"exitcode  : {code}" in done.stderr, done.stderr
        assert "Traceback" not in done.stdout
        return done.stdout + done.stderr

    def run(self, name: str) -> Run:
        return Run(self.folder / name)

    def record(self, name: str) -> Path:
        return self.folder / f"{name}-record"


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter_path / "adapter_model.safetensors")


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_jsonl(run.metrics_path)]


def assert_equal_on_both_ranks(record: Path) -> None:
    first, second = (load_file(record / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert sum("badit_A" in name for name in first) == 12 * 2, "twelve steps, two layers"
    assert sum("expert_of" in name for name in first) == 2
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_same_run(two: Run, one: Run) -> None:
    """A run in two processes has trained and written what the run in one did."""
    whole, sharded = adapter(one), adapter(two)
    assert whole.keys() == sharded.keys()
    for name in whole:
        torch.testing.assert_close(sharded[name], whole[name], rtol=0, atol=1e-5)
    logs = [list(read_jsonl(run.regroupings_path)) for run in (two, one)]
    assert [line["labels"] for line in logs[0]] == [line["labels"] for line in logs[1]]
    assert sum(line["components_moved"] for line in logs[0]) > 0
    for ours, theirs in zip(*logs, strict=True):
        for key in ("objective_after", "output_change", "intra_abs_cos", "previous_inter_degrees"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    took = [read_json(run.environment_path)["training"] | {"seconds": 0, "peak_memory_gib": 0} for run in (two, one)]
    assert took[0] == took[1]
    assert not list(two.path.rglob("*.partial"))
    assert not two.checkpoints_path.exists()


def assert_stops_and_resumes(launches: Launches, engine: str, *, written_under: str | None = None) -> None:
    """A signal to one process stops both at the same step; resumed, they end as those that were not, to the bit.

    Args:
        launches: has trained ENGINE. The run that was stopped stays, as it was then, as ENGINE-copied.
        written_under: what one process alone says of the stopped run, where it cannot go on with it.
    """
    name = f"{engine}-stopped"
    talk = launches.train(name, 2, engine, code=130, stop_at=7)
    assert talk.count("badit: interrupted") == 1, talk
    stopped, whole = launches.run(name), launches.run(engine)
    assert last_checkpoint(stopped.checkpoints_path) == stopped.checkpoints_path / "checkpoint-7"
    shutil.copytree(stopped.path, launches.folder / f"{engine}-copied")
    if written_under is not None:
        assert f"was written under {written_under}" in launches.train(name, 1, code=2)
    launches.train(name, 2, engine)
    for key, tensor in adapter(whole).items():
        assert torch.equal(adapter(stopped)[key], tensor), key
    for file in ("metrics.jsonl", "regroupings.jsonl", "scores.json"):
        assert (stopped.path / file).read_text() == (whole.path / file).read_text()
