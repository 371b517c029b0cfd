"""Sketches, task gradients and shared units against autograd, loops and the stated errors."""

import math
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from analysis import naive_interference as naive
from badit.analysis import gradients, interference
from badit.analysis.coactivation import coactivation
from badit.analysis.tables import layer_and_module
from badit.method.sketches import SketchedSums
from refusals import refuses
from tuner.helpers import adapted

SIZES = {"rivers": 5, "cities": 4, "jokes": 1}  # a single instance cannot be split in halves
SHARE = 0.2
VECTORS = st.lists(
    st.lists(st.floats(-4, 4, width=16), min_size=3, max_size=3), min_size=5, max_size=5
)


def sketched(vectors_RN, size, seed):
    """Returns the sketches of several vectors."""
    sketch = SketchedSums(
        len(vectors_RN[0]), len(vectors_RN), size, torch.Generator().manual_seed(seed)
    )
    for i, vector_N in enumerate(vectors_RN):
        sketch.add(i, vector_N)
    return sketch


@given(st.integers(1, 60), st.integers(1, 24), st.integers(0, 1000))
def test_sketch_is_linear_with_one_signed_bucket_per_coordinate(length, size, seed):
    matrix_NM = sketched(torch.eye(length), size, seed).sums_RM
    assert matrix_NM.shape == (length, min(length, size))
    assert ((matrix_NM != 0).sum(dim=1) == 1).all()
    assert (matrix_NM.abs().sum(dim=1) == 1).all()
    for run_NM in matrix_NM.split(size):
        assert (run_NM != 0).sum(dim=0).max() <= 1, "coordinates of one run share no bucket"
    vectors_RN = torch.randn(2, length, generator=torch.Generator().manual_seed(seed))
    sketch = sketched(vectors_RN, size, seed)
    sketch.add(1, vectors_RN[0])
    torch.testing.assert_close(
        sketch.sums_RM, torch.stack([vectors_RN[0], vectors_RN.sum(dim=0)]) @ matrix_NM
    )
    exact_RN = vectors_RN.double()
    torch.testing.assert_close(
        sketched(vectors_RN, length + size, seed).gram(), exact_RN @ exact_RN.T
    )


@pytest.mark.parametrize("kind", ["noise", "column", "row", "constant"])
def test_inner_products_are_unbiased_with_bounded_variance(kind):
    """Two gradients of a weight (60, 32): correlated noise, a strong column or row, an offset."""
    a, b = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(3))
    strong = torch.ones(60, 32)
    # 32 divides the sketch size: without shifts, a column would use only two of the 64 buckets.
    strong[{"column": (slice(None), 5), "row": 7}.get(kind, slice(0))] = 50
    shift = 20 if kind == "constant" else 0
    a, b = (a * strong + shift).flatten(), ((0.5 * a + b) * strong - shift).flatten()
    size, repeats = 64, 250
    estimates = torch.stack([sketched([a, b], size, seed).gram()[0, 1] for seed in range(repeats)])
    exact = float(a.double() @ b.double())
    bound = (float(a @ a) * float(b @ b) + exact**2) / size
    assert abs(float(estimates.mean()) - exact) < 4 * math.sqrt(bound / repeats)
    assert 0 < float(estimates.var()) < 1.3 * bound


@given(VECTORS, VECTORS)
def test_agreement_matches_naive_formulas(of_a, of_b):
    instances = [torch.tensor(of).double() for of in (of_a, of_b[:4])]
    sums_R = torch.stack([of[half::2].sum(dim=0) for of in instances for half in (0, 1)])
    counts_T2, pairs_2E = torch.tensor([[3.0, 2.0], [2.0, 2.0]]).double(), torch.tensor([[0], [1]])
    of_pairs, of_tasks = gradients.agreement((sums_R @ sums_R.T)[None], counts_T2, pairs_2E)
    values = of_pairs | of_tasks
    assert not any(
        (values[name].abs() > 1).any() for name in ("cosine", "corrected_cosine", "reliability")
    )
    a, b = (of.mean(dim=0) for of in instances)
    if min(float(v.norm()) for v in (a, b, *sums_R)) <= 1e-3:
        return  # if the sums nearly cancel, their direction depends on rounding
    expected = {"cosine": naive.cosine(a, b), "magnitude_similarity": naive.magnitude(a, b)}
    if min(abs(float(sums_R[0] @ sums_R[1])), abs(float(sums_R[2] @ sums_R[3]))) > 1e-6:
        expected["corrected_cosine"] = naive.corrected(*instances)
    assert {name: float(values[name][0, 0]) for name in expected} == pytest.approx(
        expected, abs=1e-6, nan_ok=True
    )
    assert float(values["norm"][0, 0]) == pytest.approx(float(a.norm()), abs=1e-6)
    assert float(values["reliability"][0, 1]) == pytest.approx(naive.cosine(*sums_R[2:]), abs=1e-6)


