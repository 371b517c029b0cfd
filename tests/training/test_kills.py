"""Runs that are killed, interrupted or run out of disk, and end as if they had not been: to the bit, in every file.

``make stress`` kills each kind of run at 20 random steps and 20 random operations on its files; ``make test`` at a few.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from badit.files import read_json

SCRIPT = Path(__file__).with_name("killed.py")
STEP_EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
KILLS = 20 if os.environ.get("BADIT_STRESS") else 2

BADIT = {"name": "badit", "num_experts": 4, "r": 2, "lora_dropout": 0.1, "regroup": {"every": 4}}
# Twelve steps; checkpoints, lines of the log, regroupings and epochs end at different ones.
TRAINING = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 5,
    "save_steps": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixed": {"method": BADIT, "training": TRAINING},
    "sequence": {
        "method": {**BADIT, "regroup": {"every": 2}, "router_input": "standardised"},
        "training": TRAINING,
        "data": {"order": ["rivers", "cities"]},
    },
    "without-regrouping": {
        "method": {"name": "loramoe", "num_experts": 3, "r": 2, "lora_dropout": 0.1},
        "training": {**TRAINING, "lr_scheduler_type": "linear"},
    },
}

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
    assert process.returncode == 0


@pytest.fixture(params=KINDS)
def train(request: Any, recipe_values: dict[str, Any], tmp_path: Path, server: Any) -> Train:
    """Trains one kind of run into a folder, to its end or to where it is struck."""
    kind = KINDS[request.param]
    data = {**recipe_values["data"], "test_per_task": 1, **kind.get("data", {})}
    values = {**recipe_values, **kind, "data": data, "evaluation": {"batch_size": 4, "max_new_tokens": 2}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))

    def run(name: str, event: str = "", number: int = 0, sent: int = 0) -> dict[str, Any]:
        record = tmp_path / f"{name}-record"
        record.mkdir(exist_ok=True)
        order = {"recipe": str(recipe), "output": str(tmp_path / name), "record": str(record)}
        server.stdin.write(json.dumps({**order, "event": event, "number": number, "signal": sent}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    return run


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; of environment.json what is no matter of this process's time and memory."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "environment.json":
            training = read_json(path)["training"]
            found[name] = {key: training[key] for key in ("steps", "tokens", "trainable_parameters")}
        elif path.is_file() and name not in ("config.yaml", "counts.json"):
            found[name] = path.read_bytes()
    return found


def assert_equal(tmp_path: Path, name: str) -> None:
    assert any(key.endswith("metrics.jsonl") and text for key, text in contents(tmp_path / "whole").items())
    for suffix in ("", "-record"):
        whole, resumed = contents(tmp_path / f"whole{suffix}"), contents(tmp_path / f"{name}{suffix}")
        assert whole.keys() == resumed.keys(), name
        assert [key for key in whole if whole[key] != resumed[key]] == [], name


def test_killed_runs_end_as_the_one_that_was_not(train: Train, tmp_path: Path) -> None:
    assert train("whole")["status"] == 0
    counts = read_json(tmp_path / "whole-record" / "counts.json")
    rng = random.Random(0)
    strikes = [(rng.choice(STEP_EVENTS), rng.randint(1, counts["on_step_end"])) for _ in range(KILLS)]
    strikes += [("file", rng.randint(1, counts["file"])) for _ in range(KILLS)]
    strikes += [("on_train_end", 1)]  # after the last checkpoint
    for i, (event, number) in enumerate(strikes):
        name = f"killed-{i}"
        done = train(name, event, number, signal.SIGKILL)
        assert done["status"] == -signal.SIGKILL, (event, number, done)
        done = train(name)
        assert done["status"] == 0, (event, number, done)
        assert_equal(tmp_path, name)


def test_a_run_may_be_stopped_again_and_again(train: Train, tmp_path: Path) -> None:
    assert train("whole")["status"] == 0
    for event, number, sent, status in [
        ("on_save", 1, signal.SIGKILL, -signal.SIGKILL),
        ("on_step_begin", 2, signal.SIGTERM, 130),
        ("on_optimizer_step", 2, 0, 2),
        ("on_pre_optimizer_step", 1, signal.SIGINT, 130),
        ("on_log", 1, signal.SIGKILL, -signal.SIGKILL),
    ]:
        done = train("stopped", event, number, sent)
        assert done["status"] == status, (event, done)
        assert "Traceback" not in done["errors"]
        if status == 2:
            assert done["errors"].splitlines()[-1].startswith(f"badit: {tmp_path / 'stopped'}: cannot be written")
            assert not list((tmp_path / "stopped").rglob("checkpoints/partial"))
    done = train("stopped")
    assert done["status"] == 0, done
    assert_equal(tmp_path, "stopped")
