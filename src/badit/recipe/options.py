"""The options of all methods, from a committed table, and the checks of a ``method`` section.

The classes that define the options need torch and PEFT, whose import takes seconds.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, Strict

from badit import presets
from badit.support.errors import BaditError, check, nearest
from badit.support.files import read_text

#: Written by badit.authoring.method_table. A test compares it with the classes.
METHOD_TABLE = Path(__file__).with_name("method_table.json")
# The types of a JSON schema. Numbers are strict, because "8" and true are no numbers.
_KINDS: Mapping[str, Any] = {
    "string": str,
    "integer": Annotated[int, Strict()],
    "number": Annotated[float, Strict()],
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": None,
}
_LIMITS = {"minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le", "exclusiveMaximum": "lt"}


@cache
def read_method_table() -> dict[str, Any]:
    """Returns the ``names`` of all methods, and all ``options`` with their methods.

    ``fixed`` are the options that a method's name sets, and ``need_task`` are the methods that need
    the task of every row. ``of_other_releases`` are names of options that only other releases of
    ``peft`` have.
    """
    return json.loads(read_text(METHOD_TABLE))


def refuse_method(section: Mapping[str, Any]) -> None:
    """Raises BaditError for an unknown name or option of a method, or a value of another type.

    Limits that depend on other options, and the values of PEFT's own options, are not checked.
    """
    table = read_method_table()
    names = table["names"]
    name = section.get("name", "badit")
    if name not in names:
        hint = f"{nearest(name, names)}; known: {', '.join(names)}"
        raise BaditError(f"method.name: unknown method {name!r:.60}{hint}")
    fixed = table["fixed"].get(name, {})
    options = {key: value for key, value in section.items() if key != "name"}
    # Another value would make it another method, as use_dora: false with the name dora.
    for key in options.keys() & fixed.keys():
        problem = f"is set by the method name {name} (to {fixed[key]}); delete it"
        raise BaditError(f"method.{key}: {problem}")
    if name in presets.NAMES:
        _refuse_preset(name, options)
    known = {option["key"]: option for option in table["options"] if name in option["methods"]}
    refuse_unknown_options(name, options, [*known, *table["of_other_releases"]])
    _refuse_options_of_peft(options)
    _check_values(options, known)


def refuse_unknown_options(
    name: str, options: Mapping[str, Any], known: Sequence[str], place: str = "method"
) -> None:
    """Raises BaditError for an option that a method does not have."""
    for key in options:
        if key not in known:
            hint = f"{nearest(key, known)}; see: badit keys method"
            raise BaditError(f"{place}.{key}: {name} has no such option{hint}")


def _refuse_preset(name: str, options: Mapping[str, Any]) -> None:
    preset = options.get("preset", "default")
    if name != "badit" and "preset" in options:
        raise BaditError(f"method.preset: {name} is a preset itself; delete it")
    if preset == "paper":
        raise BaditError("method.preset: 'paper' is called 'released' now; rename it")
    if preset not in ("default", "released"):
        raise BaditError(f"method.preset: must be default or released, got {preset!r:.60}")


def _refuse_options_of_peft(options: Mapping[str, Any]) -> None:
    """Raises BaditError for values that PEFT accepts, but with which a run cannot work."""
    initial = str(options.get("init_lora_weights"))
    if initial.startswith("pissa_niter"):
        problem = "pissa_niter is random, and loading would repeat it; use pissa"
        raise BaditError(f"method.init_lora_weights: {problem}")
    if initial in ("eva", "lora_ga"):
        problem = f"{initial} needs a pass over data; use another value, such as true"
        raise BaditError(f"method.init_lora_weights: {problem}")
    modules_to_save = options.get("modules_to_save")
    if isinstance(modules_to_save, str):  # PEFT would match each of its letters
        form = f"must be a list, such as [{modules_to_save:.60}]"
        raise BaditError(f"method.modules_to_save: {form}")
    if modules_to_save and options.get("ensure_weight_tying"):  # PEFT would change the list
        fix = "cannot be used with modules_to_save; name all modules there"
        raise BaditError(f"method.ensure_weight_tying: {fix}")


def _check_values(
    options: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], prefix: str = ""
) -> None:
    for key, value in options.items():
        option = known.get(f"{prefix}{key}", {})
        if "type" in option:
            check(f"method.{prefix}{key}", value, _kind_of(option["type"]))
        elif key == "regroup" and isinstance(value, Mapping):
            _check_values(value, known, "regroup.")


def _kind_of(schema: Mapping[str, Any]) -> Any:
    """Returns the type of a JSON schema."""
    if "anyOf" in schema:
        return Union[tuple(map(_kind_of, schema["anyOf"]))]  # noqa: UP007 (built from a list)
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    limits: dict[str, Any] = {
        _LIMITS[key]: value for key, value in schema.items() if key in _LIMITS
    }
    kind = _KINDS[schema["type"]]
    return Annotated[kind, Field(**limits)] if limits else kind
