"""What all sections need to know: the sources, the tasks' short names, and how a number is traced to its file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from badit.evaluation.statistics import Difference
from badit.report.blocks import Block, Figure, Heading, Note, Origin
from badit.report.numbers import run_difference
from badit.report.sources import Source
from badit.report.wording import TaskNames

ON_RUNS = Note("This is measured on a run. Name a run's folder as well, once badit analyze has measured it.")


@dataclass(frozen=True)
class Report:
    """Everything that a page is made of, read but not yet laid out."""

    sources: Sequence[Source]

    @cached_property
    def names(self) -> TaskNames:
        return TaskNames(name for source in self.sources for name in source.names())

    @property
    def several(self) -> bool:
        return len(self.sources) > 1

    @property
    def runs(self) -> list[Source]:
        return [source for source in self.sources if source.results is None]

    @property
    def scored_runs(self) -> list[Source]:
        return [run for run in self.runs if run.scores is not None]

    @property
    def comparisons(self) -> list[Source]:
        return [source for source in self.sources if source.results is not None]

    @cached_property
    def run_differences(self) -> Mapping[str, Difference]:
        """Each scored run's difference to the first one, where they have answered the same instances."""
        found = {run.label: run_difference(self.scored_runs[0], run) for run in self.scored_runs[1:]}
        return {label: difference for label, difference in found.items() if difference is not None}

    def origin(self, source: Source, file: str) -> Origin:
        return Origin(file, source.label if self.several else "")

    def origins(self, source: Source, *tables: str) -> list[Origin]:
        """The files of those of the tables that the source has."""
        return [self.origin(source, source.files[name]) for name in tables if name in source.tables]

    def key(self, base: str, source: Source) -> str:
        """A name for a block of a source, fit for an address and a file."""
        if not self.several:
            return base
        number = self.sources.index(source) + 1
        slug = re.sub(r"[^a-z0-9]+", "-", source.label.lower()).strip("-")
        return f"{base}-{number}-{slug[:40]}".rstrip("-")

    def figure(
        self,
        source: Source,
        key: str,
        title: str,
        chart: Any,
        *tables: str,
        alt: str,
        caption: str,
        width: Literal["full", "half", "square"] = "full",
    ) -> Figure:
        """A figure made from a source's tables."""
        return Figure(self.key(key, source), title, chart, alt, caption, self.origins(source, *tables), width)

    def of_each(
        self, sources: Iterable[Source], tables: Sequence[str], build: Callable[[Source], list[Block]], none: str
    ) -> list[Block]:
        """The blocks of each source that has any of the tables, and for each other one a line on how to make them.

        Args:
            sources: runs, or comparisons.
            tables: what the blocks are made of.
            build: makes a source's blocks.
            none: why an analysis may have found nothing.
        """
        blocks: list[Block] = []
        for source in sources:
            if self.several:
                blocks.append(Heading(source.label))
            if any(name in source.tables for name in tables):
                blocks += build(source)
            elif source.analysed:
                blocks.append(Note(none))
            else:
                text = "Not measured yet. Measure it, then write the report again:"
                blocks.append(Note(text, f"badit analyze {quoted(source.path)}"))
        return blocks


def quoted(path: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))
