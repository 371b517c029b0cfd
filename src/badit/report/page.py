"""From a report's sections to one HTML file that needs nothing else: no network, no other file.

All text is escaped by the template; the charts' data stand in JSON blocks without a single "<". On top of that, the
page's policy lets only the two scripts run whose hashes it names, and nothing be fetched: were markup to slip through
from a model's answer, it could neither run nor send anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib import resources
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from badit import __version__
from badit.report.blocks import Figure, Section
from badit.report.theme import chart_config

# What Vega-Lite knows the charts by, such as 6.4.
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])

_templates = Environment(
    loader=PackageLoader("badit.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(title: str, sections: Sequence[Section]) -> str:
    """The page."""
    scripts = [_library(), _resource("page.js")]
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return _templates.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        version=__version__,
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        style=Markup(_resource("look.css") + _resource("page.css")),
        scripts=[Markup(script) for script in scripts],
        themes=_embedded({"light": chart_config("light"), "dark": chart_config("dark")}),
        specification=lambda figure: _embedded(specification(figure)),
        mark={"right": "✓", "partly right": "≈", "wrong": "✗"},
    )


def specification(figure: Figure) -> dict[str, Any]:
    """A figure's Vega-Lite: what it shows is read out by its description, and the colours are the page's to choose."""
    content = figure.chart.to_dict(validate=False)
    content.pop("config", None)
    content.pop("$schema", None)
    return {**content, "autosize": {"type": "fit-x", "contains": "padding"}, "description": figure.alt}


def _embedded(value: Mapping[str, Any]) -> Markup:
    """JSON for a script element, in which no text can end the element."""
    return htmlsafe_json_dumps(value, dumps=partial(json.dumps, separators=(",", ":"), allow_nan=False))


def _resource(name: str) -> str:
    return (resources.files("badit.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
