"""Figures: what they look up, their limits and orders, and that each exports as SVG and PDF."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st

from badit.report.blocks import Figure
from badit.report.context import Report
from badit.report.export import export_figures
from badit.report.figures import atlas, experts, interference, learning
from badit.report.figures.heat_map import grid_cells, limit_of, pair_cells, pair_index
from badit.report.figures.ordering import by_similarity, in_order
from badit.report.page import specification
from badit.report.sections import SECTIONS
from badit.report.sources import read_sources
from report.samples import SMALL, TASKS, tables, write_comparison, write_run, write_sequence

NAMES = {task: task for task in TASKS}
RECORDS = {name: table.records() for name, table in tables().items()}


def stored(chart: Any) -> tuple[list[dict[str, Any]], dict[str, list[float | None]]]:
    """The places of a chart with choices, and its lines of values by key."""
    datasets = chart.to_dict()["datasets"].values()
    places = next(rows for rows in datasets if "index" in rows[0])
    lines = next(rows for rows in datasets if "values" in rows[0])
    return places, {
        line["key"]: [float(value) if value else None for value in line["values"].split(",")] for line in lines
    }


def shown(chart: Any, key: str) -> dict[tuple[str, str], float]:
    """What a heat map shows for a choice, by row and column."""
    places, lines = stored(chart)
    values = {(place["row"], place["column"]): lines[key][place["index"]] for place in places}
    return {cell: value for cell, value in values.items() if value is not None}


def test_cosines_of_a_layer_a_module_and_all() -> None:
    chart = interference.gradient_cosines(RECORDS["gradient_pairs"], RECORDS["gradient_overall"], NAMES, [])
    wanted = {(r["task_a"], r["task_b"]): r["cosine"] for r in RECORDS["gradient_overall"]}
    everywhere = shown(chart, "all|all")
    for (a, b), cosine in wanted.items():
        assert everywhere[a, b] == everywhere[b, a] == pytest.approx(cosine, abs=1e-4)
    assert not any((task, task) in everywhere for task in TASKS)
    for key, chosen in {
        "2|mlp.gate_proj": lambda r: r["layer"] == 2 and r["module"] == "mlp.gate_proj",
        "1|all": lambda r: r["layer"] == 1,
        "all|self_attn.q_proj": lambda r: r["module"] == "self_attn.q_proj",
    }.items():
        cells = shown(chart, key)
        for a, b in SMALL.pairs:
            pair = [
                r["cosine"] for r in RECORDS["gradient_pairs"] if chosen(r) and (r["task_a"], r["task_b"]) == (a, b)
            ]
            assert cells[a, b] == pytest.approx(fmean(pair), abs=1e-4)
    assert len(stored(chart)[1]) == (1 + SMALL.layers) * (1 + len(SMALL.modules))


def test_cosines_without_an_overall_measurement_are_means() -> None:
    chart = interference.gradient_cosines(RECORDS["gradient_pairs"], [], NAMES, [])
    a, b = SMALL.pairs[0]
    pair = [r["cosine"] for r in RECORDS["gradient_pairs"] if (r["task_a"], r["task_b"]) == (a, b)]
    assert shown(chart, "all|all")[a, b] == pytest.approx(fmean(pair), abs=1e-4)


def test_many_tasks_leave_out_single_modules_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interference, "_MOST_VALUES", 50)
    keys = stored(interference.gradient_cosines(RECORDS["gradient_pairs"], RECORDS["gradient_overall"], NAMES, []))[1]
    assert keys
    assert all("all" in key.split("|") for key in keys)


def test_shared_units_are_means_over_layers() -> None:
    places, lines = stored(interference.shared_units(RECORDS["coactivation"]))
    for series, column in (("measured", "share"), ("by chance", "chance")):
        place = next(place for place in places if (place["tasks"], place["series"]) == (2, series))
        shares = [r[column] for r in RECORDS["coactivation"] if r["kind"] == "neurons" and r["tasks"] == 2]
        assert lines["neurons|all"][place["index"]] == pytest.approx(fmean(shares), rel=1e-3)
        assert lines["neurons|1"][place["index"]] == pytest.approx(shares[1], rel=1e-3)
    assert {place["tasks"] for place in places} == set(range(1, len(TASKS) + 1)), "units of no task are not drawn"


def test_angles_are_means_over_modules_at_their_steps() -> None:
    places, lines = stored(experts.expert_angles(RECORDS["expert_angles"], "degrees"))
    spot = {"step": 40, "measured": "after regrouping", "group": "within experts"}
    place = next(place for place in places if spot.items() <= place.items())
    for key, layers in (("all", range(SMALL.layers)), ("1", [1])):
        angles = [
            r["within_degrees"]
            for r in RECORDS["expert_angles"]
            if r["step"] == 40 and r["measured"] == "after" and r["layer"] in layers
        ]
        assert lines[key][place["index"]] == pytest.approx(fmean(angles), rel=1e-3)
    assert max(place["step"] for place in places) == 376


def test_held_out_angles_without_a_step_stand_at_the_last() -> None:
    row = {"layer": 0, "module": "m", "within_degrees": 80.0, "between_degrees": 91.0}
    row |= {"within_abs_cos": 0.2, "between_abs_cos": 0.1}
    rows = [{**row, "step": 50, "measured": "training"}, {**row, "step": None, "measured": "held-out"}]
    places, _ = stored(experts.expert_angles(rows, "abs_cos"))
    assert {place["step"] for place in places} == {50}


def test_flow_is_a_share_of_each_row() -> None:
    cells = shown(experts.component_flow(RECORDS["component_flow"]), "all|40")
    assert set(cells) == set(itertools.product(map(str, range(SMALL.experts)), repeat=2))
    for expert in range(SMALL.experts):
        assert sum(cells[str(expert), str(to)] for to in range(SMALL.experts)) == pytest.approx(1, abs=1e-3)
        rows = [r for r in RECORDS["component_flow"] if r["step"] == 40 and r["from_expert"] == expert]
        stayed = sum(r["components"] for r in rows if r["to_expert"] == expert)
        assert cells[str(expert), str(expert)] == pytest.approx(stayed / sum(r["components"] for r in rows), rel=1e-3)


def test_of_many_regroupings_twelve_are_chosen_from_first_to_last() -> None:
    flow = [{"step": step} for step in range(0, 1000, 10)]
    steps = experts.flow_steps(flow)
    assert (len(steps), steps[0], steps[-1]) == (12, 0, 990)
    assert experts.flow_steps(flow[:3]) == [0, 10, 20]


def test_gates_are_means_over_layers_and_modules() -> None:
    chart = atlas.gates(RECORDS["gates"], NAMES, RECORDS["gate_similarity"])
    gates = [r["mean"] for r in RECORDS["gates"] if r["task"] == TASKS[1] and r["expert"] == 2]
    assert shown(chart, "all|all")[TASKS[1], "2"] == pytest.approx(fmean(gates), rel=1e-3)
    one = next(r for r in RECORDS["gates"] if (r["task"], r["layer"], r["module"]) == (TASKS[1], 2, "mlp.gate_proj"))
    assert shown(chart, "2|mlp.gate_proj")[TASKS[1], "0"] == pytest.approx(one["mean"], rel=1e-3)


def test_long_curves_are_thinned_to_means() -> None:
    points = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    data = learning.loss_curves([("a", "a", points)]).to_dict()
    (records,) = data["datasets"].values()
    assert len(records) == 250
    assert records[0] == {"series": "a", "run": "a", "step": 4, "loss": 2.5}
    assert records[-1]["step"] == 1000


def test_the_legend_is_left_out_where_there_is_one_series() -> None:
    score = {"task": "a", "full": "a", "rouge_l": 1.0, "exact_match": 0.0}
    for series, legends in ((["x"], False), (["x", "y"], True)):
        chart = learning.scores_by_task([{**score, "series": name} for name in series], series).to_dict()
        assert (chart["encoding"]["color"]["legend"] is not None) is legends


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_limits_hold_nearly_all_values_and_are_round(values: list[float]) -> None:
    limit = limit_of(values)
    assert sum(abs(value) <= limit * (1 + 1e-9) for value in values) >= 0.98 * len(values)
    assert limit == pytest.approx(float(f"{limit:.1e}"))
    assert limit <= 1.11 * max(0.01, *map(abs, values))


@given(st.integers(0, 12))
def test_cells_cover_a_symmetric_matrix_without_its_diagonal(size: int) -> None:
    cells = pair_cells(size)
    assert {(a, b) for a, b, _ in cells} == {(a, b) for a in range(size) for b in range(size) if a != b}
    assert sorted(pair_index(size).values()) == list(range(math.comb(size, 2)))
    assert all({(a, b, i), (b, a, i)} <= set(cells) for a, b, i in cells)
    assert [index for _, _, index in grid_cells(size, 3)] == list(range(3 * size))


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_two_groups_of_like_tasks_become_two_blocks(groups: Sequence[int], random: Any) -> None:
    tasks = [f"t{i}" for i in range(len(groups))]
    pairs = [
        {
            "task_a": tasks[a],
            "task_b": tasks[b],
            "cosine": (0.8 if groups[a] == groups[b] else 0.0) + 0.1 * random.random(),
        }
        for a, b in itertools.combinations(range(len(groups)), 2)
    ]
    order = by_similarity(tasks, pairs, "cosine")
    assert sorted(order) == tasks
    sides = [groups[tasks.index(task)] for task in order]
    assert sum(one != two for one, two in itertools.pairwise(sides)) <= 1 or len(tasks) < 3


def test_matrices_of_several_runs_have_one_order_of_tasks() -> None:
    like = [{"task_a": a, "task_b": b, "similarity": float({a, b} == set(TASKS[:2]))} for a, b in SMALL.pairs[:6]]
    charts = [
        atlas.gates(RECORDS["gates"], NAMES, like),
        atlas.expert_losses(RECORDS["expert_losses"], NAMES, like),
        atlas.gate_similarity(RECORDS["gate_similarity"], NAMES, like),
    ]
    orders = []
    for chart in charts:
        content = chart.to_dict()
        orders.append((content.get("layer") or [content])[0]["encoding"]["y"]["scale"]["domain"])
    assert orders[0] == orders[1] == orders[2] == in_order(TASKS, like, "similarity")
    assert sorted(orders[0]) == sorted(TASKS)
    assert in_order(["new", *TASKS], like, "similarity")[-1] == "new"


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[Figure]:
    """Every figure there is: of a run, a sequence and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / "badit"), write_sequence(folder / "sequence"), write_comparison(folder / "compared")]
    report = Report(read_sources(runs))
    return [block for make in SECTIONS for block in make(report).blocks if isinstance(block, Figure)]


def test_every_figure_exports(figures: list[Figure], tmp_path: Path) -> None:
    written = export_figures(figures, tmp_path / "figures")
    keys = {figure.key for figure in figures}
    assert len(keys) == len(figures) >= 18, "each has a name of its own"
    assert {path.name for path in written} == {f"{key}.{kind}" for key in keys for kind in ("svg", "pdf")}
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"%PDF" if path.suffix == ".pdf" else b"<svg")
        if path.suffix == ".svg":
            # Axes alone have few marks; an empty chart would be nothing but axes.
            assert content.count(b"<path") > 8, path.name
            assert b"NaN" not in content
            assert b"undefined" not in content


def test_figures_follow_the_schema_and_name_no_colours(figures: list[Figure]) -> None:
    for figure in figures:
        figure.chart.to_dict(validate=True)
        content = specification(figure)
        assert content["description"] == figure.alt
        assert "config" not in content
        assert content["width"] == "container"
        vl_convert.vegalite_to_vega(content)
