"""What is trained, and that checkpointing, autocast and low precision leave the gradients what they are."""

import copy
import warnings

import pytest
import torch
import transformers
from packaging.version import Version

from badit.errors import BaditError
from tuner.helpers import FAMILIES, adapted, enable_checkpointing, forward, generate, layers, padded, random_rows

ROWS = random_rows(11, 15, 13)

# transformers before 5.24 checkpoints a pass without gradients, too, of which torch warns.
no_inputs_to_differentiate = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def batch(seed=0, lengths=(5, 9, 7)):
    """Prompts of `lengths`, answers of six; every seed and every choice of lengths has other prompt masks."""
    ids, mask = padded(random_rows(*(length + 6 for length in lengths), seed=seed), "right")
    labels = ids.masked_fill(mask == 0, -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = -100
    return {"ids": ids, "mask": mask, "labels": labels}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trainable(model, **options):
    return adapted(model, **options).train()


def test_a_training_pass_warns_of_nothing(tiny_model):
    model = trainable(tiny_model("llama"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        forward(model, **batch()).loss.backward()
    assert [str(warning.message) for warning in warned] == []


@pytest.mark.parametrize("options", [{}, {"routing": "token"}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_A_B_and_router_alone_get_gradients(tiny_model, family, options):
    model = trainable(tiny_model(family), **options)
    forward(model, **batch()).loss.backward()
    found = gradients(model)
    expected = {
        f"base_model.model.{layer.name}.badit_{part}.default"
        for layer in layers(model)
        for part in ("A", "B", "router")
    }
    assert set(found) == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        # A single gate is K whatever the logits: its router stands still, but stays in the graph.
        assert gradient.any() or (options == {"top_k": 1} and "router" in name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_along_the_gradient_as_it_says(tiny_model, family):
    model = trainable(tiny_model(family))
    forward(model, **batch()).loss.backward()
    found, step, losses = gradients(model), 1e-3, []
    norm = sum(gradient.square().sum() for gradient in found.values()).sqrt()
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in found:
                    parameter.add_(sign * step / norm * found[name])
            losses.append(forward(moved, **batch()).loss.double())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), norm.double(), atol=0, rtol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_changes_A_B_and_router_and_nothing_else(tiny_model, family):
    from peft import get_peft_model

    from tuner.helpers import config

    model = get_peft_model(tiny_model(family), config()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = forward(model, **batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(changed) == 6


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(tiny_model, family, reentrant):
    model = trainable(tiny_model(family), target_modules="all-linear")
    model.enable_input_require_grads()
    forward(model, **batch()).loss.backward()
    expected = gradients(model)
    enable_checkpointing(model, reentrant)
    forward(model, **batch(), use_cache=False).loss.backward()
    found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_every_prompt_once(tiny_model, reentrant):
    options = {"router_input": "standardised", "target_modules": "all-linear"}
    plain, checkpointed = (trainable(tiny_model("llama"), **options) for _ in range(2))
    enable_checkpointing(checkpointed, reentrant)
    for model in (plain, checkpointed):
        model.enable_input_require_grads()
        for _ in range(2):
            forward(model.train(), **batch(), use_cache=False).loss.backward()
    for one, other in zip(layers(plain), layers(checkpointed), strict=True):
        assert one.badit_batches["default"] == other.badit_batches["default"] == 5  # three of them made up
        torch.testing.assert_close(one.badit_moments["default"], other.badit_moments["default"])


def two_batches():
    return batch(0, (5, 9, 7)), batch(1, (8, 3, 10))


def both_losses(model, between=None):
    first = forward(model, **two_batches()[0], use_cache=False).loss
    if between is not None:
        between()
    return first, forward(model, **two_batches()[1], use_cache=False).loss


def hidden_state_loss(model, one):
    """A loss that goes past the logits, as in representation training."""
    states = forward(model, **one, use_cache=False, output_hidden_states=True).hidden_states
    return states[-1].square().mean()


@pytest.mark.parametrize("order", ["sum", "first, then second", "second, then first"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_two_checkpointed_passes_before_a_backward_pass(tiny_model, family, reentrant, order):
    def run(model):
        first, second = both_losses(model)
        if order == "sum":
            (first + second).backward()
        else:
            for loss in (first, second) if order.startswith("first") else (second, first):
                loss.backward()
        return gradients(model)

    model = trainable(tiny_model(family))
    model.enable_input_require_grads()
    expected = run(model)
    enable_checkpointing(model, reentrant)
    for name, gradient in run(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_checkpointed_passes_whose_hidden_states_are_used(tiny_model, reentrant):
    def run(model):
        first, second = (hidden_state_loss(model, one) for one in two_batches())
        (first + second).backward()
        return gradients(model)

    model = trainable(tiny_model("llama"))
    model.enable_input_require_grads()
    expected = run(model)
    enable_checkpointing(model, reentrant)
    for name, gradient in run(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@no_inputs_to_differentiate
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_without_gradients_may_come_before_the_backward_pass(tiny_model, reentrant):
    model = trainable(tiny_model("llama"))
    model.enable_input_require_grads()

    def evaluate():
        ids, mask = padded(random_rows(4, 20, 8, seed=7))
        with torch.no_grad():
            forward(model, ids, mask)
        generate(model.eval(), ids, mask)
        model.train()

    def run(between=None):
        sum(both_losses(model, between)).backward()
        return gradients(model)

    expected = run()
    enable_checkpointing(model, reentrant)
    for found in (run(), run(evaluate)):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@no_inputs_to_differentiate
@pytest.mark.parametrize("reentrant", [True, False])
def test_generation_in_training_mode_under_checkpointing(tiny_model, reentrant):
    ids, mask = padded(random_rows(4, 20, 8, seed=7))
    model = trainable(tiny_model("llama"))
    expected = generate(model.eval(), ids, mask)
    enable_checkpointing(model.train(), reentrant)
    if Version(transformers.__version__) < Version("5.24"):
        with pytest.raises(BaditError, match=r"lost its cache.* model.eval\(\) first"):
            generate(model, ids, mask)
    else:
        assert torch.equal(generate(model, ids, mask), expected)


@no_inputs_to_differentiate
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_loss_on_an_inner_layer_survives_a_pass_without_gradients(tiny_model, reentrant):
    model, inner = trainable(tiny_model("llama")), []
    model.enable_input_require_grads()
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, output: inner.append(output))

    def run():
        forward(model, **batch(), use_cache=False)
        with torch.no_grad():
            forward(model, *padded(random_rows(4, 20, 8, seed=7)))
        inner[-2].square().mean().backward()
        return gradients(model)

    expected = run()
    enable_checkpointing(model, reentrant)
    for name, gradient in run().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_outputs_as_a_tuple(tiny_model, reentrant):
    model = trainable(tiny_model("llama"))
    model.enable_input_require_grads()
    sum(both_losses(model)).backward()
    expected = gradients(model)
    enable_checkpointing(model, reentrant)
    first, second = (forward(model, **one, use_cache=False, return_dict=False)[0] for one in two_batches())
    (first + second).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def cosine(one, other):
    flat = [torch.cat([g[name].flatten().float() for name in sorted(g)]) for g in (one, other)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0)


@pytest.mark.parametrize("how", ["autocast", "bf16 base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_gradients_point_the_same_way(tiny_model, family, how):
    exact = trainable(tiny_model(family))
    forward(exact, **batch()).loss.backward()
    expected = gradients(exact)
    dtype = torch.bfloat16 if how == "bf16 base" else torch.float32
    model = trainable(tiny_model(family, dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss = forward(model, **batch()).loss
    loss.backward()
    found = gradients(model)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in found.values())
    # Rounding alone: random weights are near 0.98, while a lost mask or gate is below 0.8.
    assert cosine(found, expected) > 0.9
    # A batch of which this is not the gradient, for scale.
    forward(exact, **batch(3)).loss.backward()
    assert cosine(gradients(exact), expected) < 0.8


def test_autocast_decodes_as_it_is_teacher_forced(tiny_model):
    from transformers import DynamicCache

    from tuner.helpers import cached_steps, teacher_forced

    model = adapted(tiny_model("llama"))
    ids, mask = padded(ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forced = teacher_forced(model, ids, mask, 9)[:, 8:].float()
        steps = cached_steps(model, ids, mask, 9, DynamicCache()).float()
    # The rows start at different columns, but every prompt ends at column 9.
    assert (forced - steps).abs().mean() < 0.05 * forced.abs().mean()
