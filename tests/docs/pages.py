"""The pages of the documentation, and the code and commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Page:
    """A Markdown page or a recipe, given by its path in the repository."""

    path: str

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text()

    def blocks(self, language: str) -> list[str]:
        """Returns the page's fenced code blocks of a language."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, flags=re.DOTALL | re.MULTILINE)

    def commands(self) -> list[list[str]]:
        """Returns the arguments of the ``badit`` commands in shell blocks or comments."""
        blocks = self.blocks("sh")
        if self.path.endswith(".yaml"):
            header = "\n".join(re.findall(r"^# *(.*)", self.text, flags=re.MULTILINE))
            blocks = [
                re.sub(r" {2,}.*", "", header)
            ]  # two or more spaces separate a command from its explanation
        parsed = []
        for block in blocks:
            # A statement continues after a backslash or within quotes.
            for statement in re.findall(r'(?:"[^"]*"|\\\n|[^"\n])+', block):
                # Remove a launcher and its arguments.
                statement = re.sub(
                    r"^(?:accelerate launch|torchrun) .*?-m badit ", "badit ", statement
                )
                if statement.startswith("badit "):
                    words = shlex.split(statement.replace("\\\n", "\n"), comments=True)
                    parsed.append(words[1:])
        return parsed

    def __str__(self) -> str:
        return self.path


def pages(*patterns: str) -> list[Page]:
    """Returns the pages that match the patterns (default: all Markdown pages for users)."""
    files = [
        file
        for pattern in patterns or ("*.md", "docs/*.md", "recipes/README.md")
        for file in ROOT.glob(pattern)
    ]
    return [Page(str(file.relative_to(ROOT))) for file in sorted(files)]