def interference_tables(model, examples, sketch_size=16384):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("badit.analysis.interference.SKETCH_SIZE", sketch_size)
        frames = interference.measure_interference(model, naive.batched(examples))
        return {frame.attrs["name"]: frame for frame in frames}


def make_model(tiny_model, kind):
    if kind == "lora":
        options = {
            "target_modules": ["gate_proj"],
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
        }
        return get_peft_model(tiny_model("llama"), LoraConfig(r=2, lora_alpha=4, **options)).eval()
    return adapted(tiny_model("llama")) if kind == "badit" else tiny_model(kind)


def assert_same_rows(frame, expected):
    """Asserts that both have the same rows, in any order."""

    def key(row):
        return [str(value) for value in row if not isinstance(value, float) and value is not None]

    # Rounding may add or remove an instance: the place of this column, if there is one.
    counts = [*frame.columns].index("instances_needed") if "instances_needed" in frame else None
    # One sketch holds the whole gradient of an instance, so the ends of intervals are estimates.
    ends = [[*frame.columns].index(name) for name in ("high", "low") if name in frame]
    for row, twin in zip(
        sorted(naive.rows(frame), key=key), sorted(expected, key=key), strict=True
    ):
        twin = [None if value != value else value for value in twin]  # NaN: undefined
        if counts is not None:
            found, expected_count = row.pop(counts), twin.pop(counts)
            assert (found is None) == (expected_count is None)
            assert found is None or found == pytest.approx(expected_count, rel=1e-3, abs=1)
        for end in ends:
            assert row.pop(end) == pytest.approx(twin.pop(end), abs=0.06)
        assert row == pytest.approx(twin, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "badit", "lora"])
def test_large_sketches_match_naive_tables(tiny_model, kind, monkeypatch):
    monkeypatch.setattr("badit.analysis.interference.SHARE", SHARE)
    # Random gradients have little signal: with this limit some pairs are decided, not all.
    reliable = 0.02
    monkeypatch.setattr("badit.analysis.gradients.RELIABLE", reliable)
    model = make_model(tiny_model, kind)
    examples = naive.make_examples({**SIZES, "songs": 6, "words": 4})
    places = naive.places(model)
    parameters = dict(model.named_parameters())
    expected_places = {
        id(parameters[name]): place for place, names in places.items() for name in names
    }
    assert {id(p): place for place, p, _ in gradients.measured_parameters(model)} == expected_places
    assert layer_and_module("base_model.adapter") == (-1, "adapter"), "outside of the layers"
    counts = Counter(place[0] for place in places)
    assert counts["weights"] == 2 * (4 if kind == "gpt2" else 7)
    assert counts["adapter"] == 2 * (kind in ("badit", "lora"))
    with torch.no_grad():
        tables = interference_tables(model, examples, sketch_size=10**4)
    scores = {
        "neurons": naive.neuron_means(model, examples),
        "parameters": naive.row_scores(model, examples),
    }
    expected = naive.tables(model, examples, reliable)
    for of_kind, by_task in scores.items():
        marks = {
            task: [naive.marked(layer, SHARE) for layer in layers]
            for task, layers in by_task.items()
        }
        for name, rows in naive.coactivation(of_kind, marks).items():
            expected.setdefault(name, []).extend(rows)
    assert expected.keys() == tables.keys()
    for name, rows in expected.items():
        assert_same_rows(tables[name], rows)
    assert "strongest 0.2 of the units" in tables["coactivation"].attrs["about"]
    if kind != "gpt2":  # its random gradients have no signal
        assert tables["gradient_summary"]["decided"].nunique() > 1, "the shares must differ"
    monkeypatch.setattr("badit.analysis.gradients.MOST_PAIRS", len(tables["gradient_pairs"]) - 1)
    without = interference_tables(model, examples, sketch_size=10**4)
    assert without.keys() == tables.keys() - {"gradient_pairs"}
    assert f"{len(tables['gradient_pairs'])} rows" in without["gradient_summary"].attrs["about"]


