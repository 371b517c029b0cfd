"""Units that tasks share: the counts against loops, the chances against enumeration, and what marks the units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from badit.analysis.coactivation import COLUMNS, NeuronMeans, coactivation_tables, strongest, tidy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn

from analysis import naive_interference as naive
from badit.analysis.gradients import TaskGradients
from badit.analysis.interference import measure_interference
from badit.errors import BaditError
from badit.trainer import answer_losses
from tuner.helpers import adapted

Model = Callable[..., Any]
SIZES = {"rivers": 3, "cities": 2, "jokes": 2}
FAMILIES = ["llama", "gpt2", "badit"]


def make(tiny_model: Model, kind: str) -> Any:
    return adapted(tiny_model("llama")) if kind == "badit" else tiny_model(kind)


def projections(model: Any) -> list[Any]:
    inner = getattr(model, "get_base_model", lambda: model)()
    if hasattr(inner, "transformer"):
        return [block.mlp.c_fc for block in inner.transformer.h]
    return [layer.mlp.gate_proj for layer in inner.model.layers]


def assert_same(rows: list[list[Any]], expected: list[list[Any]]) -> None:
    assert len(rows) == len(expected)
    for row, twin in zip(rows, expected, strict=True):
        assert list(row) == pytest.approx(twin, abs=1e-9), (row, twin)


@st.composite
def all_marks(draw: st.DrawFn) -> dict[str, list[list[bool]]]:
    """One to four tasks, one to three layers of one to six units each."""
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    names = draw(st.lists(st.sampled_from("cabd"), min_size=1, max_size=4, unique=True))
    one = [st.lists(st.booleans(), min_size=width, max_size=width) for width in widths]
    return {name: [draw(layer) for layer in one] for name in names}


@settings(deadline=None, max_examples=100)
@given(all_marks())
def test_the_counts_are_the_naive_ones(marks: dict[str, list[list[bool]]]) -> None:
    marked = {name: [torch.tensor(layer) for layer in layers] for name, layers in marks.items()}
    tables = coactivation_tables("experts", marked)
    expected = naive.coactivation("experts", marks)
    for name, rows in tables.items():
        assert_same(rows, expected[name])
    for layer in range(len(next(iter(marks.values())))):
        of_layer = [row for row in tables["coactivation"] if row[1] == layer]
        assert sum(row[3] for row in of_layer) == pytest.approx(1)
        assert sum(row[4] for row in of_layer) == pytest.approx(1)
        # On average a unit has as many marks by chance as it really has.
        assert sum(row[2] * row[3] for row in of_layer) == pytest.approx(sum(row[2] * row[4] for row in of_layer))
    for table in tidy([tables, tables], "twice"):
        assert len(table.rows) == 2 * len(tables[table.name])
        assert list(table.columns) == list(COLUMNS[table.name])


def test_chance_is_binomial_and_the_overlap_of_independent_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks, units, share = 5, 4000, 0.1
    marked = {
        f"task {i}": torch.stack(strongest(torch.rand(2, units, generator=generator).unbind(), share))
        for i in range(tasks)
    }
    tables = coactivation_tables("neurons", marked)
    for _, _, count, observed, chance in tables["coactivation"]:
        assert chance == pytest.approx(binom.pmf(count, tasks, share))
        assert observed == pytest.approx(chance, abs=0.02)
    for *_, overlap, chance in tables["coactivation_pairs"]:
        assert chance == pytest.approx(share / (2 - share))
        assert overlap == pytest.approx(chance, abs=0.015)


def test_tasks_of_other_units_cannot_be_counted_together() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    for marked in ({}, {"a": mask, "b": mask[:1]}, {"a": mask, "b": mask[:, :2]}):
        with pytest.raises(
            BaditError, match="marked: give at least one task, and for all tasks units of the same layers"
        ):
            coactivation_tables("experts", marked)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=3), st.floats(0.01, 1))
def test_each_layer_has_its_own_strongest(scores: list[list[int]], share: float) -> None:
    masks = strongest([torch.tensor(layer, dtype=torch.float32) for layer in scores], share)
    assert [mask.tolist() for mask in masks] == [naive.marked(layer, share) for layer in scores]


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_are_the_naive_ones(tiny_model: Model, kind: str) -> None:
    model, examples = make(tiny_model, kind), naive.make_examples(SIZES)
    neurons, gradients = NeuronMeans(model, len(examples)), TaskGradients(model, len(examples), 8, seed=0)
    expected_means = naive.neuron_means(model, examples, projections)
    expected_rows = naive.row_scores(model, examples)
    with gradients.taking():
        for number, of_task in enumerate(naive.batched(examples, 1).values()):
            for batch in of_task:
                gradients.begin_instance(number)
                with neurons.counting(number):
                    answer_losses(model, batch, model)[0].mean().backward()
    for number, task in enumerate(examples):
        for of_layer, twins in zip(neurons.of_task(number), expected_means[task], strict=True):
            torch.testing.assert_close(of_layer, torch.tensor(twins), rtol=1e-4, atol=1e-5)
        for of_layer, twins in zip(gradients.row_scores(number), expected_rows[task], strict=True):
            torch.testing.assert_close(of_layer, torch.tensor(twins), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tables_are_the_naive_ones(tiny_model: Model, kind: str) -> None:
    model, examples, share = make(tiny_model, kind), naive.make_examples(SIZES), 0.2
    scores = {
        "neurons": naive.neuron_means(model, examples, projections),
        "parameters": naive.row_scores(model, examples),
    }
    expected: dict[str, list[list[Any]]] = {name: [] for name in COLUMNS}
    for of_kind, by_task in scores.items():
        marks = {task: [naive.marked(layer, share) for layer in layers] for task, layers in by_task.items()}
        for name, rows in naive.coactivation(of_kind, marks).items():
            expected[name] += rows
    tables = {t.name: t for t in measure_interference(model, naive.batched(examples), share=share)}
    for name, rows in expected.items():
        assert_same([list(row) for row in tables[name].rows], rows)
    assert "strongest 0.2 of the units" in tables["coactivation"].about


class Odd(nn.Module):
    """A model whose one layer has two MLPs."""

    def __init__(self) -> None:
        super().__init__()
        experts = [nn.ModuleDict({"gate_proj": nn.Linear(2, 2)}) for _ in range(2)]
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList(experts)})])


def test_a_model_without_known_mlps_is_refused(tiny_model: Model) -> None:
    with pytest.raises(
        BaditError, match="co-activation does not go with a model of type Odd: every layer needs one MLP"
    ):
        NeuronMeans(Odd(), 1)
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj = nn.Identity()
    assert len(NeuronMeans(model, 1)._projections) == 2
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(BaditError, match=r"model of type llama: .*gate_proj"):
        NeuronMeans(model, 1)
