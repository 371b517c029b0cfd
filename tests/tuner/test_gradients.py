"""Checkpointing, autocast and low precision leave the gradients what they are."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.utils import parameters_to_vector

from badit.errors import BaditError
from tuner.helpers import adapted, enable_checkpointing, forward, generate, gradients, padded, random_rows

OTHERS = padded(random_rows(4, 20, 8, seed=7))
# transformers before 5.24 checkpoints a pass without gradients, too, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def batch(seed=0, lengths=(5, 9, 7)):
    """Prompts of `lengths`, answers of six; every seed and every choice of lengths has other prompt masks."""
    ids, mask = padded(random_rows(*(length + 6 for length in lengths), seed=seed), "right")
    in_prompt = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return {"ids": ids, "mask": mask, "labels": ids.masked_fill(in_prompt | (mask == 0), -100)}


def passes(model, between=lambda model: None, **options):
    """The outputs of two forward passes."""
    first = forward(model, **batch(), use_cache=False, **options)
    between(model)
    return first, forward(model, **batch(1, (8, 3, 10)), use_cache=False, **options)


def evaluate(model):
    with torch.no_grad():
        forward(model, *OTHERS)
    generate(model.eval(), *OTHERS)
    model.train()


def one_after_the_other(model, order=1):
    for output in passes(model)[::order]:
        output.loss.backward()


def inner_layer(model):
    """A loss on an inner layer's output, with a pass without gradients before the backward pass."""
    inner = []
    handle = model.get_base_model().model.norm.register_forward_hook(lambda module, args, output: inner.append(output))
    forward(model, **batch(), use_cache=False)
    handle.remove()
    with torch.no_grad():
        forward(model, *OTHERS)
    inner[0].square().mean().backward()


CHECKPOINTED = {
    "one pass": lambda model: forward(model, **batch(), use_cache=False).loss.backward(),
    "two passes": lambda model: sum(output.loss for output in passes(model)).backward(),
    "two passes, one after the other": one_after_the_other,
    "two passes, the second first": lambda model: one_after_the_other(model, order=-1),
    "an evaluation in between": lambda model: sum(output.loss for output in passes(model, evaluate)).backward(),
    "hidden states": lambda model: sum(
        output.hidden_states[-1].square().mean() for output in passes(model, output_hidden_states=True)
    ).backward(),
    "tuples": lambda model: sum(output[0] for output in passes(model, return_dict=False)).backward(),
    "an inner layer": inner_layer,
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("router_input", ["mean", "standardised"])
@pytest.mark.parametrize(
    ("family", "how"),
    [("gemma3", "one pass"), ("gpt2", "one pass"), ("gemma2", "two passes"), ("gpt2", "two passes, the second first")]
    + [("llama", how) for how in CHECKPOINTED],
)
def test_gradient_checkpointing_changes_no_gradient(tiny_model, family, how, router_input, reentrant):
    """Each pass is computed again with the running moments that it had, and counts its prompts once."""
    found = []
    for checkpointed in (False, True):
        targets = "all-linear" if how == "one pass" else None
        model = adapted(tiny_model(family), target_modules=targets, router_input=router_input).train()
        model.enable_input_require_grads()
        if checkpointed:
            enable_checkpointing(model, reentrant)
        CHECKPOINTED[how](model)
        found.append(gradients(model) | {name: b for name, b in model.named_buffers() if "moments" in name})
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    counted = 1 if how in ("one pass", "an inner layer") else 2
    batches = {int(b) for name, b in model.named_buffers() if "batches" in name}
    assert batches == ({3 + counted} if router_input == "standardised" else set()), "three of them made up"


@pytest.mark.parametrize("reentrant", [True, False])
def test_generation_in_training_mode_under_checkpointing(tiny_model, reentrant):
    model = adapted(tiny_model("llama"))
    expected = generate(model, *OTHERS)
    enable_checkpointing(model.train(), reentrant)
    if Version(transformers.__version__) < Version("5.24"):
        with pytest.raises(BaditError, match=r"lost its cache.* model.eval\(\) first"):
            generate(model, *OTHERS)
    else:
        assert torch.equal(generate(model, *OTHERS), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("how", ["autocast", "bf16 base"])
def test_low_precision_gradients_point_the_same_way(tiny_model, family, how):
    exact = adapted(tiny_model(family)).train()
    forward(exact, **batch()).loss.backward()
    expected = parameters_to_vector(gradients(exact).values())
    model = adapted(tiny_model(family, dtype=torch.bfloat16 if how == "bf16 base" else torch.float32)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss = forward(model, **batch()).loss
    loss.backward()
    found = parameters_to_vector(gradients(model).values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert found.isfinite().all()
    # Rounding alone: random weights are near 0.98, while a lost mask or gate is below 0.8.
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9
    # A batch of which this is not the gradient, for scale.
    forward(exact, **batch(3)).loss.backward()
    assert torch.cosine_similarity(parameters_to_vector(gradients(exact).values()), expected, dim=0) < 0.8
