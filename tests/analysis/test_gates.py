"""The gates of every method against each layer's own router, without side effects."""

from collections import Counter
from statistics import fmean

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from analysis import naive_experts as naive
from analysis.naive_experts import BATCHES, METHODS, ROWS, TASKS
from badit.analysis.coactivation import coactivation, marked_experts
from badit.analysis.gates import clusters_frame, gates_frame, prompt_gates
from badit.baselines.branches import OLoraConfig
from badit.tuner import BaditConfig, hooks_of
from badit.tuner.experts import active_experts, adapted_layers, changed_gates
from refusals import refuses
from tuner import helpers


@pytest.mark.parametrize("method", METHODS)
def test_gates_match_naive_gates_of_single_rows_without_side_effects(tiny_model, method):
    model = naive.adapted(tiny_model("llama"), method, target_modules=["gate_proj", "o_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = naive.losses(model, ROWS["cities"][0])
    gates = prompt_gates(model, BATCHES)
    assert naive.losses(model, ROWS["cities"][0]) == losses
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert gates.modules == [
        (layer, name) for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.gate_proj")
    ]
    assert list(gates.by_task) == list(TASKS)
    for task in TASKS:
        expected = np.array([naive.gates(model, row) for row in ROWS[task]])
        np.testing.assert_allclose(gates.by_task[task], expected, atol=2e-5)
        np.testing.assert_allclose(gates.by_task[task].mean(axis=-1), 1, atol=1e-6)
        assert (
            gates.by_task[task].std(axis=-1).max() > 0.05
        )  # the comparison needs gates that differ


def test_gates_of_a_model_that_flattens_positions_into_rows():
    model = helpers.adapted(helpers.opt())
    together, apart = (prompt_gates(model, batches) for batches in (BATCHES, ROWS))
    for task in BATCHES:
        np.testing.assert_allclose(together.by_task[task], apart.by_task[task], atol=2e-5)


def test_gates_at_step_0_are_neutral_and_an_error_restores_the_layers(tiny_model):
    model = helpers.adapt(tiny_model("llama"))
    with (
        pytest.raises(ZeroDivisionError),
        changed_gates(active_experts(model), lambda experts, gates: 1 / 0),
    ):
        naive.losses(model, ROWS["cities"][0])
    assert not any("gates" in vars(layer) for layer in naive.layers(model))
    gates = prompt_gates(model, BATCHES)
    np.testing.assert_allclose(gates.means, 1, atol=1e-6)
    assert not any(marked_TU.any() for marked_TU in marked_experts(gates).values())


def test_an_inner_change_of_gates_gets_those_of_the_outer_one_and_restores_it(tiny_model):
    model = helpers.adapted(tiny_model("llama"))
    layers = active_experts(model)
    seen = []

    def observe(adapted, gates):
        seen.append(set(gates.flatten().tolist()))
        return gates

    with changed_gates(layers, lambda adapted, gates: torch.full_like(gates, 0.5)):
        outer = naive.losses(model, ROWS["cities"][0])
        with changed_gates(layers, observe):
            assert naive.losses(model, ROWS["cities"][0]) == outer
        assert naive.losses(model, ROWS["cities"][0]) == outer
    assert seen == [{0.5}] * len(layers)
    assert not any("gates" in vars(adapted.layer) for adapted in layers)
    assert naive.losses(model, ROWS["cities"][0]) != outer


def test_a_change_of_gates_gets_those_of_its_own_adapter_only(tiny_model):
    model = helpers.adapted(tiny_model("llama"))
    model.add_adapter("second", helpers.config(num_experts=2))
    model.base_model.set_adapter(["default", "second"])
    calls = Counter()

    def count(adapted, gates):
        calls[adapted.adapter, gates.shape[-1]] += 1
        return gates

    with changed_gates(adapted_layers(model), count):
        naive.losses(model, ROWS["cities"][0])
    assert calls == {("default", 3): 2, ("second", 2): 2}
    assert not any("gates" in vars(layer) for layer in naive.layers(model))


def test_table_has_the_mean_over_prompts(tiny_model):
    batches = {**BATCHES, "seas": BATCHES["seas"][1:]}  # a single prompt
    gates = prompt_gates(helpers.adapted(tiny_model("llama")), batches)
    table = gates_frame(gates)
    assert len(table) == 3 * 2 * 3
    assert set(table["module"]) == {"mlp.gate_proj"}
    for row in table.itertuples():
        values = gates.by_task[row.task][:, row.layer, row.expert].tolist()
        assert row.mean == pytest.approx(fmean(values), abs=1e-5)
    assert "1 to 3 prompts of each of 3 tasks" in table.attrs["about"]


@pytest.mark.parametrize(("layers", "shapes"), [("01", {0: (3, 6), 1: (3, 9)}), ("1", {1: (3, 9)})])
def test_marked_experts_have_a_mean_gate_above_neutral(tiny_model, layers, shapes):
    modules = rf".*(layers\.[{layers}]\.mlp\.(gate|up)_proj|layers\.1\.self_attn\.o_proj)"
    gates = prompt_gates(helpers.adapted(tiny_model("llama"), target_modules=modules), BATCHES)
    marked = marked_experts(gates)
    assert {layer: marked_TU.shape for layer, marked_TU in marked.items()} == shapes
    for layer, marked_TU in marked.items():
        of_layer = [m for m, (number, _) in enumerate(gates.modules) if number == layer]
        gates_TU = np.concatenate([gates.means[:, m] for m in of_layer], axis=1)
        assert marked_TU.tolist() == (gates_TU > 1).tolist()
    assert 0 < sum(int(marked_TU.sum()) for marked_TU in marked.values()) < 3 * 15
    counts, by_task, pairs = coactivation(TASKS, {"experts": marked, "parameters": {}}, "")
    assert set(counts["layer"]) == set(by_task["layer"]) == shapes.keys()
    assert set(pairs["kind"]) == {"experts"}, "a kind without units is left out"


def test_active_experts_may_be_empty_and_several_active_adapters_are_refused(tiny_model):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for config in (None, lora, OLoraConfig(r=2, task_type="CAUSAL_LM")):
        model = (
            tiny_model("llama") if config is None else get_peft_model(tiny_model("llama"), config)
        )
        assert active_experts(model) == []
    model = helpers.adapted(tiny_model("llama"))
    model.add_adapter("second", helpers.config())
    model.base_model.set_adapter(["default", "second"])
    refuses("several adapters are active", prompt_gates, model, BATCHES)


@pytest.mark.parametrize(("key", "places"), [("layer", 2), ("embedding", 1)])
def test_clusters_are_those_of_the_codes_that_prompts_get(tiny_model, key, places):
    options = {"gates": "clusters", "num_clusters": 3, "num_experts": 4, "r": 1, "key": key}
    model = get_peft_model(tiny_model("llama"), BaditConfig(**options)).eval()
    hooks_of(model).start_task(BATCHES)
    gates = prompt_gates(model, BATCHES)
    table = clusters_frame(model, gates)
    assert len(table) == len(BATCHES) * places * 3
    assert set(table["layer"]) == ({-1} if key == "embedding" else {0, 1})
    sums = table.groupby(["task", "layer"])["share"].sum()
    assert sums.tolist() == pytest.approx([1.0] * len(sums))
    layer = active_experts(model)[0].layer
    codes = layer.badit_codes["default"]
    for task, gates_PMK in gates.by_task.items():
        counts = [0] * 3
        for gates_K in gates_PMK[:, 0]:
            scaled = gates_K / gates_K.sum()
            (cluster,) = [
                c for c in range(3) if codes[c].numpy() == pytest.approx(scaled, abs=1e-4)
            ]
            counts[cluster] += 1
        first = table[(table["task"] == task) & (table["layer"] == table["layer"].min())]
        assert first["share"].tolist() == pytest.approx([n / len(gates_PMK) for n in counts])
    # The tasks of an extension are one more cluster.
    hooks_of(model).add_tasks(["new"], rank=1, clusters=2)
    hooks_of(model).start_task({"new": BATCHES["cities"]})
    extended = prompt_gates(model, BATCHES)
    shares = clusters_frame(model, extended).query("cluster == 3").groupby("task")["share"]
    assert shares.max().to_dict() == {task: float(task == "cities") for task in BATCHES}
    assert "have the same gates" in clusters_frame(model, extended).attrs["about"]
    model.peft_config["default"].mixing = 1.0
    assert "gates are most similar" in clusters_frame(model, extended).attrs["about"]
    router = helpers.adapted(tiny_model("llama"))
    assert clusters_frame(router, prompt_gates(router, BATCHES)).empty
