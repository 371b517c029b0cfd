"""Renders sections as one HTML file that needs nothing else, and exports figures as SVG and PDF.

The template escapes all text, and the JSON blocks with the charts' data contain no "<". The page's
content security policy allows only the two scripts whose hashes it lists, and no network requests.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from badit import __version__
from badit.report.blocks import Block
from badit.report.charts import short_task_names
from badit.report.theme import chart_config
from badit.support.errors import explained
from badit.support.files import read_text, write_bytes

_TEMPLATES = Path(__file__).with_name("templates")
_VEGA_LITE = alt.SCHEMA_VERSION.rpartition(".")[0]  # such as v6.4
_EXPORTED_WIDTHS = {"full": 520, "half": 340, "square": 400}  # in pixels of 1/72 inch


def render(title: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """Returns the page's HTML."""
    templates = Environment(
        loader=PackageLoader("badit.report"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Words may be wrapped; numbers with their intervals may not.
    templates.tests["has_words"] = _has_words
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    scripts = [_library(), read_text(_TEMPLATES / "page.js")]
    style = read_text(_TEMPLATES / "look.css") + read_text(_TEMPLATES / "page.css")
    return templates.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        version=__version__,
        hashes=[_hash(script) for script in scripts],
        # Files of the package, which must not be escaped; all text of runs is.
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        themes={"light": chart_config("light"), "dark": chart_config("dark")},
        short_names=short_task_names,
        worded_columns=_worded_columns,
    )


def _has_words(text: str) -> bool:
    return re.search(r"[^\W\d_]{2}", text) is not None


def _worded_columns(frame: pd.DataFrame) -> list[str]:
    """Returns the columns with words in any row, which are aligned on the left with their title."""
    worded = [frame.iloc[:, index].map(_has_words).any() for index in range(frame.shape[1])]
    return [str(name) for name, has_words in zip(frame.columns, worded, strict=True) if has_words]


def _hash(script: str) -> str:
    """Returns a script's SHA-256 as in a content security policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", _VEGA_LITE)
    # Within a script element, the HTML parser would take these for markup.
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def export_figures(sections: Mapping[str, Sequence[Block]], folder: Path) -> None:
    """Writes NAME.svg and NAME.pdf for every figure, with the page's initial choices, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    config = chart_config("light")
    config["font"] = "Helvetica, Arial, sans-serif"
    config["background"] = "white"
    for blocks in sections.values():
        for block in blocks:
            if block.kind != "figure":
                continue
            chart = {**block.specification, "width": _EXPORTED_WIDTHS[block.width]}
            path = folder / block.name
            # Vega cannot draw some names, such as "constructor".
            with explained(path, action="drawn", any_error=True):
                # allowed_base_urls: a chart must not load anything from the network.
                svg = vl_convert.vegalite_to_svg(
                    chart, vl_version=_VEGA_LITE, config=config, allowed_base_urls=[]
                )
            # A name may contain a dot, so a suffix is added and not replaced.
            write_bytes(folder / f"{block.name}.svg", svg.encode())
            write_bytes(folder / f"{block.name}.pdf", vl_convert.svg_to_pdf(svg))
