"""Writes figures and one self-contained page from runs and their tables."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from badit.report.theme import chart_config
from badit.support.console import status
from badit.support.errors import BaditError, explained
from badit.support.files import write_text

__all__ = ["chart_config", "has_extra", "write_report"]


def write_report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report.html",
    *,
    title: str | None = None,
    figures: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes one self-contained page about runs and comparisons, and returns its path.

    Args:
        runs: a run's folder, a comparison's folder or a results.json file, or several, which are
            shown side by side. Differences between runs are relative to the first run.
        output: the page's file.
        title: the page's heading (default: the names of the runs).
        figures: a folder to write every figure to as .svg and .pdf.

    Raises:
        BaditError: the extra is not installed, a folder is not a run, a file is damaged, or the
            page cannot be written.
    """
    if not has_extra():
        raise BaditError("the report needs its extra: pip install 'badit[report]'")
    if isinstance(runs, str | os.PathLike):
        runs = [runs]
    output = Path(output)

    with status("writing the report", in_logs=True):
        # They need the extra, and take long to import.
        from badit.report.page import export_figures, render
        from badit.report.sections import sections_of
        from badit.report.sources import read_sources

        sources = read_sources(runs)
        sections = sections_of(sources)
        page = render(title or " · ".join(source.label for source in sources), sections)
        with explained(action="written"):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, page)
            if figures is not None:
                export_figures(sections, Path(figures))
    return output


def has_extra() -> bool:
    """Returns whether the libraries that draw the charts are installed."""
    return all(find_spec(name) is not None for name in ("altair", "vl_convert"))
