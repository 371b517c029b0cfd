"""Writes figures and one self-contained page from runs and their tables, and defines the colours of the charts.

Charts set no colours: their scales use the ranges "category", "heatmap" and "diverging" of :func:`chart_config`.
Categories use colours based on Okabe & Ito (2008), which colour-blind people can distinguish, without yellow on the
light page. Magnitudes use cividis (Nuñez et al. 2018, doi 10.1371/journal.pone.0199239), and low values are close to
the page's colour. Signed values range from orange (low) through the page's colour to blue (high).
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from badit.support.console import status
from badit.support.errors import BaditError, explained
from badit.support.files import write_text

_CIVIDIS = ["#00204d", "#213d6b", "#555b6c", "#7b7a77", "#a59c74", "#d3c064", "#ffe945"]
_RANGES = {
    "light": {
        "category": ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f6368"],
        "heatmap": ["#fdf6d8", *_CIVIDIS[5::-1]],
        "diverging": ["#8f3b00", "#d56a10", "#f3b06b", "#f6f4f0", "#85bbdf", "#2a7ab8", "#08457e"],
    },
    "dark": {
        "category": ["#56b4e9", "#e69f00", "#1fbf92", "#e29bc4", "#f0e442", "#f07a35", "#a8adb3"],
        "heatmap": ["#1d2533", *_CIVIDIS[1:]],
        "diverging": ["#ffc27d", "#e58a34", "#8a4d17", "#22252a", "#275a86", "#4f9ddb", "#a9d8ff"],
    },
}
_INK = {
    "light": {"text": "#1d1f23", "faint": "#5d626b", "line": "#d9d8d3", "empty": "#e9e6df"},
    "dark": {"text": "#e8e6e1", "faint": "#a3a8b0", "line": "#3a3e45", "empty": "#41464f"},
}


def write_report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report.html",
    *,
    title: str | None = None,
    figures: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes one self-contained page about runs and comparisons, and returns its path.

    Args:
        runs: a run's folder, a comparison's folder or a results.json file, or several, which are shown side by side.
            Differences between runs are relative to the first run.
        output: the page's file.
        title: the page's heading (default: the names of the runs).
        figures: a folder to write every figure to as .svg and .pdf.

    Raises:
        BaditError: the extra is not installed, a folder is not a run, a file is damaged, or the page cannot be written.
    """
    if not has_extra():
        raise BaditError("the report needs its extra: pip install 'badit[report]'")
    output = Path(output)
    with status("writing the report"):
        from badit.report.page import export_figures, render, sections_of
        from badit.report.sources import read_sources

        sources = read_sources([runs] if isinstance(runs, str | os.PathLike) else runs)
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


def chart_config(mode: Literal["light", "dark"]) -> dict[str, Any]:
    """Returns Vega-Lite's ``config`` for a theme."""
    ink, ranges = _INK[mode], _RANGES[mode]
    first, faint, line = ranges["category"][0], ink["faint"], ink["line"]
    quiet = {"labelColor": faint, "titleColor": ink["text"]}
    quiet |= {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": 500}
    axis = {
        "titlePadding": 10,
        "gridOpacity": 0.6,
        "ticks": False,
        "labelPadding": 6,
        "labelLimit": 150,
    }
    legend = {
        "titleLimit": 260,
        "orient": "top",
        "gradientThickness": 10,
        "gradientLength": 180,
        "labelLimit": 170,
    }
    symbols = {
        "symbolStrokeWidth": 2,
        "symbolOpacity": 1,
        "symbolBaseFillColor": faint,
        "symbolBaseStrokeColor": faint,
    }
    return {
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
        "background": "transparent",
        "view": {"stroke": None},
        "style": {
            "matrix": {
                "fill": ink["empty"]
            },  # a missing value, such as the diagonal, must not look like 0
            "reference": {"color": faint, "strokeDash": [2, 4]},
            "interval": {"color": first},
        },
        "range": ranges,
        # A screen reader reads one description per chart, not one per mark.
        "mark": {"aria": False, "color": first, "tooltip": True},
        "rule": {"color": faint},
        "text": {"color": ink["text"]},
        "axis": {**quiet, **axis, "domainColor": line, "gridColor": line},
        "axisBand": {"domain": False, "grid": False},
        "legend": {
            **quiet,
            **legend,
            **symbols,
            "layout": {"top": {"direction": "vertical", "anchor": "start"}},
        },
    }
