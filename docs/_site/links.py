"""Links between pages and the repository's other files.

Pages link to files as the repository has them, so that the links work there. In the site, a page
that stands outside ``docs`` has a place of its own, and any other file is shown as a listing.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# path in the repository -> place in the site
STRAY = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "readme.md",
    "SECURITY.md": "security.md",
    "recipes/README.md": "recipes.md",
}
STRAY |= {
    # A page named README would be the index of the section of the navigation that lists it.
    f"benchmarks/experiments/{file.name}": f"experiments/{file.name}".replace("README", "overview")
    for file in sorted((ROOT / "benchmarks" / "experiments").glob("*.md"))
}
_LISTINGS = "source/"
_LINK = re.compile(r"""(?:(?<=\]\()|(?<=src="))([^)"\s#:]+)(?=[)"#])""")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json"}


def stray_pages() -> dict[str, Path]:
    """The place in the site of every page that stands outside ``docs``, and its file."""
    return {place: ROOT / path for path, place in STRAY.items()}


def own_path(place: str) -> str:
    """A page's path in the repository, from its place in the site."""
    return next((path for path, stray in STRAY.items() if stray == place), f"docs/{place}")


def outside(text: str, path: str) -> Iterator[str]:
    """The files that the page at ``path`` links to and that the site shows as listings."""
    for link in _LINK.findall(text):
        target = _target(link, path)
        if _place(target) == _listing(target):
            yield target


def rewritten(text: str, path: str, place: str) -> str:
    """The page's text with links that hold in the site. mkdocs reports those that lead nowhere."""

    def link(match: re.Match[str]) -> str:
        found = _place(_target(match[1], path))
        return (
            match[1] if found is None else posixpath.relpath(found, posixpath.dirname(place) or ".")
        )

    return _LINK.sub(link, text)


def moved(text: str, former: str, path: str) -> str:
    """Text of the page at ``former``, with its links as they must be in the page at ``path``."""
    return _LINK.sub(
        lambda match: posixpath.relpath(_target(match[1], former), posixpath.dirname(path) or "."),
        text,
    )


def file_listing(target: str) -> tuple[str, str]:
    """A file of the repository as a page: its place and its text."""
    content = (ROOT / target).read_text()
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", content)), default=0))
    language = _LANGUAGES.get(Path(target).suffix, "text")
    return _listing(target), f"# {target}\n\n{fence}{language}\n{content.rstrip()}\n{fence}\n"


def is_listing(place: str) -> bool:
    return place.startswith(_LISTINGS)


def _target(link: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _listing(target: str) -> str:
    return f"{_LISTINGS}{target}.md"


def _place(target: str) -> str | None:
    """Where the site has a path of the repository; None if that is no file."""
    if known := STRAY.get(target):
        return known
    file = ROOT / target
    if not file.is_file():
        return None
    if target.startswith("docs/") and file.suffix in (".md", ".svg", ".png"):
        return target.removeprefix("docs/")
    return _listing(target)
