"""Checks the documentation against the code: commands, recipes, numbers, tables, messages."""

import ast
import json
import re
import runpy
import tomllib

import pytest
import yaml

from badit.cli.app import app
from badit.recipe.loading import build_recipe, load_recipe
from docs.pages import RESULTS, ROOT, Page, pages
from steps import method_of

WITH_COMMANDS = [page for page in [*pages(), *pages("recipes/**/*.yaml")] if page.commands()]
_NUMBER = re.compile(r"(\d+\.(\d+))<!-- ([\w/.-]+):([^>]+?) -->")
TABLES = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
FIGURE = runpy.run_path(str(ROOT / "benchmarks" / "figure.py"))
EXPERIMENTS = pages("benchmarks/experiments/*.md")
WITH_TABLES = [
    # The tables of the experiments take minutes.
    pytest.param(page, marks=[pytest.mark.slow] if page in EXPERIMENTS else [])
    for page in [*pages(), *EXPERIMENTS]
    if TABLES["TABLE"].search(page.text)
]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=str)
def test_commands_parse_and_their_recipes_are_valid(page):
    for arguments in page.commands():
        _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        values = bound.arguments
        if str(values.get("recipe", "")).startswith("recipes/"):
            method_of(load_recipe(ROOT / values["recipe"], values.get("overrides", ())).method)


@pytest.mark.parametrize("page", pages(), ids=str)
def test_mentioned_commands_make_targets_extras_and_scripts_exist(page):
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page.text, flags=re.S))
    verbs = [
        span.split()[1] for span in spans if re.match(r"\s*badit\s+[a-z]", span)
    ]  # may contain a line break
    assert set(verbs) <= set(app)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^|; )make ([a-z][a-z-]*)", page.text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for named in re.findall(r"(?:badit|\.)\[([\w,]+)\]['`]", page.text):
        assert set(named.split(",")) <= set(extras)
    for script in re.findall(r"python (\S+\.py)", page.text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", [page for page in pages() if page.blocks("yaml")], ids=str)
def test_yaml_blocks_are_valid_recipes(page):
    for block in page.blocks("yaml"):
        content = yaml.safe_load(block)
        content.pop("extends", None)
        recipe = build_recipe(content)
        compared = recipe.compare.methods.values() if recipe.compare else ()
        for section in [recipe.method, *(entry.model_extra or {} for entry in compared)]:
            method_of(section)


@pytest.mark.parametrize(
    "page", [page for page in [*pages(), *EXPERIMENTS] if _NUMBER.search(page.text)], ids=str
)
def test_quoted_numbers_match_the_committed_results(page):
    """A number quoted from a results file is followed by a comment with the file and the key."""
    for figure, decimals, file, key in _NUMBER.findall(page.text):
        value = json.loads((RESULTS / file).read_text())
        for part in key.split("."):
            value = value[int(part) if isinstance(value, list) else part]
        assert f"{value:.{len(decimals)}f}" == figure, f"{file}: {key}"


@pytest.mark.parametrize("page", WITH_TABLES, ids=str)
def test_tables_match_the_committed_results(page):
    assert TABLES["render"](page.text) == page.text


def test_figure_has_the_committed_results():
    drawn = re.findall(r'aria-label="mean: ([^;]+); method: ([^"]+)"', FIGURE["FIGURE"].read_text())
    numbers = [(name, float(value.replace("−", "-"))) for value, name in drawn]
    frames = [FIGURE["differences"](score) for score in FIGURE["TITLES"]]
    expected = [
        pair for frame in frames for pair in zip(frame["method"], frame["mean"], strict=True)
    ]
    assert numbers == [(name, pytest.approx(value)) for name, value in expected]


def test_test_files_of_the_promises_exist():
    named = re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)[`:]", Page("docs/reliability.md").text)
    assert named
    folders = (ROOT, ROOT / "tests" / "training")
    assert [
        name for name in named if not any((folder / name).is_file() for folder in folders)
    ] == []


def test_quoted_messages_are_in_the_source():
    quoted = re.findall(
        r"^### `([^`]+)`$", Page("docs/troubleshooting.md").text, flags=re.MULTILINE
    )
    assert quoted
    nodes = [
        node
        for file in (ROOT / "src").glob("**/*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    messages = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    filled = [
        node.values for node in nodes if isinstance(node, ast.JoinedStr)
    ]  # … stands for a placeholder
    messages += [
        "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in each)
        for each in filled
    ]
    pattern = {text: re.escape(text).replace("…", ".*….*") for text in quoted}
    assert [
        text
        for text in quoted
        if not any(re.search(pattern[text], message, re.DOTALL) for message in messages)
    ] == []
