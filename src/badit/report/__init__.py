"""From runs and their tables to figures and one self-contained page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from badit.environment import status
from badit.errors import BaditError, explained
from badit.files import write_text


def write_report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report.html",
    *,
    title: str | None = None,
    figures: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes one self-contained page on runs and comparisons, and returns its path.

    Args:
        runs: a run's folder, a comparison's folder or a results.json file, or several, which are shown side by side;
            differences between runs are taken to the first.
        output: the page.
        title: its heading; by default the names of the runs.
        figures: a folder for every figure as .svg and .pdf.

    Raises:
        BaditError: the extra is not installed, a folder is no run, a file is damaged, or the page cannot be written.
    """
    if not has_extra():
        raise BaditError("the report needs its extra: pip install 'badit[report]'")
    from badit.report.page import export_figures, render, sections_of
    from badit.report.sources import read_sources

    output = Path(output)
    with status("writing the report"):
        sources = read_sources([runs] if isinstance(runs, str | os.PathLike) else runs)
        sections = sections_of(sources)
        page = render(title or " · ".join(source.label for source in sources), sections)
        with explained(output, action="written"):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, page)
        if figures is not None:
            with explained(figures, action="written"):
                export_figures(sections, Path(figures))
    return output


def has_extra() -> bool:
    """Whether the libraries that draw are installed."""
    return all(find_spec(name) is not None for name in ("altair", "jinja2", "vl_convert"))
