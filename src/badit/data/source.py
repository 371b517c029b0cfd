"""The location of tasks, and the options for reading their rows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

from badit.data.tasks import Split
from badit.support.errors import BaditError

Format = Literal["auto", "sapt", "superni", "jsonl", "builtin"]
Turns = Literal["last", "all"]

#: Suffixes of files; all but the first always hold rows.
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
#: Names of splits in datasets, and the split that each stands for.
_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Source:
    """The location of tasks and the options for reading their rows.

    Args:
        path: "builtin", a file, a folder, a pattern with *, or a dataset on the hub: org/name or
            org/name:CONFIG.
        format: the layout of a folder.
        task: the task of all rows. Default: the task that a row names, or the name of the file or
            dataset.
        instruction: the instruction of rows without one. Default: none; a row's input is then the
            whole prompt.
        columns: maps ``task``, ``instruction``, ``input``, ``output``, ``rejected``, ``id``,
            ``split`` and ``messages`` to the names of their columns, where these differ.
        splits: maps names of splits (in rows, file names or datasets) to train, validation or test;
            rows of other splits are then not read. Default: the usual names, such as "dev".
        turns: the answers of a chat to train; "all" makes one instance with its own prompt for
            each.
        weight: the weight of its tasks in a mixture.
    """

    path: str | Path
    format: Format = "auto"
    task: str | None = None
    instruction: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)
    turns: Turns = "last"
    weight: float = 1.0

    @property
    def maps_text(self) -> bool:
        """Whether ``columns`` names the input or the output; others do not count then."""
        return "input" in self.columns or "output" in self.columns

    def split_of(self, name: str) -> Split | None:
        """Returns the split that a name stands for; None if it is unknown or not to be read."""
        if self.splits:
            return self.splits.get(name)
        return _SPLIT_NAMES.get(name.lower())

    def split_of_file(self, file: Path) -> Split | None:
        """Returns the split that a file is named after, as train-00000-of-00002.parquet is."""
        return self.split_of(re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", file.stem))

    def refuse_missing(self) -> None:
        """Raises BaditError if the path is neither an existing file or folder nor another place."""
        # An unknown path without a suffix of files may be org/name or org/name:CONFIG.
        path = str(self.path)
        is_on_hub = (
            re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", path)
            and Path(path).suffix not in SUFFIXES
        )
        if path != "builtin" and not has_magic(path) and not is_on_hub and not Path(path).exists():
            raise BaditError(
                f"data.source: {path}: no such file or folder; give a path or 'builtin'"
            )

    def refuse_row_options(self) -> None:
        """Raises BaditError if an option is set that only rows can have; for other layouts."""
        options: dict[str, Any] = {
            "task": self.task,
            "instruction": self.instruction,
            "columns": self.columns,
            "splits": self.splits,
            "turns": self.turns != "last",
        }
        for name, is_set in options.items():
            if is_set:
                raise BaditError(
                    f"data.{name}: does not apply to {self.path}, whose tasks are not rows; "
                    "remove it, or set it in the entries of other sources"
                )
