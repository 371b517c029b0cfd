"""DeepSpeed's ZeRO, in two processes on the CPU: what is trained and how it is resumed. `make stress` installs it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from training.launches import ENGINES, Launches, assert_same_end, assert_same_run

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed; `make stress` installs it and runs this", allow_module_level=True)


@pytest.fixture
def engines(tmp_path: Path) -> dict[str, Any]:
    """Both stages as they are, and stage 3 with every parameter divided, which keeps small ones whole otherwise."""
    everything = tmp_path / "zero3.json"
    of_the_trainer = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    settings = {
        **dict.fromkeys([*of_the_trainer, "gradient_clipping"], "auto"),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    everything.write_text(json.dumps(settings))
    known = {name: engine for name, engine in ENGINES.items() if name.startswith("deepspeed")}
    return known | {"deepspeed, all divided": (["--use_deepspeed", "--deepspeed_config_file", str(everything)], {})}


def test_two_processes_end_as_one_does_and_resume_exactly(
    recipe_values: dict[str, Any], tmp_path: Path, engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(recipe_values, tmp_path)
    launches.train("one", 1, batch=4)
    for engine, launch in engines.items():
        monkeypatch.setitem(ENGINES, engine, launch)
        launches.train(engine, 2, engine)
        assert_same_run(launches.run(engine), launches.run("one"))
        talk = launches.train(f"{engine}-stopped", 2, engine, code=130, stop_at=7)
        assert talk.count("badit: interrupted") == 1, talk
        assert "was written under DeepSpeed" in launches.train(f"{engine}-stopped", 1, code=2)
        launches.train(f"{engine}-stopped", 2, engine)
        assert_same_end(launches.run(f"{engine}-stopped"), launches.run(engine))
