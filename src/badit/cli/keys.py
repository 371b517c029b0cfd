"""``badit keys``."""

import json

from badit.cli.app import app, load
from badit.support.errors import BaditError


@app.command
def keys(prefix: str = "", *, schema: bool = False) -> str:
    """Print every key of a recipe, with its default and meaning.

    Args:
        prefix: print only the keys that start with this, such as training or method.r.
        schema: print a JSON schema of all keys, for editors, instead.
    """
    authoring = load("badit.authoring.keys")
    if schema:
        return json.dumps(authoring.schema(), indent=2, ensure_ascii=False)
    rows = [row for row in authoring.recipe_keys() if row[0].startswith(prefix)]
    if not rows:
        fix = "list them all with: badit keys"
        raise BaditError(f"{prefix!r:.60}: no recipe key starts with this; {fix}")
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"{key:{width}}  {default:16}  {text}" for key, default, text in rows)
