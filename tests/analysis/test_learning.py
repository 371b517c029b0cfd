"""Angles from logs and from gradients, component flow, score matrices and task gaps."""

import json
import shutil

import numpy as np
import pytest
import torch

import reference
from analysis import naive_experts as naive
from analysis.naive_interference import rows
from badit.analysis.learning import (
    component_flow,
    expert_angles,
    held_out_angles,
    task_gap,
    transfer,
    transfer_of_chain,
)
from badit.api import Run
from badit.metrics.answers import mean_scores
from badit.report.figures import scores as scores_figures
from badit.report.sources import read_sources
from badit.support.files import write_json
from data.examples import write_rows
from materials import comparison, results_cell, write_results
from refusals import refuses
from tuner import helpers

FIELDS = ("intra_degrees", "inter_degrees", "intra_abs_cos", "inter_abs_cos")
NAME = "model.layers.1.mlp.gate_proj.default"
ALONE = "lora, one model per task"


def regrouping(step, before=(0, 0, 1, 1), after=(1, 0, 0, 1), **angles):
    return {
        "step": step,
        "module": NAME,
        "previous_labels": list(before),
        "labels": list(after),
        **angles,
    }


def test_angles_and_component_flow_are_read_from_logs(tmp_path):
    assert expert_angles(Run.at(tmp_path)).empty
    assert component_flow(Run.at(tmp_path)).empty
    after = dict(zip(FIELDS, (None, 90.0, 0.4, 0.1), strict=True))
    before = {
        f"previous_{field}": value
        for field, value in zip(FIELDS, (85.0, 88.0, 0.2, 0.2), strict=True)
    }
    stays = regrouping(20, before=(1, 0, 0, 1), after=(1, 0, 0, 1))
    place = [1, "mlp.gate_proj"]
    write_rows(tmp_path / "regroupings.jsonl", regrouping(10, **before, **after), stays)
    angles = [
        [10, *place, "before", 85.0, 88.0, 0.2, 0.2],
        [10, *place, "after", None, 90.0, 0.4, 0.1],
    ]
    assert rows(expert_angles(Run.at(tmp_path))) == angles, "no step followed the regrouping at 20"
    assert rows(component_flow(Run.at(tmp_path))) == [
        [10, *place, 0, 0, 1], [10, *place, 0, 1, 1], [10, *place, 1, 0, 1], [10, *place, 1, 1, 1],
        [20, *place, 0, 0, 2], [20, *place, 1, 1, 2],
    ]  # fmt: skip


