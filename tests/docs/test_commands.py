"""Every command of the documentation against the real argument parser, and what it names against the project."""

import re
import tomllib

import pytest
import yaml

from badit.cli import app
from badit.methods import build_method
from badit.recipe import build_recipe, load_recipe
from docs.pages import ROOT, pages, recipes

WITH_COMMANDS = [page for page in [*pages(), *recipes()] if page.commands()]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=str)
def test_every_command_is_one(page):
    assert sum(len(each.commands()) for each in WITH_COMMANDS) > 40
    for arguments in page.commands():
        _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        given = bound.arguments
        if str(given.get("recipe", "")).startswith("recipes/"):
            build_method(load_recipe(ROOT / given["recipe"], given.get("overrides", ())).method)


@pytest.mark.parametrize("page", pages(), ids=str)
def test_what_is_called_in_a_sentence_exists(page):
    # Code between backticks may go over a line's end.
    spans = [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page.text, flags=re.S))
    ]
    verbs = [span.split()[1] for span in spans if re.match(r"badit [a-z]", span)]
    assert set(verbs) <= set(app)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^|; )make ([a-z][a-z-]*)", page.text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"(?:badit|\.)\[([\w,]+)\]['`]", page.text):
        assert set(named.split(",")) <= set(extras)
    for script in re.findall(r"python (\S+\.py)", page.text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", [page for page in pages() if page.blocks("yaml")], ids=str)
def test_every_block_of_yaml_is_a_recipe(page):
    for block in page.blocks("yaml"):
        content = yaml.safe_load(block)
        content.pop("extends", None)
        recipe = build_recipe(content)
        compared = recipe.compare.methods.values() if recipe.compare else ()
        for section in [recipe.method, *(entry.model_extra or {} for entry in compared)]:
            build_method(section)
