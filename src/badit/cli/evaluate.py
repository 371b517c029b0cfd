"""``badit evaluate``."""

from typing import Any

from badit.api import Run
from badit.cli.app import load
from badit.cli.derived import derive


def _shown(run: Run, scores: Any, options: dict[str, Any]) -> str:
    return load("badit.runs.scores").score_table(scores)


derive(Run.evaluate, _shown)
