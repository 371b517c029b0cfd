"""The results of the rig: one run per line of results.jsonl."""

from pathlib import Path
from typing import Any

from badit.support.files import read_jsonl

RESULTS = "results.jsonl"


def runs_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the finished runs of a folder, by name."""
    return {run["name"]: run for run in read_jsonl(folder / RESULTS)}
