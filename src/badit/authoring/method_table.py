"""The table of all methods' options, from the classes that define them.

``badit keys`` and the check of a recipe's keys read the committed copy, because the classes need
torch and PEFT, whose import takes seconds. ``python -m badit.authoring.method_table`` writes it
again after a change of an option.
"""

import json
from importlib.metadata import version
from typing import Any

from badit.authoring.keys import as_yaml
from badit.recipe.method import KINDS, NAMES, option_types, options_of
from badit.recipe.options import METHOD_TABLE, read_method_table
from badit.support.files import write_text


def present_table() -> dict[str, Any]:
    """Returns the table of the installed releases, in the form of :func:`read_method_table`."""
    methods: dict[tuple[str, str, str, str], list[str]] = {}
    for name in NAMES:
        types = option_types(name)
        for key, default, text in options_of(name):
            # Methods that share an option with its default and type share an entry.
            kind = json.dumps(types[key]) if key in types else ""
            option = (key, as_yaml(default), kind, " ".join(text.split()))
            methods.setdefault(option, []).append(name)
    options = []
    for (key, default, kind, text), names in methods.items():
        option = {"key": key, "default": default, "methods": names, "text": text}
        if kind:
            option["type"] = json.loads(kind)
        options.append(option)
    kinds = KINDS.items()
    return {
        "peft": version("peft"),
        "names": NAMES,
        "fixed": {name: dict(kind.fixed) for name, kind in kinds if kind.fixed},
        "need_task": [
            name for name, kind in kinds if getattr(kind.config_class, "needs_tasks", False)
        ],
        "options": options,
    }


def write_table() -> None:
    """Writes the committed table; names that only other releases of PEFT have stay."""
    former = read_method_table()
    table = present_table()
    known = {option["key"] for option in table["options"]}
    names = {option["key"] for option in former["options"]} | {*former["of_other_releases"]}
    table["of_other_releases"] = sorted(names - known)
    write_text(METHOD_TABLE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_table()
