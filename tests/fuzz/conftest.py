"""Counts how many cases of broken input each test of this room has tried; tests/conftest.py sums them up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzz import command
from fuzz.command import COUNTED


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    before = command.tried
    yield
    request.node.user_properties.append((COUNTED, command.tried - before))
