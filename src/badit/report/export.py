"""The page's figures as SVG and PDF files for papers, made without a browser."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import vl_convert

from badit.errors import BaditError
from badit.report.blocks import Figure
from badit.report.page import VEGA_LITE, specification
from badit.report.theme import chart_config

# In pixels of 1/72 inch: the width of a page's text, of half of it, and of a matrix.
_WIDTHS = {"full": 520, "half": 340, "square": 400}


def export_figures(figures: Iterable[Figure], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes NAME.svg and NAME.pdf for every figure, showing what the page shows at first.

    Raises:
        BaditError: the folder cannot be written.
    """
    folder = Path(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            svg = as_svg(figure)
            for path, content in (
                (f"{figure.key}.svg", svg.encode()),
                (f"{figure.key}.pdf", vl_convert.svg_to_pdf(svg)),
            ):
                (folder / path).write_bytes(content)
                written.append(folder / path)
    except OSError as error:
        raise BaditError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return written


def as_svg(figure: Figure) -> str:
    """The figure on a white page."""
    content = {**specification(figure), "width": _WIDTHS[figure.width]}
    config = {**chart_config("light", font="Helvetica, Arial, sans-serif"), "background": "white"}
    return vl_convert.vegalite_to_svg(content, vl_version=VEGA_LITE, config=config, allowed_base_urls=[])
