"""Messages and headings that the documentation quotes are those of the source."""

from __future__ import annotations

import ast
import re

from badit.report.page import SECTIONS
from docs.pages import ROOT, Page

ELLIPSIS = "…"


def texts() -> list[str]:
    """Every text in the source, with … for what it fills in."""
    found = []
    for file in (ROOT / "src" / "badit").glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(part.value if isinstance(part, ast.Constant) else ELLIPSIS for part in node.values)
                )
    return found


def test_the_reports_sections_are_those_of_the_page() -> None:
    listed = re.findall(r"^\| \*\*(.+?)\*\* \|", Page("docs/analysis.md").text, flags=re.MULTILINE)
    assert len(listed) == len(SECTIONS)
    assert set(listed) <= set(texts())


def test_every_quoted_message_is_in_the_source() -> None:
    quoted = re.findall(r"^\| `([^`]+)` \|", Page("docs/troubleshooting.md").text, flags=re.MULTILINE)
    assert len(quoted) > 30
    known = texts()
    pattern = {text: re.escape(text).replace(ELLIPSIS, f".*{ELLIPSIS}.*") for text in quoted}
    assert [text for text in quoted if not any(re.search(pattern[text], one, re.DOTALL) for one in known)] == []
