"""Interference between gradients: against whole gradients by autograd, and what the measurement leaves behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from analysis import naive_interference as naive
from badit.analysis.gradients import Agreement, TaskGradients, layer_and_module, measured_parameters
from badit.analysis.interference import measure_interference
from badit.analysis.tables import TidyTable
from badit.baselines.gain_lora import GainLoraConfig
from badit.errors import BaditError
from tuner.helpers import adapted

Model = Callable[..., Any]
SIZES = {"rivers": 5, "cities": 4, "jokes": 3}
GRADIENT_TABLES = ["gradient_pairs", "gradient_overall", "gradient_summary", "gradient_tasks"]


def measured(model: Any, examples: naive.Examples, **options: Any) -> dict[str, TidyTable]:
    batches = naive.batched(examples)
    return {table.name: table for table in measure_interference(model, batches, **options)}


def with_lora(model: Any) -> Any:
    lora = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj"], task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return lora.eval()


def make(tiny_model: Model, kind: str) -> Any:
    if kind in ("llama", "gpt2"):
        return tiny_model(kind)
    return {"badit": adapted, "lora": with_lora}[kind](tiny_model("llama"))


def assert_rows(rows: Any, expected: list[list[Any]], tolerance: float = 1e-4) -> None:
    """The same rows in any order; numbers to within the tolerance."""

    def key(row: list[Any]) -> list[str]:
        return [str(value) for value in row if not isinstance(value, float) and value is not None]

    assert len(rows) == len(expected) > 0
    for row, twin in zip(sorted(rows, key=key), sorted(expected, key=key), strict=True):
        assert list(row) == pytest.approx(twin, abs=tolerance), (row, twin)


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("model.layers.12.mlp.gate_proj", None, (12, "mlp.gate_proj")),
        ("transformer.h.3.mlp.c_fc", None, (3, "mlp.c_fc")),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer", None, (0, "self_attn.q_proj")),
        ("base_model.model.model.layers.7.mlp.gate_proj.badit_A.default", "badit_", (7, "mlp.gate_proj.adapter")),
        ("base_model.model.transformer.h.1.attn.c_attn.lora_A.x.weight", "lora_", (1, "attn.c_attn.adapter")),
        ("model.layers.2.mlp.experts.5.gate_proj", None, (2, "mlp.experts.5.gate_proj")),
        ("model.layers.2", None, (2, "")),
        ("base_model.badit_gate.default.key", "badit_", (-1, "adapter")),
        ("base_model.model.lm_head.lora_B.default.weight", "lora_", (-1, "lm_head.adapter")),
        ("model.embed_tokens", None, (-1, "embed_tokens")),
    ],
)
def test_names_tell_layer_and_module(name: str, prefix: str | None, expected: tuple[int, str]) -> None:
    assert layer_and_module(name, prefix) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "badit", "lora"])
def test_what_is_measured(tiny_model: Model, kind: str) -> None:
    model = make(tiny_model, kind)
    places = naive.places(model)
    parameters = dict(model.named_parameters())
    expected = {id(parameters[name]): place for place, names in places.items() for name in names}
    assert {id(item.parameter): item.place for item in measured_parameters(model)} == expected
    modules = 4 if kind == "gpt2" else 7
    assert len([place for place in places if place[0] == "weights"]) == 2 * modules
    assert len([place for place in places if place[0] == "adapter"]) == 2 * (kind in ("badit", "lora"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "badit", "lora"])
def test_large_sketches_give_the_naive_tables(tiny_model: Model, kind: str) -> None:
    model, examples = make(tiny_model, kind), naive.make_examples(SIZES)
    tables = measured(model, examples, sketch_size=10**4)
    expected = naive.tables(model, examples)
    for name in GRADIENT_TABLES:
        assert_rows(tables[name].rows, expected[name])
    rates = [row["conflict_rate"] for row in tables["gradient_summary"].records()]
    assert len(set(rates)) > 1, "rates that are all alike show nothing"


def test_small_sketches_are_off_by_no_more_than_they_say(tiny_model: Model) -> None:
    model, examples, size = tiny_model("llama"), naive.make_examples(SIZES), 128
    exact = {tuple(row[:4]): row[4] for row in naive.tables(model, examples)["gradient_pairs"]}
    table = measured(model, examples, sketch_size=size)["gradient_pairs"]
    errors = torch.tensor([row[4] - exact[tuple(row[:4])] for row in table.rows]) * math.sqrt(size)
    assert 0.2 < errors.square().mean().sqrt() < 1.2
    assert errors.abs().max() < 4.5
    assert "at most 0.088" in table.about
    again, other = (measured(model, examples, sketch_size=size, seed=seed)["gradient_pairs"] for seed in (0, 1))
    assert again.rows == table.rows != other.rows


@pytest.mark.parametrize(("family", "side"), [("llama", "right"), ("llama", "left"), ("gpt2", "left")])
def test_batches_and_padding_make_no_difference(tiny_model: Model, family: str, side: Any) -> None:
    model, examples = tiny_model(family), naive.make_examples(SIZES)
    one_by_one = measure_interference(model, naive.batched(examples, 1))
    together = measure_interference(model, naive.batched(examples, 9, side))
    for table, other in zip(one_by_one, together, strict=True):
        assert_rows(table.rows, [list(row) for row in other.rows], 1e-6)


class State:
    """All that the measurement touches in a model."""

    def __init__(self, model: Any) -> None:
        parameters = list(model.parameters())
        self.values = [parameter.detach().clone() for parameter in parameters]
        self.gradients = [parameter.grad for parameter in parameters]
        self.flags = [parameter.requires_grad for parameter in parameters]
        self.modes = [module.training for module in model.modules()]
        self.hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        self.hooks += [len(getattr(p, "_post_accumulate_grad_hooks", None) or {}) for p in parameters]

    def assert_equals(self, other: State) -> None:
        assert all(a is b for a, b in zip(self.gradients, other.gradients, strict=True))
        assert all(map(torch.equal, self.values, other.values))
        assert (self.flags, self.modes, self.hooks) == (other.flags, other.modes, other.hooks)


@pytest.mark.parametrize("kind", ["llama", "badit", "lora"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny_model: Model, kind: str, fails: bool) -> None:
    model, examples = make(tiny_model, kind).train(), naive.make_examples(SIZES)
    list(model.modules())[-1].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if i % 2 else None
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before = State(model)
    if fails:
        examples["jokes"][1]["labels"] = [-100] * len(examples["jokes"][1]["labels"])
        with pytest.raises(BaditError, match="task jokes, instance 1: has no finite loss; it has no answer tokens"):
            measured(model, examples)
    else:
        measured(model, examples)
    after = State(model)
    after.assert_equals(before)
    assert all(g is None or torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))


def test_a_frozen_model_is_measured_without_dropout_and_within_no_grad(tiny_model: Model) -> None:
    examples = naive.make_examples(SIZES)
    expected = measured(tiny_model("llama"), examples)
    model = tiny_model("llama", attention_dropout=0.5).requires_grad_(False).train()
    with torch.no_grad():
        tables = measured(model, examples)
    for name, table in expected.items():
        assert tables[name].rows == table.rows


def test_no_more_than_one_gradient_is_held(tiny_model: Model) -> None:
    model, held = tiny_model("llama"), []
    parameters = [item.parameter for item in measured_parameters(model)]

    def count(parameter: torch.Tensor) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))

    handles = [parameter.register_post_accumulate_grad_hook(count) for parameter in parameters]
    measured(model, naive.make_examples({"a": 2, "b": 1}))
    for handle in handles:
        handle.remove()
    assert held == [1] * (3 * len(parameters))
    tasks = 50
    sums = TaskGradients(model, tasks, sketch_size=8, seed=0)
    kept = sum(sketch.sums_RM.numel() for sketch in sums._sketches)
    assert kept <= len(parameters) * 2 * tasks * 8


def test_bfloat16_comes_near_float32(tiny_model: Model) -> None:
    examples = naive.make_examples(SIZES)
    exact = measured(tiny_model("llama"), examples)["gradient_overall"]
    table = measured(tiny_model("llama", dtype=torch.bfloat16), examples)["gradient_overall"]
    assert "in bfloat16" in table.about
    for row, twin in zip(table.rows, exact.rows, strict=True):
        assert row[3] == pytest.approx(twin[3], abs=0.05)


def test_equal_tasks_agree_and_one_instance_has_no_halves(tiny_model: Model) -> None:
    examples = naive.make_examples({"a": 4, "b": 1})
    examples["c"] = copy.deepcopy(examples["a"])
    tables = measured(tiny_model("llama"), examples)
    overall = {(row["task_a"], row["task_b"]): row for row in tables["gradient_overall"].records()}
    assert overall["a", "c"]["cosine"] == pytest.approx(1)
    assert overall["a", "c"]["magnitude_similarity"] == pytest.approx(1)
    assert overall["a", "b"]["corrected_cosine"] is None is overall["b", "c"]["corrected_cosine"]
    assert overall["a", "b"]["cosine"] is not None
    reliability = {row["task"]: row["reliability"] for row in tables["gradient_tasks"].records()}
    assert reliability["b"] is None
    assert reliability["a"] == pytest.approx(reliability["c"])


def test_a_single_task_has_no_pairs(tiny_model: Model) -> None:
    tables = measured(tiny_model("llama"), naive.make_examples({"a": 2}))
    assert tables["gradient_pairs"].rows == tables["gradient_overall"].rows == []
    for row in tables["gradient_summary"].records():
        assert row["conflict_rate"] is row["mean_cosine"] is row["mean_magnitude_similarity"] is None
        assert -1 <= row["reliability"] <= 1


def test_a_gate_beside_the_layers_belongs_to_the_adapter(tiny_model: Model) -> None:
    config = GainLoraConfig(r=2, gate_hidden_size=4, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    tables = measured(get_peft_model(tiny_model("llama"), config).eval(), naive.make_examples({"a": 2, "b": 2}))
    places = {
        (row["layer"], row["module"]) for row in tables["gradient_summary"].records() if "adapter" in row.values()
    }
    assert places <= {(-1, "adapter"), (0, "mlp.gate_proj.adapter"), (1, "mlp.gate_proj.adapter")}
    assert len(places) >= 2


vectors = st.lists(st.lists(st.floats(-4, 4, width=16), min_size=3, max_size=3), min_size=5, max_size=5)


@settings(deadline=None, max_examples=100)
@given(vectors, vectors)
def test_agreement_follows_from_the_inner_products(of_a: list[list[float]], of_b: list[list[float]]) -> None:
    instances = [[{"g": torch.tensor(v).double()} for v in of] for of in (of_a, of_b[:4])]
    sums = [sum((g["g"] for g in half), torch.zeros(3).double()) for of in instances for half in naive.halves(of)]
    sums_R = torch.stack(sums)
    agreement = Agreement(sums_R @ sums_R.T, torch.tensor([[3.0, 2.0], [2.0, 2.0]]).double())
    a, b = (naive.flat(of, ["g"]) for of in instances)

    def same(value: torch.Tensor, expected: float | None) -> bool:
        return bool(value.isnan()) if expected is None else float(value) == pytest.approx(expected, abs=1e-6)

    # Where sums all but cancel, rounding settles whether there is a direction.
    if min(float(v.norm()) for v in (a, b, *sums)) > 1e-3:
        assert same(agreement.cosine_TT[0, 1], naive.cosine(a, b))
        assert same(agreement.magnitude_TT[0, 1], naive.magnitude(a, b))
        assert same(agreement.norm_T[0], float(a.norm()))
        assert same(agreement.reliability_T[1], naive.cosine(sums[2], sums[3]))
        if min(abs(float(sums[0] @ sums[1])), abs(float(sums[2] @ sums[3]))) > 1e-6:
            assert same(agreement.corrected_TT[0, 1], naive.corrected(*instances, ["g"]))
    for values in (agreement.cosine_TT, agreement.corrected_TT, agreement.reliability_T):
        assert not (values.abs() > 1).any()


def test_the_correction_undoes_the_noise_of_few_instances() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, generator=generator).double()
    b = 0.6 * a + 0.8 * b
    sums_R = torch.stack([v + 1.5 * torch.randn(4000, generator=generator).double() for v in (a, a, b, b)])
    agreement = Agreement(sums_R @ sums_R.T, torch.ones(2, 2).double())
    assert float(agreement.cosine_TT[0, 1]) < 0.35
    assert float(agreement.corrected_TT[0, 1]) == pytest.approx(0.6, abs=0.08)


def test_bad_input_is_refused(tiny_model: Model) -> None:
    model, batches = tiny_model("llama"), naive.batched(naive.make_examples({"a": 2}))
    for size in (0, 1.5, True):
        with pytest.raises(BaditError, match="sketch_size must be a whole number of at least 1"):
            measure_interference(model, batches, sketch_size=size)  # pyright: ignore[reportArgumentType]
    for share in (0, 1.1, "all"):
        with pytest.raises(BaditError, match="share must be above 0 and at most 1"):
            measure_interference(model, batches, share=share)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BaditError, match="batches: there are none"):
        measure_interference(model, {})
    with pytest.raises(BaditError, match="batches: task b has no instances"):
        measure_interference(model, {**batches, "b": []})
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(BaditError, match="task a, instance 0: has no finite loss; it may overflow in its type"):
        measure_interference(model, batches)
