"""Training in two processes ends as in one, whichever engine divides the work; only the first writes and prints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from badit.runs import read_jsonl
from badit.training.checkpoints import last_checkpoint
from training.launches import (
    Launches,
    adapter,
    assert_equal_on_both_ranks,
    assert_same_end,
    assert_same_run,
    losses,
)


@pytest.fixture
def launches(recipe_values: dict[str, Any], tmp_path: Path) -> Launches:
    return Launches(recipe_values, tmp_path)


def test_two_processes_end_as_one_does(launches: Launches) -> None:
    launches.train("one", 1, batch=4)
    for engine in ("ddp", "fsdp2", "fsdp2, full state"):
        talk = launches.train(engine, 2, engine)
        assert talk.count("mean over tasks") == 1
        assert talk.count("0/12 [00:00<?") == 1, "one bar"
        assert_equal_on_both_ranks(launches.record(engine))
        assert_same_run(launches.run(engine), launches.run("one"))
    for engine in ("ddp", "fsdp2"):
        assert_resumes_exactly(launches, engine)
    # The stopped runs go on in three processes, whose steps have more instances, and each as the other.
    for engine in ("ddp", "fsdp2"):
        launches.train(f"{engine}-copied", 3, engine)
    ddp, fsdp2 = (launches.run(f"{engine}-copied") for engine in ("ddp", "fsdp2"))
    assert [line["step"] for line in read_jsonl(fsdp2.metrics)] == list(range(1, 13))
    assert losses(fsdp2) == pytest.approx(losses(ddp), abs=1e-5)
    assert all(tensor.isfinite().all() for tensor in adapter(fsdp2).values())


def assert_resumes_exactly(launches: Launches, engine: str) -> None:
    """A signal to one process stops both at the same step; resumed, they end as those that were not stopped."""
    name = f"{engine}-stopped"
    talk = launches.train(name, 2, engine, code=130, stop_at=7)
    assert talk.count("badit: interrupted") == 1, talk
    stopped = launches.run(name)
    assert last_checkpoint(stopped.checkpoints) == stopped.checkpoints / "checkpoint-7"
    shutil.copytree(stopped.path, launches.folder / f"{engine}-copied")
    if engine != "ddp":
        assert "was written under FSDP" in launches.train(name, 1, code=2)
    launches.train(name, 2, engine)
    assert_same_end(stopped, launches.run(engine))
