"""Messages and headings that the documentation quotes are those of the source."""

import ast
import re

from badit.report.page import SECTIONS
from docs.pages import ROOT, Page


def texts():
    """Every text in the source, with … for what it fills in."""
    nodes = [node for file in (ROOT / "src").glob("**/*.py") for node in ast.walk(ast.parse(file.read_text()))]
    plain = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    filled = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    return plain + [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts) for parts in filled
    ]


def test_the_reports_sections_are_those_of_the_page():
    listed = re.findall(r"^\| \*\*(.+?)\*\* \|", Page("docs/analysis.md").text, flags=re.MULTILINE)
    assert len(listed) == len(SECTIONS)
    assert set(listed) <= set(texts())


def test_every_quoted_message_is_in_the_source():
    quoted = re.findall(r"^\| `([^`]+)` \|", Page("docs/troubleshooting.md").text, flags=re.MULTILINE)
    assert len(quoted) > 30
    known = texts()
    pattern = {text: re.escape(text).replace("…", ".*….*") for text in quoted}
    assert [text for text in quoted if not any(re.search(pattern[text], one, re.DOTALL) for one in known)] == []
