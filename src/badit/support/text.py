"""Numbers and tables as text."""

from collections.abc import Container, Sequence
from typing import Any

import pandas as pd

from badit.support.console import one_line

UNKNOWN = "–"


def number(value: Any, form: str = ".1f", sign: str = "-") -> str:
    """Formats a number: -1234.5 as "−1,234.5".

    A rounded zero has no minus sign. A missing number is a dash.
    """
    if pd.isna(value):
        return UNKNOWN
    # The option "z" drops the minus sign of a value that rounds to zero.
    return f"{value:{sign}z,{form}}".replace("-", "−")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless it is 1."""
    if number != 1:
        noun += "s"
    return f"{number:,} {noun}"


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Container[int] | None = None
) -> str:
    """Returns a table with aligned columns.

    The columns in ``right`` (default: all but the first) are right-aligned.
    """
    if right is None:
        right = range(1, len(header))
    columns = []
    for i, cells in enumerate(zip(header, *rows, strict=True)):
        # A line break within a cell would break the row, and a control character the terminal.
        title, *texts = map(one_line, cells)
        width = max(map(len, (title, *texts)))
        align = str.rjust if i in right else str.ljust
        rule = "─" * width
        columns.append([align(text, width) for text in (title, rule, *texts)])
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(line).rstrip() for line in lines)
