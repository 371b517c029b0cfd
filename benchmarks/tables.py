#!/usr/bin/env python3
"""tables.py: writes the tables of comparisons in the documentation again, from the results under benchmarks/results.

Such a table is between two comments. The first one names the results file and the options of `badit table`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import badit

ROOT = Path(__file__).parents[1]
TABLE = re.compile(
    r"(<!-- table: (\S+\.json)((?: \w+=\S+)*) -->\n)(?:(?!<!-- end).)*(<!-- end of table -->)", flags=re.DOTALL
)


def written_again(found: re.Match[str]) -> str:
    begin, file, options, end = found.groups()
    chosen: dict[str, Any] = dict(option.split("=") for option in options.split())
    return f"{begin}{badit.table(ROOT / 'benchmarks' / 'results' / file, format='markdown', **chosen)}\n{end}"


def render(text: str) -> str:
    """Returns the page with its tables of comparisons written again."""
    return TABLE.sub(written_again, text)


if __name__ == "__main__":
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        page.write_text(render(page.read_text()))
