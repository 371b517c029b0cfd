import multiprocessing
import os
from unittest.mock import patch

import pytest

from training.launches import OF_PROCESSES


@pytest.fixture(scope="module")
def processes():
    """A multiprocessing context whose fork server has already imported the modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.killed", "training.ranks"])
    with patch.dict(os.environ, OF_PROCESSES):
        yield context
