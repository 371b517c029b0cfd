"""MTL-LoRA: forward pass, initialisation, and the task of each row in training and generation."""

import re
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from badit.support.errors import BaditError
from badit.tuner import hooks_of
from baselines.naive import ROWS, TASKS, adapt, adapted, config, logits, loss, mtl_forward
from refusals import refuses
from tuner.helpers import (
    IDS,
    KINDS,
    MASK,
    base_layer,
    enable_checkpointing,
    forward,
    gradients,
    layers,
    randomise,
)


@given(
    st.sampled_from(KINDS), st.lists(st.sampled_from(TASKS), min_size=1, max_size=4), st.booleans()
)
def test_forward_matches_formula(kind, rows, with_positions):
    torch.manual_seed(0)
    options = config("mtl-lora", target_modules=["0"], task_type=None)
    model = randomise(
        get_peft_model(nn.Sequential(base_layer(kind, 12, 10)), options).double()
    ).eval()
    layer = layers(model)[0]
    x = torch.randn(len(rows), *([5] if with_positions else []), 12, dtype=torch.float64)
    with hooks_of(model).rows_of(rows):
        output = model(x)
    torch.testing.assert_close(output, mtl_forward(layer, x, rows), atol=1e-6, rtol=1e-6)
    assert (output - layer.get_base_layer()(x)).abs().mean() > 1e-4


def test_initialisation(tiny_model):
    layer = layers(adapt(tiny_model("llama"), "mtl-lora", r=4, num_experts=5))[0]
    out_features, in_features = layer.weight_OI.shape
    shapes = [
        tuple(getattr(layer, f"badit_{name}")["default"].shape)
        for name in ("A", "B", "lambda", "task_logits")
    ]
    assert shapes == [(4, in_features), (out_features, 20), (3, 4, 4), (3, 5)]
    assert not layer.badit_B["default"].any()
    assert torch.equal(layer.badit_lambda["default"], torch.eye(4).expand(3, 4, 4))
    for parameter, features in (
        (layer.badit_A["default"], in_features),
        (layer.badit_task_logits["default"], 5),
    ):
        bound = features**-0.5
        assert 0.7 * bound < parameter.abs().max().item() <= bound


def test_each_beam_needs_a_task(tiny_model):
    model = adapted(tiny_model("llama"), "mtl-lora")
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    message = r"sees 6 rows, but 3 tasks are given.*each beam"
    with hooks_of(model).rows_of(ROWS), pytest.raises(BaditError, match=message):
        model.generate(input_ids=IDS, attention_mask=MASK, **options)
    with hooks_of(model).rows_of([name for name in ROWS for _ in range(2)]):
        assert model.generate(input_ids=IDS, attention_mask=MASK, **options).shape == (3, 14)


def test_unknown_missing_or_too_few_tasks_are_refused(tiny_model):
    model = adapted(tiny_model("llama"), "mtl-lora")
    unknown = r"has no task 'river' \(did you mean 'rivers'\?\); its config lists its tasks"
    refuses(unknown, hooks_of(model).rows_of(["cities", "river"]).__enter__)
    for entry in (model, model.base_model, model.get_base_model()):
        refuses(
            r"each row's task: run it within .*hooks_of\(model\)\.rows_of\(names\)",
            entry,
            input_ids=IDS,
        )
        for names in (None, ["cities"] * 2):
            with hooks_of(model).rows_of(names):
                refuses(f"3 rows, but {len(names or [])} tasks", entry, input_ids=IDS)
        with hooks_of(model).rows_of(ROWS):
            entry(input_ids=IDS)


def test_nested_contexts_restore_the_outer_tasks_even_after_an_error(tiny_model):
    model = adapted(tiny_model("llama"), "mtl-lora")
    outer = logits(model)
    inner = logits(model, rows=["seas"] * 3)
    with hooks_of(model).rows_of(ROWS):
        assert torch.equal(logits(model, rows=["seas"] * 3), inner)
        with (
            pytest.raises(BaditError, match="3 rows, but 1 tasks"),
            hooks_of(model).rows_of(["seas"]),
        ):
            forward(model, IDS, MASK)
        assert torch.equal(forward(model, IDS, MASK).logits[MASK.bool()], outer)
    refuses("each row's task", forward, model, IDS, MASK)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_gradients(tiny_model, reentrant, within):
    """Two forward passes with different tasks before one backward pass."""
    all_gradients = []
    for checkpoint in (False, True):
        model = adapted(tiny_model("llama"), "mtl-lora").train()
        model.enable_input_require_grads()
        if checkpoint:
            enable_checkpointing(model, reentrant)
        total = loss(model, ROWS, use_cache=False) + 3.0 * loss(
            model, ["seas"] * 3, use_cache=False
        )
        with hooks_of(model).rows_of(["cities"]) if within else nullcontext():
            total.backward()
        all_gradients.append(gradients(model))
    torch.testing.assert_close(*all_gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tasks", [None, [], ["a", "b", "a"]])
def test_invalid_tasks_are_refused_when_the_adapter_is_created(tiny_model, tasks):
    options = config("mtl-lora", tasks=tasks)
    message = f"method.tasks: must list every task to be trained on once, by name, got {tasks!r}"
    refuses(f"^{re.escape(message)}$", get_peft_model, tiny_model("llama"), options)
    refuses(
        "^tasks: input should be a valid list, got 'cities'", config, "mtl-lora", tasks="cities"
    )
    options.tasks = TASKS
    assert len(layers(get_peft_model(tiny_model("llama"), options))) == 2
