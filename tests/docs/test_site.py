"""The site builds without warnings, so all links and anchors are valid, and it needs no network."""

import os
import re
import subprocess
import sys
from html import unescape

import pytest

import badit
from docs.pages import ROOT, Page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_loads_nothing_from_the_network(site):
    for file in site.glob("**/*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", file.read_text())
        assert [
            tag for tag in tags if re.search(r"""(?:src|href)=["'](?:https?:)?//""", tag)
        ] == [], file
    for file in site.glob("**/*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", file.read_text()), file


def test_formulas_are_mathml(site):
    for page in ("method", "benchmark", "serving"):
        formulas = re.findall(
            r"<math .*?</math>", (site / f"{page}.html").read_text(), flags=re.DOTALL
        )
        assert len(formulas) == len(Page(f"docs/{page}.md").blocks("math")) > 0
        for formula in formulas:
            # The converter leaves unknown TeX in the text.
            assert not set("\\&") & set(unescape(re.sub(r"<[^>]+>", "", formula))), formula


def test_code_options_and_recipes_are_included_from_the_source(site):
    assert "def expert_gates(" in re.sub(r"<[^>]+>", "", (site / "method.html").read_text())
    options = (site / "options.html").read_text()
    assert all(
        f"<code>{name}</code>" in options
        for name in ("num_experts", "rho", "gradient_accumulation_steps")
    )
    assert (site / "source" / "recipes" / "own-tasks.yaml.html").is_file()
    assert 'href="source/recipes/own-tasks.yaml.html"' in (site / "recipes.html").read_text()


def test_api_page_lists_all_public_names():
    described = re.findall(r"^::: badit\.(\w+)$", Page("docs/api.md").text, flags=re.MULTILINE)
    assert set(described) == set(badit.__all__) - {"__version__"}
