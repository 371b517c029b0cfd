#!/usr/bin/env python3
"""tables.py: writes the tables of comparisons in the documentation again, from the results under benchmarks/results.

Such a table is between two comments. The first one names the results file and the options of `badit table`, or of
`noise.py` in a comment that begins with `noise:`.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import badit

ROOT = Path(__file__).parents[1]
NOISE = runpy.run_path(str(Path(__file__).with_name("noise.py")))["table"]
TABLE = re.compile(
    r"(<!-- (table|noise): (\S+\.json)((?: \w+=\S+)*) -->\n)(?:(?!<!-- end).)*(<!-- end of table -->)", flags=re.DOTALL
)


def written_again(found: re.Match[str]) -> str:
    begin, kind, file, options, end = found.groups()
    chosen: dict[str, Any] = dict(option.split("=") for option in options.split())
    path = ROOT / "benchmarks" / "results" / file
    text = NOISE(path, **chosen) if kind == "noise" else badit.table(path, format="markdown", **chosen)
    return f"{begin}{text}\n{end}"


def render(text: str) -> str:
    """Returns the page with its tables of comparisons written again."""
    return TABLE.sub(written_again, text)


if __name__ == "__main__":
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        page.write_text(render(page.read_text()))
