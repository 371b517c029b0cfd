"""What `mkdocs build` does besides: see links.py, includes.py and formulas.py."""

from __future__ import annotations

import re
from typing import Any

from formulas import formula
from includes import with_includes
from links import file_listing, is_listing, outside, own_path, rewritten, stray_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# Of the pages that stand outside of docs, those in the navigation.
LISTED = {"changelog.md", "contributing.md", "security.md", "recipes.md", "experiments/overview.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fences = [{"name": "math", "class": "formula", "format": formula}]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for place, path in stray_pages().items():
        inclusion = InclusionLevel.UNDEFINED if place in LISTED else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place, abs_src_path=str(path), inclusion=inclusion))
    linked = {
        target
        for file in files.documentation_pages()
        for target in outside(_text(file), own_path(file.src_uri))
    }
    for target in sorted(linked):
        place, content = file_listing(target)
        files.append(
            File.generated(config, place, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    place = page.file.src_uri
    return (
        markdown
        if is_listing(place)
        else rewritten(with_includes(markdown), own_path(place), place)
    )


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name functions as Sphinx has it, :func:`name`; here the name alone is shown."""
    return re.sub(r":(?:class|func|meth|mod):(?=<code>)", "", html)


def _text(file: File) -> str:
    return with_includes(file.content_string)
