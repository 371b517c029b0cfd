"""The pages of the documentation, and what stands in them: code, commands, links to what the project has."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# As a launcher is called, up to badit's own arguments.
_LAUNCHER = re.compile(r"^(?:accelerate launch|torchrun) .*?-m badit ")


@dataclass(frozen=True)
class Page:
    """A page by its path in the repository."""

    path: str

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text()

    def blocks(self, language: str) -> list[str]:
        """The page's fenced blocks of a language."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, flags=re.DOTALL | re.MULTILINE)

    def commands(self) -> list[list[str]]:
        """The arguments of every ``badit`` that a block of shell commands or a recipe's header calls."""
        found = []
        for block in [*self.blocks("sh"), *re.findall(r"((?:^#.*\n)+)", self.text if self.is_recipe else "", re.M)]:
            text = re.sub(r"^# *", "", block, flags=re.MULTILINE) if self.is_recipe else block
            for statement in _statements(text):
                statement = _LAUNCHER.sub("badit ", statement)
                if statement.startswith("badit "):
                    # In a recipe's header two spaces or more set what a command does apart from it.
                    statement = re.split(r" {2,}", statement)[0] if self.is_recipe else statement
                    found.append(shlex.split(statement, comments=True)[1:])
        return found

    @property
    def is_recipe(self) -> bool:
        return self.path.endswith(".yaml")

    def __str__(self) -> str:
        return self.path


def _statements(block: str) -> list[str]:
    """The lines of a block, joined where a backslash or an open quote says that a statement goes on."""
    statements: list[str] = []
    for line in block.splitlines():
        if statements and (statements[-1].endswith("\\") or statements[-1].count('"') % 2):
            statements[-1] = statements[-1].removesuffix("\\") + "\n" + line
        else:
            statements.append(line)
    return statements


def pages() -> list[Page]:
    """All pages of Markdown that users read."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "README.md"]
    return [Page(str(file.relative_to(ROOT))) for file in sorted(files)]


def recipes() -> list[Page]:
    """All recipes, whose headers have commands."""
    return [Page(str(file.relative_to(ROOT))) for file in sorted((ROOT / "recipes").glob("**/*.yaml"))]
