"""YAML as people write it in recipes: 5e-4 is a number, and a task's number such as 073 stays what it is."""

from __future__ import annotations

import re
from typing import Any

import yaml

from badit.errors import BaditError


def parse_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML text; ``where`` opens the error message.

    Raises:
        BaditError: it is not YAML.
    """
    try:
        # YAML 1.1 reads 5e-4 (no dot) as text, which is the form everybody writes.
        return _numbers(yaml.load(text, Loader=_Loader))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BaditError(f"{where!s:.120}{place}: is not valid YAML") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads a task's number such as 073 as octal, which is 59. Here a leading zero makes it text."""


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    return node.value if re.fullmatch(r"[+-]?0[\d_]+", node.value) else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _numbers(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return value
