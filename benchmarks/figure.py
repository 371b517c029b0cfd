#!/usr/bin/env python3
"""figure.py: draws README's figure, docs/images/results.svg, from benchmarks/results.

For every method of the confirmation: the mean difference to LoRA in both primary metrics, paired by
seed, with its 95 % t interval.
"""

import runpy
from pathlib import Path
from statistics import fmean
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from badit.report.theme import chart_config
from badit.support.files import read_json

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "images" / "results.svg"
NOISE = runpy.run_path(str(ROOT / "benchmarks" / "noise.py"))
SCORES = ROOT / "benchmarks" / "results" / "evidence-abilities-cpu" / "scores.json"
# Names in the results file -> names in the figure, from the top to the bottom.
NAMES = {
    "cluster-gates": "cluster-gates",
    "badit": "BADIT",
    "router-regroup": "BADIT, trained router",
    "mtl-lora": "MTL-LoRA (told the task)",
    "lora-plus": "LoRA+",
}
HIGHLIGHTED = ["cluster-gates", "BADIT"]
TITLES = {"NLL": "NLL, lower is better", "mixed score": "mixed score, higher is better"}
UNITS = {"NLL": "difference to LoRA, nats per token", "mixed score": "difference to LoRA, points"}


def differences(score: str) -> pd.DataFrame:
    """Returns a row per method: its name, the difference to LoRA and the ends of its interval."""
    runs = read_json(SCORES)
    rows = []
    for method, name in NAMES.items():
        pairs = NOISE["score_differences"](runs, method, "lora", score)
        low, high = NOISE["interval_over_seeds"](pairs)
        rows.append({"method": name, "mean": fmean(pairs), "low": low, "high": high})
    return pd.DataFrame(rows)


def panel(score: str) -> Any:
    """Returns the dots and intervals of a metric, with a line at LoRA's score."""
    frame = differences(score)
    labels = alt.Axis(labelLimit=220) if score == "NLL" else None
    row = alt.Y("method:N", sort=None, title=None, axis=labels)
    is_highlighted = alt.FieldOneOfPredicate(field="method", oneOf=HIGHLIGHTED)
    colour = alt.condition(is_highlighted, alt.value("#b5432a"), alt.value("#5d626b"))
    interval = alt.Chart(frame).mark_rule(strokeWidth=2)
    interval = interval.encode(
        y=row, x=alt.X("low:Q", title=UNITS[score]), x2="high:Q", color=colour
    )
    dot = alt.Chart(frame).mark_circle(size=70, opacity=1)
    dot = dot.encode(y=row, x="mean:Q", color=colour)
    zero = alt.Chart().mark_rule(strokeDash=[2, 4]).encode(x=alt.datum(0))
    title = alt.TitleParams(TITLES[score], fontSize=12, anchor="start")
    return alt.layer(zero, interval, dot).properties(width=240, height=140, title=title)


def drawn() -> str:
    """Returns the figure as SVG, on white."""
    config = chart_config("light") | {"background": "white", "padding": 15}
    config["font"] = "Helvetica, Arial, sans-serif"
    # Marks keep their description: readers of the screen, and the test, find the numbers there.
    config["mark"] = {"color": config["mark"]["color"]}
    chart = alt.hconcat(*[panel(score) for score in TITLES]).to_dict()
    return vl_convert.vegalite_to_svg(chart, config=config, allowed_base_urls=[])


if __name__ == "__main__":
    FIGURE.write_text(drawn())
