"""Figures: what they look up, their limits, and that each exports as SVG and PDF."""

# pandas' own types make every selection a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st

from badit.report import charts, measurements, scores
from badit.report.page import FIGURES, SECTIONS, Block, export_figures, sections_of
from badit.report.sources import read_sources
from report.samples import SMALL, TASKS, tables, write_comparison, write_run, write_sequence

FRAMES = tables()


def stored(chart: Any) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """The places of a chart with choices, and its lines of values by key."""
    datasets = chart.to_dict()["datasets"].values()
    places = next(rows for rows in datasets if "index" in rows[0])
    lines = next(rows for rows in datasets if "values" in rows[0])
    return places, {line["key"]: [float(value or "nan") for value in line["values"].split(",")] for line in lines}


def shown(chart: Any, key: str) -> dict[tuple[str, str], float]:
    """What a heat map shows for a choice, by full names of row and column."""
    places, lines = stored(chart)
    values = {(place["row_full"], place["column_full"]): lines[key][place["index"]] for place in places}
    return {cell: value for cell, value in values.items() if not np.isnan(value)}


def cosines(pairs: pd.DataFrame, overall: pd.DataFrame | None = None) -> pd.DataFrame:
    """The frame that a source makes of the two tables."""
    parts = [pairs.assign(parameters="adapter")]
    return pd.concat(parts if overall is None else [*parts, overall.assign(layer="all", module="all")])


def test_cosines_of_a_layer_a_module_and_all() -> None:
    pairs, overall = FRAMES["gradient_pairs"], FRAMES["gradient_overall"]
    chart = measurements.gradient_cosines(cosines(pairs, overall))
    everywhere = shown(chart, "all|all")
    for a, b, cosine in overall[["task_a", "task_b", "cosine"]].to_numpy():
        assert everywhere[a, b] == everywhere[b, a] == pytest.approx(cosine, abs=1e-4)
    assert not any((task, task) in everywhere for task in TASKS)
    for key, chosen in {
        "2|mlp.gate_proj": (pairs["layer"] == 2) & (pairs["module"] == "mlp.gate_proj"),
        "1|all": pairs["layer"] == 1,
        "all|self_attn.q_proj": pairs["module"] == "self_attn.q_proj",
    }.items():
        cells = shown(chart, key)
        means = pairs[chosen].groupby(["task_a", "task_b"])["cosine"].mean()
        assert {pair: cells[pair] for pair in SMALL.pairs} == pytest.approx(means.to_dict(), abs=1e-4)
    assert len(stored(chart)[1]) == (1 + SMALL.layers) * (1 + len(SMALL.modules))
    means = shown(measurements.gradient_cosines(cosines(pairs)), "all|all")
    a, b = SMALL.pairs[0]
    expected = pairs.loc[(pairs["task_a"] == a) & (pairs["task_b"] == b), "cosine"].mean()
    assert means[a, b] == pytest.approx(expected, abs=1e-4), "without an overall measurement"


def test_many_tasks_leave_out_single_modules_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MOST_VALUES", 50)
    keys = stored(measurements.gradient_cosines(cosines(FRAMES["gradient_pairs"], FRAMES["gradient_overall"])))[1]
    assert keys
    assert all("all" in key.split("|") for key in keys)


def test_shared_units_are_means_over_layers() -> None:
    frame = FRAMES["coactivation"]
    places, lines = stored(measurements.shared_units(frame))
    for series, column in (("measured", "share"), ("by chance", "chance")):
        place = next(place for place in places if (place["tasks"], place["series"]) == (2, series))
        shares = frame.loc[(frame["kind"] == "neurons") & (frame["tasks"] == 2), column].tolist()
        assert lines["neurons|all"][place["index"]] == pytest.approx(fmean(shares), rel=1e-3)
        assert lines["neurons|1"][place["index"]] == pytest.approx(shares[1], rel=1e-3)
    assert {place["tasks"] for place in places} == set(range(1, len(TASKS) + 1)), "units of no task are not drawn"


def test_angles_are_means_over_modules_at_their_steps() -> None:
    frame = FRAMES["expert_angles"]
    places, lines = stored(measurements.expert_angles(frame))
    spot = {"step": 40, "measured": "after regrouping", "group": "within experts"}
    place = next(place for place in places if spot.items() <= place.items())
    rows = frame[(frame["step"] == 40) & (frame["measured"] == "after")]
    for key, part in (("all", rows), ("1", rows[rows["layer"] == 1])):
        assert lines[key][place["index"]] == pytest.approx(part["within_degrees"].mean(), rel=1e-3)
    assert max(place["step"] for place in places) == 376


def test_held_out_angles_without_a_step_are_at_the_last() -> None:
    row = {"layer": 0, "module": "m", "within_degrees": 80.0, "between_degrees": 91.0}
    row |= {"within_abs_cos": 0.2, "between_abs_cos": 0.1}
    rows = [{**row, "step": 50, "measured": "training"}, {**row, "step": None, "measured": "held-out"}]
    places, _ = stored(measurements.expert_cosines(pd.DataFrame(rows)))
    assert {place["step"] for place in places} == {50}


def test_flow_is_a_share_of_each_row() -> None:
    frame = FRAMES["component_flow"]
    cells = shown(measurements.component_flow(frame), "all|40")
    assert set(cells) == set(itertools.product(map(str, range(SMALL.experts)), repeat=2))
    rows = frame[frame["step"] == 40]
    for expert in range(SMALL.experts):
        assert sum(cells[str(expert), str(to)] for to in range(SMALL.experts)) == pytest.approx(1, abs=1e-3)
        own = rows[rows["from_expert"] == expert]
        stayed = own.loc[own["to_expert"] == expert, "components"].sum() / own["components"].sum()
        assert cells[str(expert), str(expert)] == pytest.approx(stayed, rel=1e-3)


