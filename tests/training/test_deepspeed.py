"""DeepSpeed ZeRO in two processes on the CPU: training and resuming (`make stress`)."""

from importlib.util import find_spec

import pytest

from training.launches import ENGINES, Launches, assert_same_run, assert_stops_and_resumes
from training.test_checkpoints import put_code

if find_spec("deepspeed") is None:
    pytest.skip(
        "DeepSpeed is not installed; `make stress` installs it and runs this",
        allow_module_level=True,
    )

pytestmark = pytest.mark.slow


def test_two_processes_match_one_process_and_resume_bit_identically(
    recipe_values, tmp_path, processes, capsys
):
    recipe_values["training"] |= {
        "optimizer": "lora+"
    }  # AdamW with a group of parameters for each rate
    launches = Launches(recipe_values, tmp_path, processes)
    launches.train_alone("one", batch=4)
    for engine in (name for name in ENGINES if name.startswith("deepspeed")):
        launches.train(engine, 2, engine)
        assert_same_run(launches.run(engine), launches.run("one"))
        assert_stops_and_resumes(launches, engine)
        checkpoint = launches.run(f"{engine}-copied").checkpoints_path / "checkpoint-7"
        put_code(checkpoint, "*_optim_states.pt", marker := tmp_path / "marker", checkpoint)
        said = launches.train(f"{engine}-copied", 2, engine, code=2)
        assert "contains pickled objects that badit does not write" in said
        assert not marker.exists()
        assert launches.train_alone(f"{engine}-copied") == 2
        assert "was written with DeepSpeed" in capsys.readouterr().err
        assert "was written with DeepSpeed in 2 processes" in launches.train(
            f"{engine}-copied", 3, engine, code=2
        )
