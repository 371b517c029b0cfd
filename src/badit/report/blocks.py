"""The blocks of a section: its figures, and notes on what is missing."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from badit.comparison.tables import method_table
from badit.report.charts import Figure
from badit.report.heat_maps import share_limits
from badit.report.sources import Source

# The command that measures what a run lacks in a section.
_COMMANDS = {
    "verdict": "badit analyze",
    "scores": "badit evaluate",
    "samples": "badit evaluate",
    "gradients": "badit analyze",
    "units": "badit analyze",
    "geometry": "badit analyze",
    "atlas": "badit analyze",
}
# Characters that XML cannot hold, as JSON escapes them. vl-convert would abort the process.
_NOT_IN_XML = re.compile(r"\\+(?:u00[01].|ufff[ef])|(?<!\\)\\[bf]")


class Block(NamedTuple):
    """A part of a section, rendered by the template's macro named ``kind``.

    ``name`` is the element's id and the exported figure's file name. If several runs have the same
    figure, only the first has a ``caption``. ``file`` names the data's files, and ``source`` the
    label of the run if there are several.
    """

    kind: str  # verdict, figure, table, samples, details or note
    title: str
    content: Any
    name: str = ""
    caption: str = ""
    width: str = "full"
    file: str = ""
    source: str = ""

    @property
    def specification(self) -> dict[str, Any]:
        """The chart's Vega-Lite specification without colours, which the page sets."""
        text = json.dumps(self.content.to_dict(validate=False))
        specification = json.loads(_NOT_IN_XML.sub("\ufffd", text))
        # page.js passes the config of its theme, and the mode, which the schema would name.
        del specification["config"], specification["$schema"]
        # Screen readers read the description.
        description = f"{self.title}. {self.caption}".strip()
        size = {"type": "fit-x", "contains": "padding"}
        specification |= {"autosize": size, "width": "container", "description": description}
        return specification


def figure_blocks(figure: Figure, sources: Sequence[Source]) -> Iterator[Block]:
    """Yields the figure of each source that has its table.

    The first source has the frames of all sources together. Figures of several sources share their
    colour scale.
    """
    shown = [(i, source) for i, source in enumerate(sources) if figure.table in source.frames]
    drawn = [figure.draw(source.frames[figure.table]) for _, source in shown]
    share_limits(drawn)
    caption = " ".join(str(figure.draw.__doc__).split())
    for (number, source), content in zip(shown, drawn, strict=True):
        if content is None:
            continue
        name = figure.draw.__name__.replace("_", "-")
        label = source.prefix.removesuffix(": ")
        if label:
            # The number keeps names apart whose labels have the same letters and digits.
            slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:40]
            name = f"{name}-{number}-{slug}".rstrip("-")
        kind = "table" if isinstance(content, pd.DataFrame) else "figure"
        width = figure.width
        if kind == "figure" and len(shown) > 1:
            # Two figures fit side by side, for comparison.
            width = "half"
        file = source.frames[figure.table].attrs["file"]
        yield Block(kind, figure.title, content, name, caption, width, file, label)
        # Repeated captions would only lengthen the page.
        caption = ""


def notes(section: str, sources: Sequence[Source], blocks: Sequence[Block]) -> Iterator[Block]:
    """Yields a note for each run without data for the section.

    The note has the command that measures the data, or the reason why there is none.
    """
    for source in sources:
        if section == "scores" and source.results and "methods" not in source.frames:
            yield _no_finished_run(source)
        command = _COMMANDS.get(section)
        if source.results is None and command and _is_missing(section, source, sources, blocks):
            label = f"{source.label}: not" if len(sources) > 1 else "Not"
            text = f"{label} measured yet. Measure it, then write the report again:"
            yield Block("note", text, f"{command} {shlex.quote(str(source.folder))}")


def _no_finished_run(source: Source) -> Block:
    reasons = [f"{source.prefix}no run has finished"]
    if source.results:
        notes_of_table = method_table(source.results).notes
        # The table's other notes explain its columns.
        reasons += [note for note in notes_of_table if note.startswith(("missing", "failed"))]
    return Block("note", "; ".join(reasons), "")


def _is_missing(
    section: str, source: Source, sources: Sequence[Source], blocks: Sequence[Block]
) -> bool:
    """Returns whether the section's command was not run for a source."""
    if section == "scores":
        return bool(source.config) and source.scores is None
    if section == "samples":
        return bool(source.config) and not blocks
    if section == "verdict" and not source.config:
        return False
    if any(block.source in ("", source.label) for block in blocks):
        return False
    # Sources without a recipe are folders of `badit analyze --output`: they may be of this run.
    analyses = [source, *(other for other in sources if not other.config and not other.results)]
    return not any(_is_analysed(other) for other in analyses)


def _is_analysed(source: Source) -> bool:
    return any(frame.attrs["file"].startswith("analysis/") for frame in source.frames.values())