def test_logs_of_a_sequence_are_joined(tmp_path):
    run = Run.at(tmp_path)
    for number, (task, steps) in enumerate([("b", 20), ("a", 10)], start=1):
        folder = run.path / "stages" / f"{number:02d}-{task}"
        write_rows(
            folder / "metrics.jsonl", *({"step": step, "loss": 1.0} for step in (steps // 2, steps))
        )
        write_rows(folder / "regroupings.jsonl", regrouping(5, **dict.fromkeys(FIELDS, 1.0)))
    assert run.metrics["step"].tolist() == [10, 20, 25, 30]
    assert expert_angles(run)["step"].tolist() == [5, 25]
    assert set(component_flow(run)["step"]) == {5, 25}


def test_damaged_log_is_refused(tmp_path):
    path = tmp_path / "regroupings.jsonl"
    for read, line, message in (
        (
            expert_angles,
            regrouping(10, intra_degrees="x"),
            r"within_degrees\.0: input should be a valid number",
        ),
        (component_flow, {"step": 10, "module": NAME}, "'previous_labels'"),
        (component_flow, {"step": "10", "module": NAME}, "cannot be read"),
        (component_flow, regrouping(10, after=(0, 1)), "cannot be read"),
        (
            component_flow,
            regrouping(10, after=(0, 1, 0, 10**9)),
            r"to_expert\.\d: input should be less than 1024",
        ),
    ):
        write_rows(path, regrouping(5), line)
        refuses(rf"{path}: .*{message}.*; delete the file to skip it", read, Run.at(tmp_path))


@pytest.mark.parametrize("method", ["badit", "badit token", "loramoe", "goat"])
def test_held_out_angles_match_naive_angles(tiny_model, method):
    model = naive.adapted(tiny_model("llama"), method, target_modules=["gate_proj", "v_proj"])
    with torch.no_grad():
        measured = held_out_angles(model.requires_grad_(False), naive.BATCHES)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(measured) == [
        (layer, module) for layer in (0, 1) for module in ("self_attn.v_proj", "mlp.gate_proj")
    ]
    for angles, layer, of_layer in zip(
        measured.values(), naive.layers(model), naive.gradients(model), strict=True
    ):
        expected = reference.angles(reference.unit_gradients(*of_layer), naive.expert_of(layer))
        assert angles == pytest.approx(expected, abs=0.02)
    assert np.std([angles[0] for angles in measured.values()]) > 0.5


def test_no_angles_with_shared_A_and_none_within_experts_of_rank_1(tiny_model):
    for method in ("hydralora", "mtl-lora"):
        assert held_out_angles(naive.adapted(tiny_model("llama"), method), naive.BATCHES) == {}
    angles = held_out_angles(helpers.adapted(tiny_model("llama"), r=1), naive.BATCHES)[
        0, "mlp.gate_proj"
    ]
    assert [angle is None for angle in angles] == [True, False, True, False]


def comparison_folder(tmp_path, cells, protocol="mixed"):
    """Returns the folder of a comparison whose cells (method, seed, order, scores) are finished."""
    made = [
        results_cell(
            method,
            seed,
            {t: {"rouge_l": [s], "exact_match": [0]} for t, s in scores.items()},
            order=order,
        )
        for method, seed, order, scores in cells
    ]
    methods = list(dict.fromkeys(method for method, *_ in cells))
    return write_results(tmp_path, comparison(*made, methods=methods, protocol=protocol)).parent


def test_task_gap_averages_seeds_with_both_runs_and_all_orders(tmp_path):
    scores = {
        ("lora", 0): (40, 60),
        ("lora", 1): (50, 70),
        ("lora", 2): (0, 0),
    }  # no single-task run has seed 2
    scores |= {("badit", 0): (45, 65), (ALONE, 0): (60, 60), (ALONE, 1): (62, 64)}
    cells = [(*run, None, {"a": a, "b": b}) for run, (a, b) in scores.items()]
    table = task_gap(comparison_folder(tmp_path, cells))
    assert rows(table) == [["lora", "a", 61, 45, 16], ["lora", "b", 62, 65, -3]]
    assert "all tasks mixed" in table.attrs["about"]
    cells = [
        ("lora", 0, "one", {"a": 40}),
        ("lora", 0, "two", {"a": 20}),
        (ALONE, 0, None, {"a": 60}),
    ]
    table = task_gap(comparison_folder(tmp_path, cells, protocol="sequential") / "results.json")
    assert rows(table) == [["lora", "a", 60, 30, 30]]
    assert "one after another" in table.attrs["about"]
    assert task_gap(comparison_folder(tmp_path, [("lora", 0, None, {"a": 40})])).empty


def scored_run(tmp_path, order, matrix):
    content = {
        **mean_scores({"a": {"rouge_l": [55], "exact_match": [0]}}),
        "order": order,
        "matrix": matrix,
    }
    write_json(tmp_path / "scores.json", content)
    return Run.at(tmp_path)


def test_a_chain_of_runs_has_the_scores_after_each(tmp_path):
    def scored(name, extends, own, earlier=None, **more):
        run = Run.at(tmp_path / name)
        run.path.mkdir()
        for path, tasks in ((run.scores_path, own), (run.earlier_scores_path, earlier)):
            if tasks:
                of_tasks = {
                    task: {"rouge_l": [score], "exact_match": [0]} for task, score in tasks.items()
                }
                write_json(path, {**mean_scores(of_tasks), **more})
        section = {"run": extends and str(tmp_path / extends)}
        run.config_path.write_text(json.dumps({"extend": section}))
        return run

    scored("gone", None, {"x": 1})
    first = scored("first", "gone", {"a": 50, "b": 60})
    shutil.rmtree(tmp_path / "gone")
    assert transfer_of_chain(first).empty
    order = {"order": ["c", "d"], "matrix": [[70, None], [65, 75]]}
    scored("second", "first", {"c": 65, "d": 75}, **order)
    third = scored("third", "second", {"c": 40}, {"a": 45, "d": 0})
    expected = {
        "a and 1 more": [50, 60, None, None],
        "c": [None, None, 70, None],
        "d": [None, None, 65, 75],
        "c (4)": [45, None, 40, 0],
    }
    assert rows(transfer_of_chain(third)) == [
        [stage, label, task, score]
        for stage, (label, scores) in enumerate(expected.items(), start=1)
        for task, score in zip("abcd", scores, strict=True)
    ]
    (source,) = read_sources([third.path])
    assert len(source.frames["transfer"]) == 16
    heat_map = scores_figures.transfer(source.frames["transfer"]).to_dict()
    assert '"a and 1 more"' in json.dumps(heat_map)


def test_transfer_has_the_score_matrix_and_refuses_malformed_ones(tmp_path):
    table = transfer(scored_run(tmp_path, ["b", "a"], [[50, None], [40, 70.5]]))
    assert rows(table) == [
        [1, "b", "b", 50],
        [1, "b", "a", None],
        [2, "a", "b", 40],
        [2, "a", "a", 70.5],
    ]
    refuses(
        r"matrix\.0\.0: input should be a valid number",
        transfer,
        scored_run(tmp_path, ["a"], [["x"]]),
    )
    refuses(
        "matrix: needs a row and a column per task",
        transfer,
        scored_run(tmp_path, ["a", "b"], [[1, 2], [1]]),
    )