def test_errors_of_small_sketches_agree_with_the_stated_standard_error(tiny_model):
    model, examples, size = tiny_model("llama"), naive.make_examples(SIZES), 128
    exact = {tuple(row[:4]): row[4] for row in naive.tables(model, examples)["gradient_pairs"]}
    table = interference_tables(model, examples, sketch_size=size)["gradient_pairs"]
    errors = torch.tensor(
        [row[4] - exact[tuple(row[:4])] for row in naive.rows(table)]
    ) * math.sqrt(size)
    assert 0.2 < errors.square().mean().sqrt() < 1.2
    assert errors.abs().max() < 4.5
    assert "at most 0.088" in table.attrs["about"]
    assert interference_tables(model, examples, sketch_size=size)["gradient_pairs"].equals(table), (
        "the signs are fixed"
    )


def test_hooks_and_gradients_are_removed_and_nonfinite_losses_are_refused(tiny_model):
    model, examples = make_model(tiny_model, "badit"), naive.make_examples(SIZES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    interference_tables(model, examples)
    examples["cities"][1]["labels"] = [-100] * len(examples["cities"][1]["labels"])
    refuses(
        "task cities, instance 1: the loss is not finite; no answer tokens",
        interference_tables,
        model,
        examples,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(p._post_accumulate_grad_hooks or p.grad is not None for p in model.parameters())
    model.model.model.layers[0].mlp.up_proj.weight.register_hook(
        lambda gradient: gradient * math.inf
    )
    message = "model.dtype: the gradients are not finite; use bfloat16 or float32"
    refuses(message, interference_tables, model, naive.make_examples({"a": 2}))
    model.get_base_model().model.norm.weight.data.fill_(math.nan)
    message = "task a, instance 0: the loss is not finite; the dtype may overflow"
    refuses(message, interference_tables, model, naive.make_examples({"a": 2}))


def test_at_most_one_gradient_is_stored_and_sketches_have_a_bounded_size(tiny_model):
    model, held = tiny_model("llama"), []
    parameters = [parameter for _, parameter, _ in gradients.measured_parameters(model)]
    for p in parameters:
        p.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(q.grad is not None for q in model.parameters()))
        )
    interference_tables(model, naive.make_examples({"a": 2, "b": 1}))
    assert held == [1] * (3 * len(parameters))
    sketches = gradients.TaskGradients(model, [1] * 50, 8, ExitStack()).sketches.values()
    sizes = [sketch.sums_RM.numel() for of_place in sketches for sketch in of_place]
    assert sum(sizes) <= len(parameters) * 2 * 50 * 8


@given(st.data())
def test_coactivation_matches_naive_counts(data):
    widths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    layers = [st.lists(st.booleans(), min_size=width, max_size=width) for width in widths]
    marks = data.draw(st.dictionaries(st.sampled_from("cabd"), st.tuples(*layers), min_size=1))
    marked = {
        k: torch.tensor([of_task[k] for of_task in marks.values()]).numpy()
        for k in range(len(widths))
    }
    frames = coactivation(list(marks), {"experts": marked, "neurons": marked}, "about")
    for frame, rows in zip(frames, naive.coactivation("experts", marks).values(), strict=True):
        assert_same_rows(frame, rows + [["neurons", *row[1:]] for row in rows])
    for _, of_layer in frames[0].groupby(["kind", "layer"]):
        assert of_layer[["share", "chance"]].sum().tolist() == pytest.approx([1, 1])
        # By chance, a unit has on average as many marks as observed.
        expected, observed = (
            sum(of_layer["tasks"] * of_layer[name]) for name in ("chance", "share")
        )
        assert observed == pytest.approx(expected)


def test_model_with_unknown_mlps_is_refused(tiny_model):
    batches, model = naive.batched(naive.make_examples(SIZES)), tiny_model("llama")
    model.model.layers[1].mlp.second = nn.ModuleDict({"gate_proj": nn.Linear(2, 2)})
    refuses(
        "for type llama: every layer needs one MLP with",
        interference.measure_interference,
        model,
        batches,
    )
    del model.model.layers[1].mlp
    refuses("for type llama", interference.measure_interference, model, batches)
