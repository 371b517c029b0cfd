"""Reads and writes plain YAML.

Tags create no Python objects, duplicate keys are refused, and alias expansion is limited.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from badit.support.errors import BaditError, first_line

# A recipe has a few hundred values. With nested aliases, a few lines can expand to billions.
MAX_VALUES = 100_000
MAX_CHARACTERS = 200_000  # YAML is read at about 50,000 characters per second
MAX_DIGITS = 100
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}


def parse_yaml(text: str, *, where: str | Path) -> Any:
    """Returns the value of a YAML text; error messages start with ``where``."""
    place = f"{where!s:.120}"
    if len(text) > MAX_CHARACTERS:
        raise BaditError(f"{place}: has more than {MAX_CHARACTERS:,} characters; shorten it")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        # Aliases still share their node, so counting can stop before they are expanded.
        _count_values(node, MAX_VALUES)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        problem = error.problem or first_line(error)
        if error.problem_mark is not None:
            place += f", line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    # PyYAML's constructors raise the others for invalid dates and numbers.
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        OverflowError,
        TypeError,
        AttributeError,
    ) as error:
        problem = first_line(error)
    raise BaditError(f"{place}: cannot be read as YAML ({problem:.200})")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 5e-4 is a number, and dates and 073 (a task number) are strings."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError):
            tag = node.tag.replace(_TAG, "!!")
            raise _refusal(node, f"{node.value!r:.60} is not a valid {tag}") from None


class _Dumper(yaml.SafeDumper):
    """Quotes strings that :class:`_Loader` would read as numbers, such as 1234e56 (a revision)."""


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    if len(node.value) > MAX_DIGITS:
        raise _refusal(node, f"a number of more than {MAX_DIGITS} digits; shorten it")
    if re.fullmatch(r"[+-]?0[\d_]+", node.value):
        return node.value
    return loader.construct_yaml_int(node)


_Loader.add_constructor(f"{_TAG}int", _whole_number)
# YAML 1.1 requires a dot in a float, so PyYAML reads 5e-4 as a string.
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$")
for _class in (_Loader, _Dumper):
    # PyYAML selects the patterns to try by the first character of a value.
    _class.add_implicit_resolver(f"{_TAG}float", _EXPONENT, list("+-0123456789"))

# Constructing a date would fail for some of them, and no key takes one.
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != f"{_TAG}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}

#: Returns a value as YAML that :func:`parse_yaml` reads as the same value.
to_yaml = partial(yaml.dump, Dumper=_Dumper, allow_unicode=True)


def _refusal(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _count_values(node: yaml.Node, remaining: int, key_path: str = "") -> int:
    """Returns ``remaining`` minus the number of values in a node, with all aliases expanded.

    Raises MarkedYAMLError for too many values, for one that is not plain, and for a key that is
    there twice.
    """
    if node.tag not in _PLAIN:
        place = f"{key_path}: " if key_path else ""
        tag = node.tag.replace(_TAG, "!!")
        raise _refusal(node, f"{place}the tag {tag:.60}: use a plain value")
    if remaining <= 0:
        raise _refusal(
            node, f"more than {MAX_VALUES:,} values, with all aliases expanded; remove some"
        )
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # raises for a lone surrogate, which UTF-8 cannot encode
        return remaining - 1
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            remaining = _count_values(item, remaining, key_path)
        return remaining - 1

    # PyYAML keeps the last of repeated keys. With the tag, because 1 and "1" are two keys.
    seen_keys: set[tuple[str, str]] = set()
    for key, value in node.value:
        name = "?"
        if isinstance(key, yaml.ScalarNode):
            name = key.value
            if (key.tag, key.value) in seen_keys:
                raise _refusal(key, f"the key {key.value!r:.60} is there twice; keep one")
            seen_keys.add((key.tag, key.value))
        remaining = _count_values(key, remaining, key_path)
        remaining = _count_values(value, remaining, f"{key_path}.{name:.60}".lstrip("."))
    return remaining - 1
