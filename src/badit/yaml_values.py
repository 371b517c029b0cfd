"""YAML as people write it in recipes: 5e-4 is a number, and a task's number such as 073 stays what it is.

Only plain values are read: no tag makes a Python object, a key stands once, and aliases do not multiply what is there.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from badit.errors import BaditError

# A recipe has some hundred values. With aliases of aliases, a text of a few lines can stand for billions.
MAX_VALUES = 100_000
MAX_CHARACTERS = 1_000_000


def parse_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML text; ``where`` opens the error message.

    Raises:
        BaditError: it is not YAML, has a key twice, or has more than ``MAX_CHARACTERS`` or comes to more than
            ``MAX_VALUES`` values.
    """
    if len(text) > MAX_CHARACTERS:
        raise BaditError(f"{where!s:.120}: has more than {MAX_CHARACTERS:,} characters; write out what is needed")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        # YAML 1.1 reads 5e-4 (no dot) as text, which is the form everybody writes.
        return _numbers(loader.construct_document(node))
    except _RefusedError as refused:
        raise BaditError(f"{where!s:.120}{_place(refused.mark)}: {refused.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError, AttributeError) as error:
        # Besides PyYAML's own errors: what its constructors let through, for a date or a number that there is not.
        place = _place(getattr(error, "problem_mark", None))
        raise BaditError(f"{where!s:.120}{place}: is not valid YAML") from None
    finally:
        if loader is not None:
            loader.dispose()


class _RefusedError(Exception):
    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.problem, self.mark = problem, mark


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads a task's number such as 073 as octal, which is 59. Here a leading zero makes it text."""


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    return node.value if re.fullmatch(r"[+-]?0[\d_]+", node.value) else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _place(mark: Any) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node comes to when every alias is written out; ``known`` has those of the nodes seen.

    Raises:
        _RefusedError: too many, a value within itself, or a mapping with the same key twice.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise _RefusedError("an alias stands for the value that it is in; write the value out", node.start_mark)
        return count
    known[id(node)] = None
    count = 1
    for part in node.value:
        count += sum(_count(each, known) for each in (part if isinstance(part, tuple) else (part,)))
        if count > MAX_VALUES:
            raise _RefusedError(f"comes to more than {MAX_VALUES:,} values; write out what is needed", node.start_mark)
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node)
    known[id(node)] = count
    return count


def _refuse_repeated(node: yaml.MappingNode) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _RefusedError(f"the key {key.value!r:.60} is there twice; keep one", key.start_mark)
            seen.add((key.tag, key.value))


def _numbers(value: Any) -> Any:
    """The value with numbers such as 5e-4 as numbers.

    Raises:
        UnicodeEncodeError: half a surrogate pair, which no file can hold.
    """
    if isinstance(value, str):
        value.encode()
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return value
