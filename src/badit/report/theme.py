"""The colours of the charts, as Vega-Lite's ``config`` for a light and a dark page.

Charts set no colours: their scales use the ranges "category", "heatmap" and "diverging".
Categories use colours based on Okabe & Ito (2008), which colour-blind people can distinguish,
without yellow on the light page. Magnitudes use cividis (Nuñez et al. 2018, doi
10.1371/journal.pone.0199239), and low values are close to the page's colour. Signed values range
from orange (low) through the page's colour to blue (high).
"""

from typing import Any, Literal

_CIVIDIS = ["#00204d", "#213d6b", "#555b6c", "#7b7a77", "#a59c74", "#d3c064", "#ffe945"]
_RANGES = {
    "light": {
        "category": ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f6368"],
        # Reversed and without its brightest colour: low values are close to the page's colour.
        "heatmap": ["#fdf6d8", *_CIVIDIS[5::-1]],
        "diverging": ["#8f3b00", "#d56a10", "#f3b06b", "#f6f4f0", "#85bbdf", "#2a7ab8", "#08457e"],
    },
    "dark": {
        "category": ["#56b4e9", "#e69f00", "#1fbf92", "#e29bc4", "#f0e442", "#f07a35", "#a8adb3"],
        "heatmap": ["#1d2533", *_CIVIDIS[1:]],
        "diverging": ["#ffc27d", "#e58a34", "#8a4d17", "#22252a", "#275a86", "#4f9ddb", "#a9d8ff"],
    },
}
_INK = {
    "light": {"text": "#1d1f23", "faint": "#5d626b", "line": "#d9d8d3", "empty": "#e9e6df"},
    "dark": {"text": "#e8e6e1", "faint": "#a3a8b0", "line": "#3a3e45", "empty": "#41464f"},
}


def chart_config(mode: Literal["light", "dark"]) -> dict[str, Any]:
    """Returns Vega-Lite's ``config`` for a theme."""
    ink = _INK[mode]
    ranges = _RANGES[mode]
    first_colour = ranges["category"][0]

    text = {
        "labelColor": ink["faint"],
        "titleColor": ink["text"],
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": 500,
    }
    axis = {
        **text,
        "domainColor": ink["line"],
        "gridColor": ink["line"],
        "gridOpacity": 0.6,
        "ticks": False,
        "titlePadding": 10,
        "labelPadding": 6,
        "labelLimit": 150,
    }
    legend = {
        **text,
        "orient": "top",
        "layout": {"top": {"direction": "vertical", "anchor": "start"}},
        "gradientThickness": 10,
        "gradientLength": 180,
        "titleLimit": 260,
        "labelLimit": 170,
        "symbolStrokeWidth": 2,
        "symbolOpacity": 1,
        "symbolBaseFillColor": ink["faint"],
        "symbolBaseStrokeColor": ink["faint"],
    }
    style = {
        # A missing value, such as the diagonal, must not look like 0.
        "matrix": {"color": ink["empty"]},
        "reference": {"color": ink["faint"], "strokeDash": [2, 4]},
        "interval": {"color": first_colour},
        "hatching": {"color": ink["faint"], "strokeWidth": 0.8, "opacity": 0.55},
    }
    return {
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
        "background": "transparent",
        "view": {"stroke": None},
        "style": style,
        "range": ranges,
        # A screen reader reads one description per chart, not one per mark.
        "mark": {"aria": False, "color": first_colour, "tooltip": True},
        "rule": {"color": ink["faint"]},
        "text": {"color": ink["text"]},
        "axis": axis,
        "axisBand": {"domain": False, "grid": False},
        "legend": legend,
    }
