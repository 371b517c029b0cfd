"""Training in two processes ends as in one, whichever engine divides the work; only the first writes and prints."""

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

from badit.runs import RunFolder, read_json, read_jsonl
from badit.training.checkpoints import last_checkpoint

SCRIPT = Path(__file__).with_name("ranks.py")
CONFIG = Path(__file__).parents[2] / "docs" / "fsdp2.yaml"


def fsdp2(state_dict: str) -> dict[str, str]:
    """What ``accelerate launch --config_file docs/fsdp2.yaml`` sets, on CPU processes."""
    section = yaml.safe_load(CONFIG.read_text())["fsdp_config"]
    settings = {
        key.upper(): str(value).lower() if isinstance(value, bool) else str(value) for key, value in section.items()
    }
    on_cpu = {"BADIT_SHARD_ON_CPU": "1", "ACCELERATE_USE_FSDP": "true"}
    return {**settings, **on_cpu, "FSDP_STATE_DICT_TYPE": state_dict}


ENGINES = {
    "ddp": {},
    "fsdp2": fsdp2("SHARDED_STATE_DICT"),
    "fsdp2, full state": fsdp2("FULL_STATE_DICT"),
}


@pytest.fixture
def train(recipe_values: dict[str, Any], tmp_path: Path) -> Any:
    """Trains in so many processes, with ``batch`` instances in each."""
    values = {**recipe_values, "evaluation": {"batch_size": 4, "max_new_tokens": 2}}
    values["method"] |= {"lora_dropout": 0.0}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))

    def run(name: str, processes: int, engine: str = "ddp", *, batch: int = 2, code: int = 0, stop_at: int = 0) -> str:
        record = tmp_path / f"{name}-record"
        record.mkdir(exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(SCRIPT.parent.parent),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONWARNINGS": "ignore",
            "BADIT_STOP_AT": str(stop_at),
            **(ENGINES[engine] if processes > 1 else {}),
        }
        command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(record), str(recipe)]
        settings = [f"output={tmp_path / name}", f"training.batch_size={batch}", "training.max_steps=12"]
        done = subprocess.run(
            [*command, *settings], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert (done.returncode != 0) == bool(code), done.stderr
        assert code == 0 or done.returncode == code or f"exitcode  : {code}" in done.stderr, done.stderr
        assert "Traceback" not in done.stdout
        return done.stdout + done.stderr

    return run


def adapter(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_two_processes_end_as_one_does(train: Any, tmp_path: Path) -> None:
    train("one", 1, batch=4)
    one = RunFolder(tmp_path / "one")
    for engine in ENGINES:
        talk = train(engine, 2, engine)
        assert talk.count("mean over tasks") == 1
        assert talk.count("0/12 [00:00<?") == 1, "one bar"
        assert_equal_on_both_ranks(tmp_path / f"{engine}-record")
        assert_same_run(RunFolder(tmp_path / engine), one)
    for engine in ("ddp", "fsdp2"):
        assert_resumes_exactly(train, tmp_path, engine)
    # The stopped run of two processes goes on in one, whose steps have half as many instances.
    train("copied", 1)
    run = RunFolder(tmp_path / "copied")
    assert [line["step"] for line in read_jsonl(run.metrics)] == list(range(1, 13))
    assert all(tensor.isfinite().all() for tensor in adapter(run).values())


def assert_resumes_exactly(train: Any, tmp_path: Path, engine: str) -> None:
    """A signal to one process stops both at the same step; resumed, they end as those that were not stopped."""
    name = f"{engine}-stopped"
    talk = train(name, 2, engine, code=130, stop_at=7)
    assert talk.count("badit: interrupted") == 1, talk
    stopped = RunFolder(tmp_path / name)
    assert last_checkpoint(stopped.checkpoints) == stopped.checkpoints / "checkpoint-7"
    if engine == "ddp":
        shutil.copytree(stopped.path, tmp_path / "copied")
    else:
        assert "was written under FSDP" in train(name, 1, code=2)
    train(name, 2, engine)
    whole = RunFolder(tmp_path / engine)
    for key, tensor in adapter(whole).items():
        assert torch.equal(adapter(stopped)[key], tensor), key
    for file in ("metrics.jsonl", "regroupings.jsonl", "scores.json"):
        assert (stopped.path / file).read_text() == (whole.path / file).read_text()


def assert_equal_on_both_ranks(record: Path) -> None:
    first, second = (load_file(record / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert sum("badit_A" in name for name in first) == 12 * 2, "twelve steps, two layers"
    assert sum("expert_of" in name for name in first) == 2
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_same_run(two: RunFolder, one: RunFolder) -> None:
    whole, sharded = adapter(one), adapter(two)
    assert whole.keys() == sharded.keys()
    for name in whole:
        torch.testing.assert_close(sharded[name], whole[name], rtol=0, atol=1e-5)
    logs = [list(read_jsonl(run.regroupings)) for run in (two, one)]
    assert [line["labels"] for line in logs[0]] == [line["labels"] for line in logs[1]]
    assert sum(line["components_moved"] for line in logs[0]) > 0
    for ours, theirs in zip(*logs, strict=True):
        for key in ("objective_after", "output_change", "intra_abs_cos", "previous_inter_degrees"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    losses = [[line["loss"] for line in read_jsonl(run.metrics)] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    took = [read_json(run.environment)["training"] | {"seconds": 0, "peak_memory_gib": 0} for run in (two, one)]
    assert took[0] == took[1]
    assert not list(two.path.rglob("*.partial"))
    assert not two.checkpoints.exists()