def test_of_many_regroupings_twelve_are_shown_from_first_to_last() -> None:
    rows = [[step, 0, "m", 0, 0, 1] for step in range(0, 1000, 10)]
    columns = ["step", "layer", "module", "from_expert", "to_expert", "components"]
    keys = stored(measurements.component_flow(pd.DataFrame(rows, columns=columns)))[1]
    steps = [int(key.split("|")[1]) for key in keys if key.startswith("all")]
    assert (len(steps), steps[0], steps[-1]) == (12, 0, 990)


def test_gates_are_means_over_layers_and_modules() -> None:
    frame = FRAMES["gates"]
    chart = measurements.gates(frame)
    own = frame[(frame["task"] == TASKS[1]) & (frame["expert"] == 2)]
    assert shown(chart, "all|all")[TASKS[1], "2"] == pytest.approx(own["mean"].mean(), rel=1e-3)
    one = own.loc[(own["layer"] == 2) & (own["module"] == "mlp.gate_proj"), "mean"].item()
    assert shown(chart, "2|mlp.gate_proj")[TASKS[1], "2"] == pytest.approx(one, rel=1e-3)


def test_of_many_pairs_those_in_the_middle_are_left_out() -> None:
    pairs = list(itertools.combinations([f"t{i}" for i in range(20)], 2))
    columns = {
        "task_a": [a for a, _ in pairs],
        "task_b": [b for _, b in pairs],
        "cosine": np.linspace(-1, 1, len(pairs)),
    }
    frame = pd.DataFrame(columns).assign(parameters="adapter", corrected_cosine=np.nan, magnitude_similarity=1.0)
    table = measurements.gradient_pairs(frame)
    assert (len(table), table["cosine"].iloc[0], table["cosine"].iloc[-1]) == (120, "−1.000", "1.000")
    assert set(table["corrected cosine"]) == {"–"}


def test_long_curves_are_thinned_to_means() -> None:
    points = pd.DataFrame({"series": "a", "run": "a", "step": range(1, 1001), "loss": np.arange(1.0, 1001.0)})
    (records,) = scores.loss_curves(points).to_dict()["datasets"].values()
    assert len(records) == 250
    assert records[0] == {"series": "a", "run": "a", "step": 4, "loss": 2.5}
    assert records[-1]["step"] == 1000


def test_the_legend_is_left_out_where_there_is_one_series() -> None:
    rows = [("a", run, metric, 1.0, 8) for run in "xy" for metric in ("rouge_l", "exact_match")]
    frame = pd.DataFrame(rows, columns=["task", "run", "metric", "score", "n"])
    for part, legends in ((frame[frame["run"] == "x"], False), (frame, True)):
        chart = scores.scores_by_task(part).to_dict()
        assert (chart["encoding"]["color"]["legend"] is not None) is legends


def test_the_table_of_scores_ends_with_means_and_marks_the_best() -> None:
    rows = [("mean over tasks", "x", 1.0), ("b", "x", 4.0), ("mean over tasks", "y", 2.0)]
    frame = pd.DataFrame(rows, columns=["task", "run", "score"]).assign(metric="rouge_l", n=8)
    table = scores.scores_table(frame)
    assert table["x: Rouge-L"].tolist() == ["1.0", "4.0", "2.5"]
    assert table["y: Rouge-L"].tolist() == ["2.0", "–", "2.0"], "a mean is over the tasks that there are"
    assert set(table.attrs["strong"]) == {(0, "y: Rouge-L"), (1, "x: Rouge-L"), (2, "x: Rouge-L")}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_limits_hold_nearly_all_values_and_are_round(values: list[float]) -> None:
    limit = charts.limit_of(values)
    assert sum(abs(value) <= limit * (1 + 1e-9) for value in values) >= 0.98 * len(values)
    assert limit == pytest.approx(float(f"{limit:.1e}"))
    assert limit <= 1.11 * max(0.01, *map(abs, values))


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[Block]:
    """Every figure there is: of a run, a sequence and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / "badit"), write_sequence(folder / "sequence"), write_comparison(folder / "compared")]
    blocks = [block for section in sections_of(read_sources(runs)) for block in section.blocks]
    drawn = {block.title for block in blocks}
    assert {figure.title for figure in FIGURES} - drawn == {"The same of the weights"}
    assert {figure.section for figure in FIGURES} <= {section.key for section in SECTIONS}
    assert all(figure.caption.endswith(".") for figure in FIGURES)
    return [block for block in blocks if block.kind == "figure"]


def test_every_figure_exports(figures: list[Block], tmp_path: Path) -> None:
    section = SECTIONS[0].__class__("all", "All", blocks=figures)
    written = export_figures([section], tmp_path / "figures")
    names = {figure.name for figure in figures}
    assert len(names) == len(figures) >= 18, "each has a name of its own"
    assert {path.name for path in written} == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"%PDF" if path.suffix == ".pdf" else b"<svg")
        if path.suffix == ".svg":
            # Axes alone have few marks; an empty chart would be nothing but axes.
            assert content.count(b"<path") > 8, path.name
            assert b"NaN" not in content
            assert b"undefined" not in content


def test_figures_follow_the_schema_and_name_no_colours(figures: list[Block]) -> None:
    for figure in figures:
        figure.content.to_dict(validate=True)
        assert figure.caption in figure.specification["description"]
        assert "config" not in figure.specification
        assert figure.specification["width"] == "container"
        vl_convert.vegalite_to_vega(figure.specification)
