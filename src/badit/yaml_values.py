"""YAML as people write it in recipes: 5e-4 is a number, and a task's number such as 073 stays what it is.

Only plain values are read: no tag makes a Python object, a key stands once, and aliases do not multiply what is there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from badit.errors import BaditError

# A recipe has some hundred values. With aliases of aliases, a text of a few lines can stand for billions.
MAX_VALUES = 100_000
MAX_CHARACTERS = 1_000_000
MAX_DIGITS = 100


def parse_yaml(text: str, *, where: str | Path) -> Any:
    """The value of a YAML text; ``where`` opens the error message.

    Raises:
        BaditError: it is not YAML, has a key twice, or has more than ``MAX_CHARACTERS`` or comes to more than
            ``MAX_VALUES`` values.
    """
    if len(text) > MAX_CHARACTERS:
        raise BaditError(f"{where!s:.120}: has more than {MAX_CHARACTERS:,} characters; write out what is needed")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, MAX_VALUES)
        return loader.construct_document(node)
    except _RefusedError as refused:
        mark, problem = refused.args
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError, AttributeError) as error:
        # Besides PyYAML's own errors: what its constructors let through, for a date or a number that there is not.
        mark, problem = getattr(error, "problem_mark", None), "is not valid YAML"
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    raise BaditError(f"{where!s:.120}{place}: {problem}")


class _RefusedError(Exception):
    """Raised with a place in the text, and what is wrong there."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 5e-4 is a number without a dot as well, and that a leading zero makes a number text.

    By the standard a task's number such as 073 is octal, which is 59.
    """


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    if len(node.value) > MAX_DIGITS:
        raise _RefusedError(node.start_mark, f"has a number of more than {MAX_DIGITS} digits; shorten it")
    return node.value if re.fullmatch(r"[+-]?0[\d_]+", node.value) else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$"), list("+-0123456789")
)


def _count(node: yaml.Node, left: int) -> int:
    """``left`` less the number of values of a node with every alias written out; repeated keys are refused."""
    if left <= 0:
        raise _RefusedError(node.start_mark, f"comes to more than {MAX_VALUES:,} values; write out what is needed")
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # raises for half a surrogate pair, which no file can hold
        return left - 1
    for part in node.value:
        for inner in part if isinstance(part, tuple) else (part,):
            left = _count(inner, left)
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise _RefusedError(key.start_mark, f"the key {key.value!r:.60} is there twice; keep one")
            seen.add((key.tag, key.value))
    return left - 1
