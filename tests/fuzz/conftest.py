"""How many cases of broken input the tests of this room have tried, below the other results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fuzz import command

_COUNT = "cases of broken input"


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    before = command.tried
    yield
    request.node.user_properties.append((_COUNT, command.tried - before))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [dict(report.user_properties) for report in reports if getattr(report, "when", "") == "teardown"]
    if total := sum(each.get(_COUNT, 0) for each in properties):
        terminalreporter.write_line(f"{total:,} {_COUNT}")
