"""Angles from a run's logs and from the finished adapter's gradients, and the flow of components."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from badit.analysis.experts import component_flow, expert_angles, held_out_angles

import reference
from analysis import naive_experts as naive
from analysis.naive_experts import TASKS
from badit.errors import BaditError
from badit.method import cosine_gram
from badit.method import expert_angles as angles_of
from badit.recipe import build_recipe
from badit.runs import RunFolder
from badit.train import fit
from badit.training.scoring import load_run
from tuner import helpers

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - :UserWarning")  # PEFT 0.19

FIELDS = ("intra_degrees", "inter_degrees", "intra_abs_cos", "inter_abs_cos")
NAME = "model.layers.1.mlp.gate_proj.default"
WITH_COMPONENTS = ("badit", "badit token", "loramoe", "goat")


def log(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def regrouping(step, before=(0, 0, 1, 1), after=(1, 0, 0, 1), **angles):
    return {"step": step, "module": NAME, "previous_labels": list(before), "labels": list(after), **angles}


# --- logs ---


def test_angles_come_from_both_logs(tmp_path):
    after = dict(zip(FIELDS, (70.0, 90.0, 0.4, 0.1), strict=True))
    before = {f"previous_{field}": value for field, value in zip(FIELDS, (85.0, 88.0, 0.2, 0.2), strict=True)}
    log(tmp_path / "regroupings.jsonl", regrouping(10, **before, **after), regrouping(20))
    log(tmp_path / "angles.jsonl", {"step": 5, "module": NAME, **after, "intra_degrees": None})
    table = expert_angles(RunFolder(tmp_path))
    assert list(table.columns) == [
        "step", "layer", "module", "measured", "within_degrees", "between_degrees", "within_abs_cos", "between_abs_cos"
    ]  # fmt: skip
    assert table.rows == [
        [10, 1, "mlp.gate_proj", "before", 85.0, 88.0, 0.2, 0.2],
        [10, 1, "mlp.gate_proj", "after", 70.0, 90.0, 0.4, 0.1],
        [5, 1, "mlp.gate_proj", "training", None, 90.0, 0.4, 0.1],
    ]  # no step followed the regrouping at 20


def test_a_run_without_logs_has_no_rows(tmp_path):
    assert expert_angles(RunFolder(tmp_path)).rows == []
    assert component_flow(RunFolder(tmp_path)).rows == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"step": 10, "modules": 30, "intra_degrees": 70.0}, "line 2: module: field required"),
        (regrouping(10, after=(0, 1)), "line 2: labels and previous_labels must name the same number"),
        (regrouping(10, after=(0, 1, 0, 10**9)), "line 2: labels and previous_labels must be experts"),
        (regrouping(10, before=(0, 1, 0, -1)), "line 2: labels and previous_labels must be experts"),
        ({**regrouping(10), "labels": "0011"}, "line 2: labels: input should be a valid list"),
        ([1, 2], "must hold one JSON object, not a list .line 2"),
    ],
)
def test_a_damaged_log_is_refused(tmp_path, line, message):
    log(tmp_path / "regroupings.jsonl", regrouping(5), line)
    for read in (expert_angles, component_flow):
        with pytest.raises(BaditError, match=message) as caught:
            read(RunFolder(tmp_path))
        assert str(caught.value).startswith(str(tmp_path / "regroupings.jsonl"))
        assert "\n" not in str(caught.value)
    (tmp_path / "regroupings.jsonl").write_text("{nonsense\n")
    with pytest.raises(BaditError, match="invalid JSON at line 1"):
        component_flow(RunFolder(tmp_path))


def test_flow_counts_moves_and_stays(tmp_path):
    log(tmp_path / "regroupings.jsonl", regrouping(10), regrouping(20, before=(1, 0, 0, 1), after=(1, 0, 0, 1)))
    table = component_flow(RunFolder(tmp_path))
    assert list(table.columns) == ["step", "layer", "module", "from_expert", "to_expert", "components"]
    place = [1, "mlp.gate_proj"]
    assert table.rows == [
        [10, *place, 0, 0, 1], [10, *place, 0, 1, 1], [10, *place, 1, 0, 1], [10, *place, 1, 1, 1],
        [20, *place, 0, 0, 2], [20, *place, 1, 1, 2],
    ]  # fmt: skip


def test_a_trained_run(recipe_values):
    """Four experts of rank 2, regrouped after steps 3, 6 and 9 of twelve."""
    run = fit(build_recipe(recipe_values), progress=False)
    flow = component_flow(run).records()
    assert {row["step"] for row in flow} == {3, 6, 9}
    outflow, inflow = Counter(), Counter()
    for row in flow:
        outflow[row["step"], row["layer"], row["from_expert"]] += row["components"]
        inflow[row["step"], row["layer"], row["to_expert"]] += row["components"]
    assert set(outflow.values()) == set(inflow.values()) == {2}  # nothing is lost: every expert keeps its rank
    assert len(outflow) == len(inflow) == 3 * 2 * 4
    assert any(row["from_expert"] != row["to_expert"] for row in flow)

    model, _ = load_run(run)
    rows = expert_angles(run, model, naive.batches()).records()
    counts = Counter(row["measured"] for row in rows)
    assert counts == {"before": 3 * 2, "after": 3 * 2, "held-out": 2}
    assert {row["step"] for row in rows if row["measured"] == "held-out"} == {12}
    assert all(0 < row["within_degrees"] < 180 for row in rows)


# --- held-out gradients ---


@pytest.mark.parametrize("method", WITH_COMPONENTS)
def test_held_out_angles_equal_the_naive_ones(tiny_model, method):
    model = naive.adapted(tiny_model("llama"), method, target_modules=["gate_proj", "v_proj"])
    batches = naive.batches()
    found = held_out_angles(model, batches)
    assert list(found) == [(0, "self_attn.v_proj"), (0, "mlp.gate_proj"), (1, "self_attn.v_proj"), (1, "mlp.gate_proj")]
    for angles, layer, gradients in zip(
        found.values(), naive.layers(model), naive.gradients(model, batches), strict=True
    ):
        expected = reference.angles(reference.unit_gradients(*gradients), naive.expert_of(layer))
        assert angles == pytest.approx(expected, abs=0.02)
    assert np.std([angles[0] for angles in found.values()]) > 0.5


@pytest.mark.parametrize("method", ["hydralora", "mtl-lora"])
def test_experts_that_share_A_have_no_components(tiny_model, method):
    assert held_out_angles(naive.adapted(tiny_model("llama"), method), naive.batches()) == {}


def test_the_split_into_batches_makes_no_difference_and_nothing_is_left_behind(tiny_model):
    model = naive.adapted(tiny_model("llama"), "badit").requires_grad_(False)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    batches = naive.batches()
    with torch.no_grad():
        whole = held_out_angles(model, batches)
    split = held_out_angles(model, {task: naive.rows(batches[task]) for task in reversed(TASKS)})
    for place, angles in whole.items():
        assert angles == pytest.approx(split[place], abs=0.01)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["base_model.model.lm_head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_single_component_an_expert_has_no_angles_within(tiny_model):
    model = helpers.adapted(tiny_model("llama"), r=1)
    within, between, within_cos, between_cos = held_out_angles(model, naive.batches())[0, "mlp.gate_proj"]
    assert within is None
    assert within_cos is None
    assert 0 < between < 180
    assert 0 <= between_cos <= 1


def test_planted_experts_are_seen():
    """Components of one expert pull one way, those of two experts at right angles."""
    labels = np.array([0, 1, 0, 1])
    grad_A = torch.zeros(4, 6)
    grad_A[[0, 2], 0], grad_A[[1, 3], 1] = 1.0, torch.tensor([2.0, -1.0])
    angles = angles_of(cosine_gram(grad_A, torch.zeros(5, 4)).numpy(), labels)
    assert angles == pytest.approx((90.0, 90.0, 1.0, 0.0))  # expert 0 at 0°, expert 1's two at 180°
