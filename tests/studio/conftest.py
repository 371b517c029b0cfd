"""Tiny trained runs, loaded, and served."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from badit.recipe import build_recipe
from badit.runs import RunFolder
from badit.studio.serve import Server, listen
from badit.studio.server import application
from badit.studio.session import Session
from badit.train import fit

BADIT = {"name": "badit", "num_experts": 4, "r": 2, "router_input": "standardised", "regroup": {"every": 2}}


@pytest.fixture(scope="session")
def trained(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """A factory: ``trained({"name": "lora"})`` is a run of three large steps, so that what it has learnt shows."""

    def make(method: dict[str, Any], source: Path = material / "tasks.jsonl", name: str = "run") -> RunFolder:
        values = {
            "model": {"name": str(material / "model"), "dtype": "float32"},
            "data": {"source": str(source)},
            "method": method,
            "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05},
            "evaluation": {"max_new_tokens": 8},
            "output": str(tmp_path_factory.mktemp("runs") / name),
        }
        return fit(build_recipe(values), progress=False)

    return make


@pytest.fixture(scope="session")
def session(trained: Callable[..., RunFolder]) -> Session:
    session = Session(trained(BADIT).path)
    session.measure()
    return session


@pytest.fixture(scope="session")
def plain_session(trained: Callable[..., RunFolder]) -> Session:
    """Of a method without gates."""
    return Session(trained({"name": "lora", "r": 4}).path)


@contextmanager
def served(session: Any) -> Iterator[int]:
    """A real server of the session; its port."""
    with listen(0) as listening:
        running = Server(application(session))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()
