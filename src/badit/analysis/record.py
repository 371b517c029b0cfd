"""The record of an analysis: analysis.json, next to the tables."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from badit.analysis.tables import load_frame, save_frame
from badit.support.environment import environment, peak_memory
from badit.support.errors import BaditError, explained
from badit.support.files import inside, read_json, write_json

PARTS = {"interference", "experts", "learning"}


def _is_readable(path: Path) -> bool:
    """Returns whether a table exists and has all columns, which one of another version may lack."""
    with suppress(BaditError):
        load_frame(path)
        return True
    return False


class Record:
    """The settings and the finished parts of an analysis, as saved in ``OUTPUT/analysis.json``.

    BaditError if the file is damaged or has other ``settings``. ``count_instances`` returns numbers
    by task, of which the verdict proposes more; it reads the data, so it is called for a new record
    only. ``with_recipe`` says that ``OUTPUT`` has the config.yaml of a base model, which belongs to
    the analysis.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        count_instances: Callable[[], Mapping[str, Mapping[str, int]]],
        *,
        with_recipe: bool,
    ) -> None:
        self.path = inside(output, output / "analysis.json")
        self.tables = output / "analysis"
        #: The finished parts whose tables can still be read.
        self.finished: dict[str, dict[str, Any]] = {}
        if not self.path.is_file():
            self.content = {
                "settings": settings,
                "instances": count_instances(),
                "environment": environment(),
            }
            return
        files = (
            f"it, {self.path.name} and config.yaml" if with_recipe else f"it and {self.path.name}"
        )
        fix = f"delete {files} to measure again, or choose another --output"
        # In a damaged file, any value may be missing or have another type.
        with explained(self.tables, action="resumed", fix=fix, any_error=True):
            self.content = read_json(self.path)
            # Tables of other settings must not be mixed with new ones.
            if self.content["settings"] != settings:
                problem = "belongs to another run, model or data, or to other settings"
                raise BaditError(f"{self.tables}: {problem}; {fix}")
            for name, details in self.content["parts"].items():
                if all(_is_readable(self.tables / f"{table}.json") for table in details["tables"]):
                    self.finished[name] = details

    @property
    def is_complete(self) -> bool:
        return self.finished.keys() >= PARTS

    def add(self, name: str, frames: Sequence[pd.DataFrame], seconds: float) -> None:
        """Saves the tables of a part, without those that have no rows, and records the part."""
        frames = [frame for frame in frames if len(frame)]
        for frame in frames:
            save_frame(frame, self.tables)
        # Recorded after the tables are written, so that an interrupted part is measured again.
        self.finished[name] = {
            "tables": [frame.attrs["name"] for frame in frames],
            "seconds": round(seconds, 1),
            "peak_memory_gib": peak_memory(),
        }
        write_json(self.path, {**self.content, "parts": self.finished})
