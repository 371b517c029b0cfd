"""Units that tasks share: the counts against loops, the chances against enumeration, and what marks the units."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analysis import naive_interference as naive
from badit.analysis.interference import coactivation, measure_interference
from badit.errors import BaditError
from tuner.helpers import adapted

Model = Callable[..., Any]
SIZES = {"rivers": 3, "cities": 2, "jokes": 2}
SHARE = 0.2


def projections(model):
    inner = getattr(model, "get_base_model", lambda: model)()
    if hasattr(inner, "transformer"):
        return [block.mlp.c_fc for block in inner.transformer.h]
    return [layer.mlp.gate_proj for layer in inner.model.layers]


def assert_same(frame, expected):
    for row, twin in zip(naive.rows(frame), expected, strict=True):
        assert row == pytest.approx(twin, abs=1e-9), (row, twin)


@st.composite
def all_marks(draw):
    """One to four tasks, one to three layers of one to six units each."""
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    names = draw(st.lists(st.sampled_from("cabd"), min_size=1, max_size=4, unique=True))
    one = [st.lists(st.booleans(), min_size=width, max_size=width) for width in widths]
    return {name: [draw(layer) for layer in one] for name in names}


@settings(deadline=None, max_examples=100)
@given(all_marks())
def test_the_counts_are_the_naive_ones(marks):
    marked = {name: [torch.tensor(layer) for layer in layers] for name, layers in marks.items()}
    frames = {frame.attrs["name"]: frame for frame in coactivation({"experts": marked, "neurons": marked}, "about")}
    for name, rows in naive.coactivation("experts", marks).items():
        assert_same(frames[name], rows + [["neurons", *row[1:]] for row in rows])
    for _, of_layer in frames["coactivation"].groupby(["kind", "layer"]):
        assert of_layer[["share", "chance"]].sum().tolist() == pytest.approx([1, 1])
        # On average a unit has as many marks by chance as it really has.
        expected, observed = (sum(of_layer["tasks"] * of_layer[name]) for name in ("chance", "share"))
        assert observed == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "badit"])
def test_the_tables_are_the_naive_ones(tiny_model, kind, monkeypatch):
    monkeypatch.setattr("badit.analysis.interference.SHARE", SHARE)
    model = adapted(tiny_model("llama")) if kind == "badit" else tiny_model(kind)
    examples = naive.make_examples(SIZES)
    scores = {
        "neurons": naive.neuron_means(model, examples, projections),
        "parameters": naive.row_scores(model, examples),
    }
    expected = {}
    for of_kind, by_task in scores.items():
        marks = {task: [naive.marked(layer, SHARE) for layer in layers] for task, layers in by_task.items()}
        for name, rows in naive.coactivation(of_kind, marks).items():
            expected.setdefault(name, []).extend(rows)
    frames = {f.attrs["name"]: f for f in measure_interference(model, naive.batched(examples))}
    for name, rows in expected.items():
        assert_same(frames[name], rows)
    assert "strongest 0.2 of the units" in frames["coactivation"].attrs["about"]


def test_a_model_without_known_mlps_is_refused(tiny_model):
    batches = naive.batched(naive.make_examples(SIZES))
    model = tiny_model("llama")
    model.model.layers[1].mlp.second = nn.ModuleDict({"gate_proj": nn.Linear(2, 2)})
    with pytest.raises(BaditError, match="of type llama: every layer needs one MLP, with"):
        measure_interference(model, batches)
    del model.model.layers[1].mlp
    with pytest.raises(BaditError, match="of type llama"):
        measure_interference(model, batches)
