"""Limits on the size of the source and the tests. The goal is 12,000 lines of source.

Lower the limits with every simplification; explain every higher limit in docs/LOG.md.
"""

from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SOURCE_LINES, SOURCE_MODULES, MODULE_LINES = 15_025, 71, 500
TEST_LINES = 16_000


def lines(folder: Path) -> dict[str, int]:
    return {str(file): len(file.read_text().splitlines()) for file in folder.rglob("*.py")}


def test_source_is_within_its_budget() -> None:
    sizes = lines(ROOT / "src" / "badit")
    assert sum(sizes.values()) <= SOURCE_LINES
    assert len(sizes) <= SOURCE_MODULES
    assert {file: size for file, size in sizes.items() if size > MODULE_LINES} == {}
    assert 80 <= median(sizes.values()) <= 250


def test_tests_are_within_their_budget() -> None:
    assert sum(lines(ROOT / "tests").values()) <= TEST_LINES
