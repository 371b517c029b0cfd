"""Training in several processes, launched as in docs/several-gpus.md or forked."""

import os
import shutil
import socket
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from badit.api import Run
from badit.cli import main
from badit.support.files import read_jsonl
from badit.training.checkpoints import last_checkpoint
from training.ranks import forked
from training.trainers import assert_same, learned

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "training" / "ranks.py"
FSDP2 = ["--config_file", str(TESTS.parent / "docs" / "fsdp2.yaml")]
SHARDED_ON_CPU = {"ACCELERATE_USE_CPU": "true", "BADIT_SHARD_ON_CPU": "1"}
# By default, stage 3 does not partition small parameters. This configuration partitions all of
# them.
ALL_DIVIDED = [
    "--use_deepspeed",
    "--deepspeed_config_file",
    str(SCRIPT.with_name("all_divided.json")),
]
PYTHONPATH = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
OF_PROCESSES = {"PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}

# The arguments of `accelerate launch` and additional environment variables. None: torchrun, which
# uses DDP.
ENGINES: dict[str, tuple[list[str] | None, dict[str, str]]] = {
    "ddp": (None, {}),
    "fsdp2": (FSDP2, SHARDED_ON_CPU),
    "fsdp2, sharded state": (
        [*FSDP2, "--fsdp_state_dict_type", "SHARDED_STATE_DICT"],
        SHARDED_ON_CPU,
    ),
    "fsdp2, one reader": ([*FSDP2, "--fsdp_cpu_ram_efficient_loading", "true"], SHARDED_ON_CPU),
    "deepspeed, stage 2": (["--use_deepspeed", "--zero_stage", "2"], {}),
    "deepspeed, stage 3": (["--use_deepspeed", "--zero_stage", "3"], {}),
    "deepspeed, all divided": (ALL_DIVIDED, {}),
}


def _accelerate(arguments: list[str], processes: int) -> list[str]:
    return [*arguments, "--num_processes", str(processes), "--main_process_port", "0", str(SCRIPT)]


class Launches:
    """Trains a recipe without dropout, which differs between ranks, each run in a folder."""

    command = "train"

    def __init__(self, recipe_values: dict[str, Any], folder: Path, forks: Any) -> None:
        self._forks = forks
        values = {**recipe_values, "evaluation": {"batch_size": 3, "max_new_tokens": 2}}
        values["method"] |= {"lora_dropout": 0.0}
        self.folder = folder
        self._recipe = folder / "recipe.yaml"
        self._recipe.write_text(yaml.safe_dump(values))

    def settings(self, name: str, batch: int) -> list[str]:
        sizes = [f"training.per_device_train_batch_size={batch}", "training.max_steps=12"]
        held_out = [
            "data.validation_per_task=2",
            "training.eval_strategy=steps",
            "training.eval_steps=6",
        ]
        return [str(self._recipe), f"output={self.folder / name}", *sizes, *held_out]

    def train_alone(self, name: str, *, batch: int = 2) -> int:
        """Trains in this process and returns the exit code."""
        return main([self.command, *self.settings(name, batch)])

    def train(
        self,
        name: str,
        processes: int,
        engine: str,
        *,
        code: int = 0,
        stop_at: int = 0,
        launcher: bool = False,
    ) -> str:
        """Trains in several processes and returns what they print.

        ``code``: the expected exit code. ``stop_at``: the step of BADIT_STOP_AT, see ranks.py.
        ``launcher``: use the launcher, as a user would, instead of forks, which take a third of the
        time. DeepSpeed always uses it.
        """
        start = self._launched if launcher or engine.startswith("deepspeed") else self._forked
        arguments, variables = ENGINES[engine]
        variables = {**variables, "BADIT_STOP_AT": str(stop_at), "BADIT_COMMAND": self.command}
        return start(name, processes, arguments, variables, code)

    def _launched(
        self, name: str, processes: int, arguments: list[str] | None, variables: dict, code: int
    ) -> str:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            str(SCRIPT),
        ]
        if arguments is not None:
            launcher = ["-m", "accelerate.commands.launch", *_accelerate(arguments, processes)]
        variables = {**os.environ, **OF_PROCESSES, **variables}
        words = [sys.executable, *launcher, *self.settings(name, 2)]
        done = subprocess.run(
            words, env=variables, capture_output=True, text=True, timeout=600, check=False
        )
        assert (done.returncode != 0) == bool(code), done.stderr
        assert code == 0 or done.returncode == code or f"exitcode  : {code}" in done.stderr, (
            done.stderr
        )
        assert "Traceback" not in done.stdout
        return done.stdout + done.stderr

    def _forked(
        self, name: str, processes: int, arguments: list[str] | None, variables: dict, code: int
    ) -> str:
        """Trains in forks, with the environment variables that the launcher would set."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(processes),
            **variables,
        }
        if arguments is not None:
            parsed = launch_command_parser().parse_args(_accelerate(arguments, processes))
            checked, *_ = _validate_launch_command(parsed)
            variables = {**prepare_multi_gpu_env(checked), **variables}
        printed = str(self.folder / f"{name}-{port}.txt")
        places = [
            {**variables, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(processes))
        ]
        ranks = [
            self._forks.Process(target=forked, args=(self.settings(name, 2), place, printed))
            for place in places
        ]
        for rank in ranks:
            rank.start()
        while alive := [rank.sentinel for rank in ranks if rank.is_alive()]:
            wait(alive)
            if any(
                rank.exitcode not in (None, code) for rank in ranks
            ):  # the other ranks would wait for it forever
                for rank in ranks:
                    rank.kill()
        said = Path(printed).read_text()
        assert [rank.exitcode for rank in ranks] == [code] * processes, said
        assert "Traceback" not in said
        return said

    def run(self, name: str) -> Run:
        return Run.at(self.folder / name)


def losses(run: Run) -> list[float]:
    """Returns the loss of every step, followed by the held-out losses after steps 6 and 12."""
    return [
        line[key]
        for key in ("loss", "eval_loss")
        for line in read_jsonl(run.metrics_path)
        if key in line
    ]


def assert_same_run(two: Run, one: Run) -> None:
    """Asserts that a run in two processes has the weights and losses of the run in one process."""
    torch.testing.assert_close(learned(two), learned(one), rtol=0, atol=1e-5)
    logs = [list(read_jsonl(run.regroupings_path)) for run in (two, one)]
    assert [line["labels"] for line in logs[0]] == [line["labels"] for line in logs[1]]
    assert sum(line["components_moved"] for line in logs[0]) > 0
    for ours, theirs in zip(*logs, strict=True):
        for key in ("objective_after", "intra_abs_cos", "previous_inter_degrees"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    times = {"seconds": 0, "peak_memory_gib": 0}
    assert two.environment["training"] | times == one.environment["training"] | times
    assert not list(two.path.rglob("*.partial"))
    assert not two.checkpoints_path.exists()


def assert_stops_and_resumes(launches: Launches, engine: str, *, whole: str = "") -> None:
    """Asserts that a signal to one process stops both, and that the resumed run is bit-identical.

    ``whole`` is the name of the uninterrupted run (default: ``engine``). The stopped run is copied
    to ENGINE-copied.
    """
    name = f"{engine}-stopped"
    printed = launches.train(name, 2, engine, code=130, stop_at=7)
    assert printed.count("badit: interrupted") == 1, printed
    stopped, finished = launches.run(name), launches.run(whole or engine)
    assert last_checkpoint(stopped.checkpoints_path) == stopped.checkpoints_path / "checkpoint-7"
    shutil.copytree(stopped.path, launches.folder / f"{engine}-copied")
    launches.train(name, 2, engine)
    assert_same(learned(stopped), learned(finished))
    for file in ("metrics.jsonl", "regroupings.jsonl", "scores.json"):
        assert (stopped.path / file).read_text() == (finished.path / file).read_text()
