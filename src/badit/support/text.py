"""Numbers and tables as text."""

from collections.abc import Sequence, Set
from typing import Any

import pandas as pd

from badit.support.console import one_line

UNKNOWN = "–"


def number(value: Any, form: str = ".1f", sign: str = "-") -> str:
    """Formats a number: -1234.5 as "−1,234.5". A rounded zero has no minus sign; a missing number is a dash."""
    return UNKNOWN if pd.isna(value) else f"{value:{sign}z,{form}}".replace("-", "−")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Set[int] | None = None
) -> str:
    """Returns a table with aligned columns; those in ``right`` (default: all but the first) are right-aligned."""
    columns = []
    for i, cells in enumerate(zip(header, *rows, strict=True)):
        texts = [*map(one_line, cells)]
        width = max(map(len, texts))
        align = str.rjust if (i in right if right is not None else i) else str.ljust
        columns.append([align(text, width) for text in (texts[0], "─" * width, *texts[1:])])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
