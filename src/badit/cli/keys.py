"""``badit keys``."""

import json

from badit.cli.app import app, load


@app.command
def keys(prefix: str = "", /, *, schema: bool = False) -> str:
    """Print every key of a recipe, with its default and meaning.

    Args:
        prefix: print only the keys that start with this, such as training or method.r; if there
            are none, those with this text in their names or meanings.
        schema: print a JSON schema of all keys, for editors, instead.
    """
    authoring = load("badit.authoring.keys")
    if schema:
        return json.dumps(authoring.schema(), indent=2, ensure_ascii=False)
    rows = authoring.matching_keys(prefix)
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"{key:{width}}  {default:16}  {text}" for key, default, text in rows)
