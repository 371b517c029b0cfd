"""Figures and tables in the documentation against the committed results."""

import json
import re

import pytest

from badit.render import render
from docs.pages import RESULTS, Page, pages

_FIGURE = re.compile(r"(\d+\.(\d+))<!-- ([\w/.-]+):([^>]+?) -->")
_TABLE = re.compile(r"<!-- table: ([\w/.-]+\.json) -->\n(.*?)\n<!-- end of table -->", flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in pages() if _FIGURE.search(page.text)], ids=str)
def test_figures_are_those_of_the_committed_results(page):
    """A figure that is quoted from a results file carries a comment that names the file and the key."""
    assert len(_FIGURE.findall(Page("README.md").text)) >= 4
    for figure, decimals, file, key in _FIGURE.findall(page.text):
        value = json.loads((RESULTS / file).read_text())
        for part in key.split("."):
            value = value[int(part) if isinstance(value, list) else part]
        assert f"{value:.{len(decimals)}f}" == figure, f"{file}: {key}"


@pytest.mark.parametrize("page", [page for page in pages() if _TABLE.search(page.text)], ids=str)
def test_tables_are_those_of_the_committed_results(page):
    """A comparison's table stands between comments, the first of which names its results."""
    for file, found in _TABLE.findall(page.text):
        assert found == render(RESULTS / file, form="markdown").strip()
