"""Runs the cells of a comparison as tasks of a Ray cluster.

A task starts the same process as on one machine (:func:`badit.comparison.worker.start_cell`) on a
node, and waits for it. The folders of the runs are on a file system that all nodes share, so logs,
errors and checkpoints are where they are without Ray. If a node fails, Ray starts the task on
another node, where the run resumes from its last checkpoint.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from badit.comparison.worker import start_cell
from badit.runs.folder import ERROR
from badit.support.console import say
from badit.support.errors import BaditError, explained, first_line
from badit.support.files import exclusive, write_text

try:
    import ray  # pyright: ignore[reportMissingImports] (an extra)
except ModuleNotFoundError:
    raise BaditError("--ray: module ray is not installed; run pip install 'badit[ray]'") from None

_RETRIES = 3  # of a cell whose node failed
_SECONDS_TO_SAVE = 300.0  # a cell of a failed node may still be saving its checkpoint
_PASSED_ON = re.compile(r"BADIT_|HF_")  # environment variables that a cell gets from this process


class Cluster:
    """A running Ray cluster, and the resources of each cell."""

    def __init__(self, address: str, resources: Mapping[str, float], variables: Sequence[str]):
        stop = signal.getsignal(signal.SIGTERM)
        with explained("--ray", action="reached", fix="start it: ray start --head", any_error=True):
            _connect(address)
            ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level="error")
        # Ray replaces the handler, with which the comparison stops its cells.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)
        self._needs = _ray_names({"cpu": 1.0, **resources})
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if _PASSED_ON.match(name) or name in variables
        }

    def places(self) -> int:
        """Returns how many cells can run at a time on the present nodes, at least 1."""
        count = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                count += int(min(has.get(name, 0) // need for name, need in self._needs.items()))
        if count == 0:
            wanted = ", ".join(f"{name}: {need:g}" for name, need in self._needs.items())
            say(f"badit: no node of the cluster has {wanted} (compare.resources); waiting for one")
        return max(1, count)

    def start(self, folder: Path, *, score: bool) -> "ClusterCell":
        needs = dict(self._needs)
        options = {
            "num_cpus": needs.pop("CPU"),
            "num_gpus": needs.pop("GPU", 0),
            "resources": needs,
            "max_retries": _RETRIES,
            "name": f"badit {folder.name}",
        }
        threads = max(1, int(options["num_cpus"]))
        run = ray.remote(_run_on_node).options(**options)
        place = str(folder.resolve())
        return ClusterCell(
            folder, run.remote(place, score, threads, os.getcwd(), self._environment)
        )


def _connect(address: str) -> None:
    """Raises OSError if nothing listens at an address HOST:PORT; Ray would end this process."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray_names(resources: Mapping[str, float]) -> dict[str, float]:
    return {{"cpu": "CPU", "gpu": "GPU"}.get(name, name): need for name, need in resources.items()}


class ClusterCell(AbstractContextManager["ClusterCell"]):
    """A cell's task, with the methods of a process that a comparison uses."""

    def __init__(self, folder: Path, task: Any) -> None:
        self._folder = folder
        self._task = task

    def __exit__(self, *error: object) -> None:
        pass

    def wait(self) -> int:
        """Returns the exit code of the cell's process."""
        try:
            return ray.get(self._task)
        except ray.exceptions.TaskCancelledError:
            # Ray kills the processes of this job when it ends.
            _wait_for_former(self._folder)
            return 130
        # Too many nodes failed, or badit is not installed on a node.
        except Exception as error:
            message = f"Ray: {type(error).__name__}: {first_line(error)}"
            write_text(self._folder / ERROR, f"{message}\n")
            return 1

    def send_signal(self, how: signal.Signals) -> None:
        """Stops the cell; with SIGKILL also its worker, without a checkpoint."""
        if not ray.is_initialized():  # the connection is lost, and so are its tasks
            return
        ray.cancel(self._task, force=how == signal.SIGKILL)


def _run_on_node(
    folder: str, score: bool, threads: int, current: str, variables: dict[str, str]
) -> int:
    """Runs a cell in a process on this node, with the folder and variables of the comparison."""
    # Paths in recipes may be relative to the folder of the comparison's process.
    os.chdir(current)
    os.environ.update(variables)
    _wait_for_former(Path(folder))
    with start_cell(Path(folder), score=score, threads=threads, device=None) as process:
        try:
            # Ray interrupts a cancelled task between two calls, but not while one waits.
            while process.poll() is None:
                time.sleep(0.5)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    return process.returncode


def _wait_for_former(folder: Path) -> None:
    """Waits for a cell that was told to stop, or whose node failed: it saves a checkpoint."""
    deadline = time.monotonic() + _SECONDS_TO_SAVE
    while True:
        try:
            with exclusive(folder):
                return
        except BaditError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
