import multiprocessing
import os
from unittest.mock import patch

import pytest

from training.launches import TESTS, Launches


@pytest.fixture
def launches(recipe_values, tmp_path, processes):
    return Launches(recipe_values, tmp_path, processes)


@pytest.fixture(scope="module")
def processes():
    """Forks of a server process that has imported everything once."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.killed", "training.ranks"])
    with patch.dict(os.environ, {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}):
        yield context
