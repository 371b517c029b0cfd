"""Gradients are the same with checkpointing, and close with autocast and a bfloat16 base model."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.utils import parameters_to_vector

from refusals import refuses
from tuner.helpers import (
    CHANGE,
    adapted,
    enable_checkpointing,
    forward,
    generate,
    gradients,
    padded,
    random_rows,
)

OTHER_BATCH = padded(random_rows(4, 20, 8, seed=7))
# transformers before 5.24 also checkpoints passes without gradients, and torch warns about it.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def batch(seed=0, lengths=(5, 9, 7)):
    """Returns prompts of ``lengths`` with answers of six tokens.

    The seed sets the tokens, the lengths set the masks.
    """
    ids, mask = padded(random_rows(*(length + 6 for length in lengths), seed=seed), "right")
    in_prompt = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return {"ids": ids, "mask": mask, "labels": ids.masked_fill(in_prompt | (mask == 0), -100)}


def passes(model, between=lambda model: None, **options):
    """Returns the outputs of two forward passes."""
    first = forward(model, **batch(), use_cache=False, **options)
    between(model)
    return first, forward(model, **batch(1, (8, 3, 10)), use_cache=False, **options)


def evaluate(model):
    with torch.no_grad():
        forward(model, *OTHER_BATCH)
    generate(model.eval(), *OTHER_BATCH)
    model.train()


def backward_separately(model, order=1):
    for output in passes(model)[::order]:
        output.loss.backward()


def backward_from_inner_layer(model):
    """Backpropagates a loss on an inner layer's output, after another pass without gradients."""
    inner = []
    handle = model.get_base_model().model.norm.register_forward_hook(
        lambda module, args, output: inner.append(output)
    )
    forward(model, **batch(), use_cache=False)
    handle.remove()
    with torch.no_grad():
        forward(model, *OTHER_BATCH)
    inner[0].square().mean().backward()


CHECKPOINTED = {
    "one pass": lambda model: forward(model, **batch(), use_cache=False).loss.backward(),
    "two passes": lambda model: sum(output.loss for output in passes(model)).backward(),
    "two passes, one after the other": backward_separately,
    "two passes, the second first": lambda model: backward_separately(model, order=-1),
    "an evaluation in between": lambda model: sum(
        output.loss for output in passes(model, evaluate)
    ).backward(),
    "hidden states": lambda model: sum(
        output.hidden_states[-1].square().mean()
        for output in passes(model, output_hidden_states=True)
    ).backward(),
    "tuples": lambda model: sum(
        output[0] for output in passes(model, return_dict=False)
    ).backward(),
    "an inner layer": backward_from_inner_layer,
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"router_input": "standardised"}, CHANGE], ids=["mean", "standardised", "key"]
)
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("gemma3", "one pass"),
        ("gpt2", "one pass"),
        ("gemma2", "two passes"),
        ("gpt2", "two passes, the second first"),
    ]
    + [("llama", how) for how in CHECKPOINTED],
)
def test_gradient_checkpointing_changes_no_gradients_or_moments(
    tiny_model, family, how, options, reentrant
):
    """A recomputed pass uses the moments of the original pass, and counts its prompts once."""
    results = []
    for checkpointed in (False, True):
        targets = "all-linear" if how == "one pass" else None
        model = adapted(tiny_model(family), target_modules=targets, **options).train()
        model.enable_input_require_grads()
        if checkpointed:
            enable_checkpointing(model, reentrant)
        CHECKPOINTED[how](model)
        results.append(
            gradients(model) | {name: b for name, b in model.named_buffers() if "moments" in name}
        )
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)
    counted = 1 if how in ("one pass", "an inner layer") else 2
    batches = {int(b) for name, b in model.named_buffers() if "batches" in name}
    if options == CHANGE:
        counted = 0
    assert batches == ({3 + counted} if options else set()), "randomise() starts the count at 3"


@pytest.mark.parametrize("reentrant", [True, False])
def test_generate_with_checkpointing_equals_eval_mode_or_is_refused(tiny_model, reentrant):
    model = adapted(tiny_model("llama"))
    expected = generate(model, *OTHER_BATCH)
    enable_checkpointing(model.train(), reentrant)
    if Version(transformers.__version__) < Version("5.24"):
        refuses(r"lost its cache.* model.eval\(\) first", generate, model, *OTHER_BATCH)
    else:
        assert torch.equal(generate(model, *OTHER_BATCH), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("how", ["autocast", "bf16 base"])
@pytest.mark.parametrize("options", [{}, CHANGE], ids=["factors", "change"])
def test_low_precision_gradients_have_the_same_direction(tiny_model, family, how, options):
    exact = adapted(tiny_model(family), **options).train()
    forward(exact, **batch()).loss.backward()
    expected = parameters_to_vector(gradients(exact).values())
    model = adapted(
        tiny_model(family, dtype=torch.bfloat16 if how == "bf16 base" else torch.float32), **options
    ).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss = forward(model, **batch()).loss
    loss.backward()
    direction = parameters_to_vector(gradients(model).values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert direction.isfinite().all()
    # With rounding errors alone the similarity is about 0.98; with a lost mask or gate it is below
    # 0.8.
    assert torch.cosine_similarity(direction, expected, dim=0) > 0.9
    # For comparison: the gradient of another batch.
    forward(exact, **batch(3)).loss.backward()
    assert (
        torch.cosine_similarity(parameters_to_vector(gradients(exact).values()), expected, dim=0)
        < 0.8
    )
