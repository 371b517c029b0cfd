"""Cells of a comparison on a Ray cluster of two nodes on this machine (badit[ray])."""

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from badit import load_results
from badit.comparison.compare import compare
from badit.runs.folder import RunFolder
from badit.support.errors import BaditError
from comparison.cells import LORA, compared

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
_NODE = {"object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster():
    """A cluster whose head runs no cells."""
    nodes = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **_NODE}
    )
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def wait_for(condition, seconds=1500):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_cell_of_a_killed_node_resumes_on_another(values, cluster, inline, tmp_path):
    values["compare"] |= {"methods": LORA, "resources": {"cpu": 1, "place": 1}}
    values["training"] |= {"max_steps": 60, "save_steps": 5, "logging_steps": 1}
    node = cluster.add_node(num_cpus=1, resources={"place": 1}, **_NODE)
    folder = Path(values["output"]) / "lora" / "lr-0.01" / "seed-0"
    run = partial(compare, values, ray=cluster.address, progress=False)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for(lambda: list(folder.glob("checkpoints/checkpoint-*")))
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1, resources={"place": 1}, **_NODE)
    thread.join(timeout=1500)
    assert not thread.is_alive()
    (status,) = load_results(values["output"]).cells["status"]
    assert status == "done"
    assert RunFolder(folder).metrics["step"].tolist()[:60] == [*range(1, 61)]
    assert "resum" in (folder / "log.txt").read_text() or not list(folder.glob("checkpoints/*"))

    # The same numbers as in an uninterrupted comparison on this machine.
    local = compared({**values, "output": str(tmp_path / "local")})
    (cell,) = local["cells"]
    (remote,) = load_results(values["output"]).scores.query("metric == 'nll'")["score"][:1]
    assert remote == cell["scores"]["tasks"]["cities"]["nll"]


def test_failures_are_those_of_the_cell_and_a_missing_cluster_is_refused(values, cluster):
    cluster.add_node(num_cpus=2, **_NODE)
    values["compare"]["methods"] = {"lora": {"name": "lora", "training": {"learning_rate": 1e38}}}
    results = compare(values, ray=cluster.address, progress=False)
    (error,) = results.cells["error"]
    folder = Path(values["output"]) / "lora" / "lr-1e+38" / "seed-0"
    assert error == (folder / "error.txt").read_text().strip()
    assert "Traceback" in (folder / "log.txt").read_text()
    ray.shutdown()
    with pytest.raises(BaditError, match=r"--ray: cannot be reached .* ray start --head"):
        compare(values, ray="127.0.0.1:1", progress=False)
