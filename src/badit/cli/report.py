"""``badit report``."""

from pathlib import Path

from badit.cli.app import Output, app, load
from badit.support.errors import BaditError


@app.command
def report(
    run: str,
    /,
    *more: str,
    output: Output = "report.html",
    figures: str | None = None,
    title: str | None = None,
) -> str:
    """Write an HTML report with figures: scores, curves, interference and experts.

    The page is one file and needs no network. Differences between runs are relative to the first
    run. For interference and experts, first run: badit analyze RUN

    Args:
        run: a run's folder, a comparison's folder, or a results.json.
        more: further runs or comparisons, shown side by side.
        output: the HTML file.
        figures: a folder to which every figure is written as .svg and .pdf.
        title: the page's heading (default: the runs' names).
    """
    for path in (run, *more):
        if not Path(path).exists():
            raise BaditError(f"{path}: no such file or folder; give a run or a comparison")
    page = load("badit.report").write_report([run, *more], output, title=title, figures=figures)
    lines = [f"Report: {page}"]
    if figures:
        lines.append(f"Figures: {figures}")
    return "\n".join(lines)
