"""Training in two processes ends as in one, whichever engine divides the work; only the first writes and prints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from badit.files import read_json, read_jsonl
from training.launches import (
    Launches,
    adapter,
    assert_equal_on_both_ranks,
    assert_same_run,
    assert_stops_and_resumes,
    losses,
)


def test_two_processes_end_as_one_does(launches: Launches) -> None:
    launches.train("one", 1, batch=4)
    for engine in ("ddp", "fsdp2", "fsdp2, full state"):
        talk = launches.train(engine, 2, engine)
        assert talk.count("mean over tasks") == 1
        assert talk.count("0/12 [00:00<?") == 1, "one bar"
        assert_equal_on_both_ranks(launches.record(engine))
        assert_same_run(launches.run(engine), launches.run("one"))
    assert_stops_and_resumes(launches, "ddp")
    assert_stops_and_resumes(launches, "fsdp2", written_under="FSDP")
    # The stopped run of two processes goes on in one, whose steps have half as many instances; and in three.
    shutil.copytree(launches.run("ddp-copied").path, launches.folder / "alone")
    launches.train("alone", 1)
    for engine in ("ddp", "fsdp2"):
        launches.train(f"{engine}-copied", 3, engine)
    for name in ("alone", "ddp-copied", "fsdp2-copied"):
        run = launches.run(name)
        assert [line["step"] for line in read_jsonl(run.metrics_path)] == list(range(1, 13))
        assert all(tensor.isfinite().all() for tensor in adapter(run).values())
    assert losses(launches.run("fsdp2-copied")) == pytest.approx(losses(launches.run("ddp-copied")), abs=1e-5)


def test_a_sequence_in_two_processes_leaves_one_whole_run(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    launches = Launches({**recipe_values, "data": {**recipe_values["data"], "order": "seeded-0"}}, tmp_path)
    launches.train("sequence", 2)
    run = launches.run("sequence")
    assert set(read_json(run.scores_path)["tasks"]) == {"cities", "rivers"}
    assert adapter(run)
    assert not list(run.path.rglob("*.partial"))
    assert read_json(run.environment_path)["training"]["steps"] == 2 * 12
