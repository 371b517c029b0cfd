"""What all sections need to know: the sources, the tasks' short names, and how a number is traced to its file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from badit.report.blocks import Block, Cards, Cell, Figure, Note, Origin, Table
from badit.report.contract import Records
from badit.report.numbers import run_difference
from badit.report.sources import Source
from badit.report.wording import TaskNames
from badit.statistics import Difference

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

    def first(self, table: str) -> Records:
        """A table of the first run that has it; its tasks' order is that of all runs, so that matrices compare."""
        return next((run.tables[table] for run in self.runs if table in run.tables), [])

    def run(self, source: Source) -> str:
        """The source's name, where it must be told from others."""
        return source.label if self.several else ""

    def origin(self, source: Source, file: str) -> Origin:
        return Origin(file, self.run(source))

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
        origins = self.origins(source, *tables)
        return Figure(self.key(key, source), title, chart, alt, caption, origins, width, self.run(source))

    def table(
        self,
        source: Source,
        key: str,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *tables: str,
        caption: str,
    ) -> Table:
        """A table made from a source's tables."""
        origins = self.origins(source, *tables)
        return Table(self.key(key, source), title, header, rows, caption, origins, run=self.run(source))

    def of_each(
        self,
        sources: Iterable[Source],
        tables: Sequence[str],
        build: Callable[[Source], list[Figure | Table | Cards]],
        none: str,
    ) -> list[Block]:
        """The blocks of every source that has any of the tables, side by side, then how to make those of the others.

        Args:
            sources: runs, or comparisons.
            tables: what the blocks are made of.
            build: makes a source's blocks.
            none: why an analysis may have found nothing.
        """
        found: list[list[Figure | Table | Cards]] = []
        notes = []
        for source in sources:
            name = f"{source.label}: " if self.several else ""
            if any(table in source.tables for table in tables):
                found.append(build(source))
            elif source.analysed:
                notes.append(Note(name + none))
            else:
                text = f"{name}not measured yet" if name else "Not measured yet"
                command = f"badit analyze {quoted(source.path)}"
                notes.append(Note(f"{text}. Measure it, then write the report again:", command))
        return [*_side_by_side(found), *notes]


def _side_by_side(of_sources: Sequence[Sequence[Figure | Table | Cards]]) -> list[Block]:
    """The sources' blocks, those of one title next to one another."""
    if len(of_sources) < 2:
        return [block for blocks in of_sources for block in blocks]
    titles = dict.fromkeys(block.title for blocks in of_sources for block in blocks)
    return [
        replace(block, width="half") if isinstance(block, Figure) else block
        for title in titles
        for blocks in of_sources
        for block in blocks
        if block.title == title
    ]


def quoted(path: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))
