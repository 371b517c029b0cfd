"""Cells as tasks of a cluster, with a stand-in for Ray (test_ray.py has a real cluster)."""

import signal
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from badit.support.errors import BaditError
from comparison.cells import LORA, FakeProcess, InlineCell, by_status, compare_module, compared


class Finished(InlineCell):
    """A cell that has run when it is asked for its end."""

    def __init__(self, folder, *, score, threads, device):
        super().__init__(folder, score=score, threads=threads, device=device)
        Finished.threads = threads

    def poll(self):
        self.returncode = self.wait()
        return self.returncode


class Task:
    """A remote function, which runs when its result is asked for."""

    def __init__(self, function):
        self.function = function

    def options(self, **options):
        Task.asked = options
        return self

    def remote(self, *arguments):
        return lambda: self.function(*arguments)


@pytest.fixture
def ray(monkeypatch):
    """A module ``ray`` with a cluster of two nodes."""
    module = ModuleType("ray")
    nodes = [{"Alive": alive, "Resources": {"CPU": 8.0, "GPU": 2.0}} for alive in (True, False)]
    cancelled = type("TaskCancelledError", (Exception,), {})
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    vars(module).update(
        init=lambda address, **options: setattr(module, "address", address),
        nodes=lambda: nodes,
        remote=Task,
        get=lambda task: task(),
        is_initialized=lambda: True,
        cancel=lambda task, force: setattr(module, "forced", force),
        exceptions=SimpleNamespace(TaskCancelledError=cancelled),
    )
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.delitem(sys.modules, "badit.comparison.cluster", raising=False)
    monkeypatch.setattr(import_module("badit.comparison.cluster"), "start_cell", Finished)
    yield module
    sys.modules.pop("badit.comparison.cluster", None)


def test_cells_get_their_resources_and_the_folder_of_the_comparison(
    values, ray, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    values["output"] = "relative"
    values["compare"] |= {"methods": LORA, "resources": {"cpu": 3, "gpu": 1, "place": 0.5}}
    results = compared(values, ray="auto")
    assert by_status(results, status="done") == ["lora/0"]
    assert ray.address == "auto"
    asked = {name: Task.asked[name] for name in ("num_cpus", "num_gpus", "resources")}
    assert asked == {"num_cpus": 3, "num_gpus": 1, "resources": {"place": 0.5}}
    assert Finished.threads == 3
    # A finished comparison starts no task again.
    Task.asked = None
    compared(values, ray="auto")
    assert Task.asked is None


def test_as_many_cells_run_as_fit_on_living_nodes(ray):
    cluster = import_module("badit.comparison.cluster")
    assert cluster.Cluster("auto", {"gpu": 1}, []).places() == 2
    assert cluster.Cluster("auto", {"cpu": 3}, []).places() == 2
    assert cluster.Cluster("auto", {"gpu": 4}, []).places() == 1, "it waits for such a node"


def test_errors_of_ray_are_errors_of_the_cell_and_cancelled_cells_are_none(values, ray, tmp_path):
    cluster = import_module("badit.comparison.cluster")

    def fails():
        raise RuntimeError("the nodes are gone")

    def is_cancelled():
        raise ray.exceptions.TaskCancelledError

    assert cluster.ClusterCell(tmp_path, fails).wait() == 1
    assert (tmp_path / "error.txt").read_text() == "Ray: RuntimeError: the nodes are gone\n"
    cell = cluster.ClusterCell(tmp_path, is_cancelled)
    for how, forced in ((signal.SIGTERM, False), (signal.SIGKILL, True)):
        cell.send_signal(how)
        assert ray.forced is forced
    assert cell.wait() == 130


def test_a_cancelled_task_stops_its_process(ray, monkeypatch, tmp_path):
    cluster = import_module("badit.comparison.cluster")
    calls = []

    class Interrupted(FakeProcess):
        def poll(self):
            raise KeyboardInterrupt

        def send_signal(self, how):
            calls.append(how)

        def wait(self):
            calls.append("waited")

    monkeypatch.setattr(cluster, "start_cell", lambda folder, **options: Interrupted())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cluster._run_on_node(str(tmp_path), True, 1, str(Path.cwd()), {})
    assert calls == [signal.SIGTERM, "waited"]


def test_a_missing_extra_and_a_missing_cluster_are_named(values, ray, monkeypatch):
    def refused(address, **options):
        raise ConnectionError("no cluster at this address")

    ray.init = refused
    with pytest.raises(
        BaditError, match=r"--ray: cannot be reached .*no cluster.*ray start --head"
    ):
        compare_module.compare(values, ray="auto")
    # Ray itself would end the process after some minutes.
    ray.init = lambda address, **options: None
    with pytest.raises(BaditError, match=r"--ray: cannot be reached .*refused"):
        compare_module.compare(values, ray="127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "badit.comparison.cluster")
    with pytest.raises(BaditError, match=r"pip install 'badit\[ray\]'"):
        compare_module.compare(values, ray="auto")
