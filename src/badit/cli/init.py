"""``badit init``."""

import shlex
from pathlib import Path

from badit.cli.app import Output, app, load, refuse_missing_data
from badit.support.errors import BaditError
from badit.support.files import write_text


@app.command
def init(data: str = "builtin", /, *overrides: str, output: Output = "recipe.yaml") -> str:
    """Write a first recipe for your data, with comments.

    Args:
        data: the recipe's data.source: a file, a folder, a dataset on the hub or 'builtin'.
        overrides: data keys that are needed to read the data, such as data.columns.input=text.
        output: the recipe's file, which must not exist yet.
    """
    path = Path(output)
    if path.exists():
        raise BaditError(f"{output}: already exists; choose another --output")
    refuse_missing_data(data)
    recipe = load("badit.authoring.first_recipe").first_recipe(data, output, overrides)
    write_text(path, recipe.text)
    next_line = f"Next: badit train {shlex.quote(output)} --dry-run"
    return "\n".join([f"Recipe: {output}", *recipe.found, next_line])
