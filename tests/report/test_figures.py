"""Figures: their values, their limits, and their export as SVG and PDF."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest

from badit.report import charts
from badit.report.figures import SECTIONS, experts, interference, scores
from badit.report.page import export_figures
from badit.report.sections import sections_of
from badit.report.sources import read_sources
from materials import comparison, results_cell, write_results
from refusals import refuses
from report.samples import (
    SMALL,
    TASKS,
    Shape,
    save_tables,
    tables,
    write_comparison,
    write_run,
    write_sequence,
)

FRAMES = tables()
# The frame ``gradient_cosines`` of a source, without and with the overall cosines.
PAIRS = FRAMES["gradient_pairs"].assign(parameters="adapter")
COSINES = pd.concat([PAIRS, FRAMES["gradient_overall"].assign(layer="all", module="all")])


def chart_values(chart):
    """Returns the values of a chart: a row per place, a column per combination of options."""
    spec = chart.to_dict()
    places = next(data for data in spec["datasets"].values() if "values" in data[0])
    keys = json.loads(re.search(r"indexof\((\[.*?\]),", json.dumps(spec).replace('\\"', '"'))[1])
    values = [[float(text or "nan") for text in place["values"].split(",")] for place in places]
    return pd.concat([pd.DataFrame(places), pd.DataFrame(values, columns=keys)], axis="columns")


def cell_values(chart, key):
    """Returns the values that a heat map shows for a choice, by row and column."""
    return chart_values(chart).set_index(["row", "column"])[key].dropna().to_dict()


def test_gradient_cosines_are_means_for_the_chosen_layer_and_module(monkeypatch):
    pairs, overall = FRAMES["gradient_pairs"], FRAMES["gradient_overall"]
    chart = interference.gradient_cosines(COSINES)
    alone = interference.gradient_cosines(PAIRS)
    for chart_, key, rows in (
        (chart, "all|all", overall),
        (
            chart,
            "2|mlp.gate_proj.adapter",
            pairs.query("layer == 2 and module == 'mlp.gate_proj.adapter'"),
        ),
        (chart, "1|all", pairs.query("layer == 1")),
        (
            chart,
            "all|self_attn.q_proj.adapter",
            pairs.query("module == 'self_attn.q_proj.adapter'"),
        ),
        (alone, "all|all", pairs),  # without an overall measurement
    ):
        means = rows.groupby(["task_a", "task_b"])["cosine"].mean().to_dict()
        mirrored = {(b, a): mean for (a, b), mean in means.items()}
        assert cell_values(chart_, key) == pytest.approx(means | mirrored, abs=1e-4)
    # Above MOST_VALUES, a layer or a module can be chosen, but not both.
    monkeypatch.setattr(charts, "MOST_VALUES", 30)
    keys = [key for key in chart_values(interference.gradient_cosines(COSINES)) if "|" in key]
    assert {"all" in key.split("|") for key in keys} == {True}
    assert cell_values(interference.unit_overlaps(FRAMES["coactivation_pairs"]), "neurons"), (
        "no option for all"
    )


def layers_with(chart, mark):
    """Returns the layers of a chart, also of nested ones, with this type of mark and their data."""
    found = []
    for layer in chart.get("layer", ()):
        layer = {"data": chart.get("data"), **layer}
        found += layers_with(layer, mark)
        if layer.get("mark", {}).get("type") == mark:
            found.append(layer)
    return found


@pytest.mark.parametrize(("factor", "limit"), [(0.01, 0.25), (1, 0.5), (3, 1.0)])
def test_scale_of_cosines_is_fixed_from_a_quarter_on(factor, limit):
    frame = COSINES.assign(cosine=(COSINES["cosine"] * factor).clip(-1, 1))
    chart = interference.gradient_cosines(frame).to_dict()
    (param,) = [param for param in chart["params"] if param["name"] == "limit"]
    covered = frame["cosine"].abs().quantile(0.9)
    assert param["value"] >= covered
    assert param["value"] == limit


def test_cosines_within_noise_are_hatched_and_small_maps_have_their_values():
    frame = COSINES.copy()
    overall = frame["layer"] == "all"
    frame.loc[overall, "low"] = [-0.1, 0.1, -0.5, *[0.1] * 7]
    frame.loc[overall, "high"] = [0.1, 0.5, -0.1, *[0.5] * 7]
    chart = interference.gradient_cosines(frame).to_dict()
    lines = layers_with(chart, "rule")
    assert len(lines) == 3
    first = frame[overall].iloc[0]
    cells = {(row["row"], row["column"]) for row in chart["datasets"][lines[0]["data"]["name"]]}
    assert cells == {(first["task_a"], first["task_b"]), (first["task_b"], first["task_a"])}
    assert "layer === 'all' && module === 'all'" in json.dumps(lines[0]["transform"])
    assert len(layers_with(chart, "text")) == 1
    many = pd.DataFrame(itertools.combinations([f"t{i}" for i in range(21)], 2))
    many = many.rename(columns={0: "task_a", 1: "task_b"}).assign(similarity=0.1, noise=0.2)
    chart = experts.gate_similarity(many).to_dict()
    assert layers_with(chart, "text") == [], "21 tasks"
    assert len(chart["datasets"][layers_with(chart, "rule")[0]["data"]["name"]]) == 2 * len(many)


def test_curves_of_few_points_are_points_and_held_out_losses_have_a_choice_of_tasks():
    few = pd.DataFrame({"series": "a", "run": "a", "step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]})
    for frame, opacity in ((few, 1), (pd.concat([few] * 5).assign(step=range(15)), 0)):
        (points,) = layers_with(scores.loss_curves(frame).to_dict(), "point")
        assert points["mark"]["opacity"] == opacity
    by_task = pd.concat([few.assign(task=task) for task in ("all tasks", "b")])
    chart = scores.held_out_losses(by_task).to_dict()
    (param,) = [param for param in chart["params"] if param["name"] == "task"]
    assert param["bind"]["options"] == ["all tasks", "b"]
    assert "datum.task === task" in json.dumps(chart)


def test_shared_units_and_expert_angles_are_means_over_layers_and_modules():
    frame = FRAMES["coactivation"]
    shown = chart_values(interference.shared_units(frame)).set_index(["tasks", "series"])
    rows = frame.query("kind == 'neurons' and tasks == 2")
    for series, shares in (("measured", rows["share"]), ("by chance", rows["chance"])):
        expected = [shares.mean(), shares.iloc[1]]
        values = shown.loc[(2, series), ["neurons|all", "neurons|1"]].tolist()
        assert values == pytest.approx(expected, rel=1e-3)
    # Units that no task marks are left out.
    assert set(shown.index.levels[0]) == set(range(1, len(TASKS) + 1))
    frame = FRAMES["expert_angles"]
    shown = chart_values(experts.expert_angles(frame)).set_index(["step", "measured", "group"])
    rows = frame.query("step == 40 and measured == 'after'")
    expected = [rows["within_degrees"].mean(), rows.query("layer == 1")["within_degrees"].mean()]
    values = shown.loc[(40, "after regrouping", "within experts"), ["all", "1"]]
    assert values.tolist() == pytest.approx(expected, rel=1e-3)


def test_component_flow_is_normalised_per_row():
    frame = FRAMES["component_flow"]
    cells = cell_values(experts.component_flow(frame), "all|40")
    for expert, rows in frame.query("step == 40").groupby("from_expert"):
        moved = (
            rows.groupby("to_expert")["components"]
            .sum()
            .reindex(range(SMALL.experts), fill_value=0)
        )
        shares = [cells.pop((str(expert), str(to))) for to in moved.index]
        assert shares == pytest.approx((moved / moved.sum()).tolist(), abs=1e-3)
    assert not cells


def test_gradient_pairs_are_limited_and_long_loss_curves_are_averaged():
    pairs = pd.DataFrame(
        itertools.combinations([f"t{i}" for i in range(20)], 2), columns=["task_a", "task_b"]
    )
    frame = pairs.assign(
        cosine=np.linspace(-1, 1, len(pairs)),
        low=-1.0,
        high=1.0,
        parameters="adapter",
        corrected_cosine=np.nan,
        conflict=[0.0, 1.0, np.nan, *[np.nan] * (len(pairs) - 3)],
        instances_needed=[8, 8, np.nan, *[1234] * (len(pairs) - 3)],
    )
    table = interference.gradient_pairs(frame.assign(magnitude_similarity=1.0))
    assert len(table) == 120
    assert table["cosine"].iloc[[0, -1]].tolist() == ["−1.000", "1.000"]
    assert set(table["corrected cosine"]) == {"–"}
    assert table["conflict"][:4].tolist() == [
        "no",
        "yes",
        "not decided: unknown instances",
        "not decided: 1,234 instances",
    ]
    points = pd.DataFrame(
        {"series": "a", "run": "a", "step": range(1, 1001), "loss": np.arange(1.0, 1001.0)}
    )
    (records,) = scores.loss_curves(points).to_dict()["datasets"].values()
    assert len(records) == 250
    assert records[0] == {"series": "a", "run": "a", "step": 4, "loss": 2.5}
    assert records[-1]["step"] == 1000


@pytest.mark.parametrize(
    ("conflict", "needed", "expected"),
    [
        ([np.nan] * 3, [9, 30, np.nan], ["0", "this data does not decide", "30", "unknown"]),
        ([1, 0, 0], [5, 7, 8], ["3", "1 of 3 decided pairs conflict", "7", "8"]),
        (
            [1, 1, np.nan],
            [5, 8, 40],
            [
                "2",
                "2 of 2 decided pairs conflict; this data does not decide the other 1",
                "8",
                "40",
            ],
        ),
    ],
)
def test_conflicts_are_stated_only_for_decided_pairs(conflict, needed, expected):
    frame = pd.DataFrame(
        {"parameters": "adapter", "conflict": conflict, "instances_needed": needed}
    )
    (row,) = interference.gradient_conflicts(frame).to_numpy().tolist()
    assert row == ["adapter", "3", *expected]


def test_scores_table_ends_with_means_and_marks_the_best():
    rows = [("mean over tasks", "x", 1.0), ("b", "x", 4.0), ("mean over tasks", "y", 2.0)]
    table = scores.scores_table(
        pd.DataFrame(rows, columns=["task", "run", "score"]).assign(metric="rouge_l", n=8)
    )
    assert table["x: Rouge-L"].tolist() == ["1.0", "4.0", "2.5"]
    # The mean is over tasks with a score. Means of different tasks are not compared.
    assert table["y: Rouge-L"].tolist() == ["2.0", "–", "2.0"]
    assert set(table.attrs["strong"]) == {(0, "y: Rouge-L"), (1, "x: Rouge-L")}


def test_many_runs_have_one_table_of_scores_per_metric():
    rows = [("t", run, metric, 1.0) for run in "abcd" for metric in ("rouge_l", "nll")]
    frame = pd.DataFrame(rows, columns=["task", "run", "metric", "score"]).assign(n=8)
    tables = {
        figure.title: figure.draw(frame)
        for figure in scores.SCORES
        if figure.title.startswith("Table of")
    }
    shown = {title for title, table in tables.items() if table is not None}
    assert shown == {"Table of Rouge-L by task", "Table of NLL by task"}
    assert [*tables["Table of NLL by task"]] == ["task", "instances", *"abcd"]


def test_every_figure_has_a_caption_a_valid_schema_and_svg_and_pdf_exports(tmp_path):
    """A run, a sequence and a comparison together have all figures except three."""
    runs = [
        write_run(tmp_path / "badit"),
        write_sequence(tmp_path / "sequence"),
        write_comparison(tmp_path / "all"),
        tmp_path / "one",
    ]
    one = Shape(layers=1, modules=("mlp.gate_proj",))
    save_tables(tmp_path / "one", one, leave_out=("clusters", "task_gap", "transfer"))
    all_blocks = [*itertools.chain(*sections_of(read_sources(runs)).values())]
    titles = {figure.title for figure in itertools.chain(*SECTIONS.values())}
    missing_titles = titles - {block.title for block in all_blocks}
    # The comparison, of many methods, has neither NLL nor preferences.
    without = {"Table of NLL by task", "Table of Preference by task"}
    assert missing_titles == {"Cosine of weight gradients", *without}
    blocks = [block for block in all_blocks if block.kind == "figure"]
    captioned = [block for block in blocks if block.caption]
    assert {block.title for block in captioned} == {block.title for block in blocks}
    assert all(block.caption.endswith(".") for block in captioned)
    for block in blocks:
        block.content.to_dict(validate=True)
    export_figures({"all": blocks}, tmp_path / "figures")
    written = [*(tmp_path / "figures").iterdir()]
    names = {block.name for block in blocks}
    assert len(names) == len(blocks), "figure names are unique"
    assert {path.name for path in written} == {
        f"{name}.{kind}" for name in names for kind in ("svg", "pdf")
    }
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"%PDF" if path.suffix == ".pdf" else b"<svg")
        # An empty chart has only axes, and these have fewer paths.
        assert path.suffix == ".pdf" or content.count(b"<path") > 8, path.name
        assert path.suffix == ".pdf" or not re.search(b"NaN|undefined", content), path.name


def test_figures_of_names_that_svg_or_vega_cannot_hold(tmp_path):
    for name in ("a\u0001b\\b\ufffe", "constructor"):
        scores = {task: {"rouge_l": [50.0], "exact_match": [0.0]} for task in (name, "other")}
        write_results(tmp_path, comparison(results_cell("lora", 0, scores), methods=["lora"]))
        sections = sections_of(read_sources([tmp_path]))
        if name == "constructor":
            refuses(r"figures/.*: cannot be drawn", export_figures, sections, tmp_path / "figures")
        else:
            export_figures(sections, tmp_path / "figures")
            assert all("a\ufffdb\\b" in path.read_text() for path in tmp_path.glob("figures/*.svg"))


def test_deeply_nested_results_are_refused_in_one_line(tmp_path):
    nested = {}
    for _ in range(400):
        nested = {"a": nested}
    cell = results_cell(
        "lora", 0, {"t": {"rouge_l": [50.0], "exact_match": [0.0]}}, environment=nested
    )
    write_results(tmp_path, comparison(cell, methods=["lora"]))
    refuses(r"results\.json: cannot be shown", sections_of, read_sources([tmp_path]))
