#!/usr/bin/env python3
"""figure.py: draws README's figure, docs/images/results.svg, from benchmarks/results.

For every method: the paired differences to LoRA in NLL and Rouge-L, with their 95 % intervals.
"""

import runpy
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from badit.comparison.results import load_results, summarise
from badit.metrics.answers import METRICS
from badit.report.theme import chart_config

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "images" / "results.svg"
# Names in the results file -> names in the figure, from the top to the bottom.
NAMES = {
    "badit": "cluster-gates",
    "mtl-lora": "MTL-LoRA (told the task)",
    "lora-plus": "LoRA+",
    "badit-router-adamw": "trained router",
    "badit-no-gates-adamw": "no gates",
    "goat": "GOAT",
    "loramoe": "LoRAMoE",
    "hydralora": "HydraLoRA",
    "pissa": "PiSSA",
}
UNITS = {"nll": "difference to LoRA, nats per token", "rouge_l": "difference to LoRA, points"}
BETTER = {"nll": "lower is better", "rouge_l": "higher is better"}


def differences(metric: str) -> pd.DataFrame:
    """Returns a row per method: its name, the difference to LoRA and the ends of its interval."""
    tables = runpy.run_path(str(Path(__file__).with_name("tables.py")))
    results = load_results(tables["RESULTS"] / "evidence-cpu" / "results.json")
    results = tables["renamed"](tables["of_methods"](results, ["lora", *NAMES]), NAMES)
    columns = ["method", "difference_mean", "difference_low", "difference_high"]
    summary = summarise(results, metric)[columns].set_index("method")
    return summary.loc[list(NAMES.values())].reset_index()


def panel(metric: str) -> Any:
    """Returns the dots and intervals of a metric, with a line at LoRA's score."""
    frame = differences(metric)
    labels = alt.Axis(labelLimit=200) if metric == "nll" else None
    row = alt.Y("method:N", sort=None, title=None, axis=labels)
    colour = alt.condition(
        alt.datum.method == "cluster-gates", alt.value("#b5432a"), alt.value("#5d626b")
    )
    interval = alt.Chart(frame).mark_rule(strokeWidth=2)
    interval = interval.encode(
        y=row,
        x=alt.X("difference_low:Q", title=UNITS[metric]),
        x2="difference_high:Q",
        color=colour,
    )
    dot = alt.Chart(frame).mark_circle(size=70, opacity=1)
    dot = dot.encode(y=row, x="difference_mean:Q", color=colour)
    zero = alt.Chart().mark_rule(strokeDash=[2, 4]).encode(x=alt.datum(0))
    text = f"{METRICS[metric].label}, {BETTER[metric]}"
    title = alt.TitleParams(text, fontSize=12, anchor="start")
    return alt.layer(zero, interval, dot).properties(width=240, height=230, title=title)


def drawn() -> str:
    """Returns the figure as SVG, on white."""
    config = chart_config("light") | {"background": "white", "padding": 15}
    config["font"] = "Helvetica, Arial, sans-serif"
    # Marks keep their description: readers of the screen, and the test, find the numbers there.
    config["mark"] = {"color": config["mark"]["color"]}
    chart = alt.hconcat(panel("nll"), panel("rouge_l")).to_dict()
    return vl_convert.vegalite_to_svg(chart, config=config, allowed_base_urls=[])


if __name__ == "__main__":
    FIGURE.write_text(drawn())
