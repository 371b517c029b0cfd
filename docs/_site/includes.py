"""Parts of pages that come from elsewhere in the repository. A comment names each:

<!-- code: src/badit/method/routing.py expert_gates -->   a function, class or Class.method
<!-- beginning: README.md -->                               a page up to its first section
<!-- options: badit.BaditConfig -->                         a configuration's options as a table
<!-- options: badit.baselines.GoatConfig badit.tuner.config.ExpertConfig -->   those that differ
"""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from links import ROOT, moved
from mkdocs.exceptions import PluginError

from badit.cli.entry import quiet_libraries

_COMMENT = re.compile(r"<!-- (code|beginning|options): (.+?) -->")


def with_includes(text: str) -> str:
    """A page's text with all of its comments replaced by what they name."""
    return _COMMENT.sub(lambda match: _PARTS[match[1]](*match[2].split()), text)


def code(path: str, name: str) -> str:
    """The source of a function, a class or, as ``Class.method``, a method of a file."""
    source = (ROOT / path).read_text()
    found: Any = ast.parse(source)
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        found = next(
            (node for node in found.body if isinstance(node, kinds) and node.name == part), None
        )
        if found is None:
            raise PluginError(f"{path} has no {name}")
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    lines = textwrap.dedent("\n".join(source.splitlines()[first - 1 : found.end_lineno]))
    return f'```python title="{path}"\n{lines}\n```'


def beginning(path: str) -> str:
    """A page's text before its first section."""
    return moved((ROOT / path).read_text().split("\n## ")[0], path, "docs/index.md")


def options(name: str, other: str | None = None) -> str:
    """A table of the fields of a dataclass or pydantic model that differ from ``other``'s."""
    from badit.authoring.keys import as_yaml

    known = list(_fields(_imported(other))) if other else []
    fields = [field for field in _fields(_imported(name)) if field not in known]
    rows = [
        f"| `{option}` | `{as_yaml(default)}` | {_cell(text)} |" for option, default, text in fields
    ]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows])


def _imported(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    quiet_libraries()
    with warnings.catch_warnings(action="ignore"):
        return getattr(import_module(module), cls)


def _fields(kind: Any) -> Iterator[tuple[str, Any, str]]:
    from badit.authoring.keys import described_section
    from badit.tuner.config import described

    if dataclasses.is_dataclass(kind):
        yield from (one for one in described(kind) if not _inherited_from_peft(one[0]))
    else:
        yield from described_section(kind)


def _inherited_from_peft(name: str) -> bool:
    from peft import PeftConfig

    from badit.tuner.config import FORMAT_FIELD

    return name == FORMAT_FIELD or name in {field.name for field in dataclasses.fields(PeftConfig)}


def _cell(text: str) -> str:
    # A cell that ends with braces would be read as a list of attributes.
    return " ".join(text.split()).replace("|", "\\|").replace("{", "&#123;")


_PARTS = {"code": code, "beginning": beginning, "options": options}
