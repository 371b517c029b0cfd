"""Fixtures: studio sessions of tiny trained runs, and a server for them."""

import threading
from contextlib import contextmanager

import pytest

from badit.integrations.studio.session import Session
from badit.integrations.web import listen, server

BADIT = {"name": "badit", "num_experts": 4, "r": 2, "init_weights": "bad", "gated": "factors"}
BADIT |= {"regroup": {"every": 2}}
# An expert means the same in all layers only in an adapter of a single module.
SINGLE = {**BADIT, "target_modules": ["layers.1.mlp.gate_proj"]}
CLUSTERS = {"name": "badit", "num_experts": 4, "r": 2, "gates": "clusters", "num_clusters": 3}


def measured(run):
    session = Session(run)
    session.measure()
    return session


@pytest.fixture(scope="session")
def session(trained):
    return measured(trained(BADIT))


@pytest.fixture(scope="session")
def plain_session(trained):
    """A session of a method without gates."""
    return Session(trained({"name": "lora", "r": 4}))


@contextmanager
def served(web):
    """Runs a web application on a real server, and yields its port."""
    with listen(0) as listening:
        running = server(web)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()
