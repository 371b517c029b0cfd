"""A run's folder: what is in it, and writing there so that a crash leaves either the old or the new file.

config.yaml        the resolved recipe
environment.json   versions, hardware, commit
metrics.jsonl      one line each log step
scores.json        {"rouge_l", "rouge_l_instances", "exact_match", …, "tasks": {name: {…}}}
predictions/       one .jsonl a task
instances.json     of a comparison's runs: the score of every instance, {task: {metric: [...]}}
adapter/           the trained adapter, as PEFT saves it
checkpoints/       what an interrupted run resumes from
regroupings.jsonl  DOG's log
angles.jsonl       the experts' angles, of methods with experts that do not regroup
tensorboard/       event files, of runs that report to TensorBoard
analysis/          tables of `badit analyze`, one .json each
studio/            what `badit studio` has measured of a run that was not analysed
stages/NN-TASK/    of a sequence of tasks: the same files after each of them; adapter/ above is the last one's
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from badit.errors import BaditError
from badit.files import shown, write_text
from badit.recipe import Recipe, differing_keys, dump_recipe, load_config

_PACKAGES = ("badit", "torch", "transformers", "peft", "accelerate", "safetensors", "scipy", "numpy", "trl")


class RunFolder:
    """Paths of one run, and the ways to write there."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.scores = self.path / "scores.json"
        self.predictions = self.path / "predictions"
        self.instances = self.path / "instances.json"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.regroupings = self.path / "regroupings.jsonl"
        self.angles = self.path / "angles.jsonl"
        self.analysis = self.path / "analysis"
        self.studio = self.path / "studio"

    def stage(self, number: int, task: str) -> RunFolder:
        """The folder of one task of a sequence, counted from 1."""
        return RunFolder(self.path / "stages" / f"{number:02d}-{task}")

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A folder that holds a run.

        Raises:
            BaditError: it does not.
        """
        run = cls(path)
        if not run.config.is_file():
            raise BaditError(f"{run.path}: has no config.yaml, so it is no run's folder; make one: badit train RECIPE")
        return run

    @classmethod
    def prepare(cls, recipe: Recipe) -> RunFolder:
        """The recipe's folder, made or, where the same recipe has been at work, taken up again.

        Raises:
            BaditError: another recipe's run is there, or something that is no run, or it cannot be written.
        """
        run = cls(recipe.output)
        if run.config.is_file():
            aside = {"output", "compare"}
            if keys := differing_keys(
                load_config(run.config).model_dump(exclude=aside), recipe.model_dump(exclude=aside)
            ):
                raise BaditError(
                    f"{run.path}: holds a run of another recipe (it differs in {', '.join(keys[:5])}); "
                    "choose another output=FOLDER, or remove that one"
                )
            return run
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise BaditError(f"{run.path}: exists and is not a run's folder; choose another output=FOLDER")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(run.config, dump_recipe(recipe))
        except OSError as error:
            raise BaditError(f"{run.path}: cannot be written ({error.strerror or error})") from None
        return run

    def recipe(self, *, trust_remote_code: bool = False) -> Recipe:
        """The recipe that the run was made by.

        Args:
            trust_remote_code: whether the user, and not only the folder, which may come from elsewhere, lets Python
                code run that comes with the base model.

        Raises:
            BaditError: it is damaged, or asks for such code and the user does not.
        """
        recipe = load_config(self.config)
        if recipe.model.trust_remote_code and not trust_remote_code:
            raise BaditError(
                f"{shown(self.config)}: model.trust_remote_code: is true, so Python code that comes with the model "
                f"{recipe.model.name!r:.60} would run; allow it with --trust-remote-code if you trust both"
            )
        return recipe


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that accelerate or torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def environment() -> dict[str, Any]:
    """Versions, hardware and thread settings that a result should be read with."""
    import torch

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": packages,
    }


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes: the GPUs' where there are any, else resident."""
    import torch

    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in kilobytes, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _commit() -> str | None:
    """The commit of the checkout that badit is imported from; None for an installed package or without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
