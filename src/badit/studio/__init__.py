"""``badit studio``: a page on this machine to try a run's adapter on."""

from __future__ import annotations

from importlib.util import find_spec

from badit.errors import BaditError


def refuse_without_extra() -> None:
    """Raises BaditError where the libraries of the extra are not installed."""
    if any(find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise BaditError("the studio needs its extra: pip install 'badit[studio]'")
