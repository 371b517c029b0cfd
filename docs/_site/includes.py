"""Parts of pages that come from elsewhere in the repository, so that they cannot go stale. A comment names each:

<!-- code: src/badit/method/routing.py expert_gates -->     a function, class or Class.method from the source
<!-- beginning: README.md -->                               a page up to its first section
<!-- options: badit.BaditConfig -->                         a configuration's options as a table
<!-- options: badit.baselines.GoatConfig badit.tuner.config.ExpertConfig -->    those that differ from the other's
"""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
import warnings
from collections.abc import Iterator
from importlib import import_module
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from links import ROOT, moved
from mkdocs.exceptions import PluginError

from badit.cli import quiet_libraries

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
        found = next((node for node in found.body if isinstance(node, kinds) and node.name == part), None)
        if found is None:
            raise PluginError(f"{path} has no {name}")
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    lines = textwrap.dedent("\n".join(source.splitlines()[first - 1 : found.end_lineno]))
    return f'```python title="{path}"\n{lines}\n```'


def beginning(path: str) -> str:
    """A page's text before its first section."""
    return moved((ROOT / path).read_text().split("\n## ")[0], path, "docs/index.md")


def options(name: str, other: str | None = None) -> str:
    """A table of the fields of a dataclass or a pydantic model, but those that ``other`` has alike."""
    known = list(_fields(_imported(other))) if other else []
    fields = [field for field in _fields(_imported(name)) if field not in known]
    rows = [f"| `{option}` | `{_yaml(default)}` | {_cell(text)} |" for option, default, text in fields]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows])


def _imported(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    quiet_libraries()
    with warnings.catch_warnings(action="ignore"):
        return getattr(import_module(module), cls)


def _fields(kind: Any) -> Iterator[tuple[str, Any, str]]:
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            if field.init and "help" in field.metadata and not _inherited_from_peft(field.name):
                yield field.name, field.default, field.metadata["help"]
        return
    for option, field in kind.model_fields.items():
        limits = [f"{word} {getattr(limit, key)}" for limit in field.metadata for key, word in _known_limits(limit)]
        text = ", ".join(filter(None, [_shown(field.annotation), *limits]))
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        yield option, default, "; ".join(filter(None, [text, field.description]))


def _known_limits(limit: Any) -> list[tuple[str, str]]:
    return [(key, word) for key, word in _LIMITS.items() if hasattr(limit, key)]


_LIMITS = {"ge": "at least", "gt": "above", "lt": "below"}
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "values by name",
}


def _inherited_from_peft(name: str) -> bool:
    from peft import PeftConfig

    from badit.tuner.config import FORMAT_FIELD

    return name == FORMAT_FIELD or name in {field.name for field in dataclasses.fields(PeftConfig)}


def _shown(annotation: Any) -> str:
    """A type in words, for those that are no more than a list of values or a plain type."""
    if get_origin(annotation) is Annotated:
        return _shown(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_shown(part) for part in get_args(annotation))
    if annotation is type(None):
        return "null"
    return _WORDS.get(get_origin(annotation) or annotation, "")


def _yaml(value: Any) -> str:
    """A plain value as a recipe has it."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).split("\n")[0]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


_PARTS = {"code": code, "beginning": beginning, "options": options}
