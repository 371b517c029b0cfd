"""``badit report RUN…``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, a comparison's, or a results.json; several are compared"
    )
    parser.add_argument("-o", "--output", default="report.html", help="the page (default: report.html)")
    parser.add_argument("--figures", metavar="FOLDER", help="write every figure there, too, as .svg and .pdf")
    parser.add_argument("--title", help="the page's heading (default: the runs' names)")
    parser.epilog = (
        "The page needs no network and no other file. What it shows of interference and experts is measured by: "
        "badit analyze RUN. Differences between runs are taken to the first."
    )


def execute(options: argparse.Namespace) -> None:
    from badit.api import write_report

    page = write_report(options.runs, options.output, title=options.title, figures=options.figures)
    print(f"Report: {page}")
    if options.figures:
        print(f"Figures: {options.figures}")


def write_if_possible(runs: Sequence[str | os.PathLike[str]], output: Path) -> str:
    """Writes the page and says where it is, or says what it would need."""
    from badit.api import write_report
    from badit.report import has_extra

    if not has_extra():
        return "For a page of figures: pip install 'badit[report]', then badit report " + " ".join(map(str, runs))
    return f"Report: {write_report(runs, output)}"
