"""The product of gated change, and the gradients that it computes itself."""

import pytest
import torch

from badit.tuner.gated_change import GatedChange

IN, OUT, COMPONENTS = 7, 5, 3
GATES = {"rows": (2, 1), "positions": (2, 4), "one row": (1, 1)}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def naive_product(x, gates_N, a, b, a0, b0):
    return (gates_N * (x @ a.T)) @ b.T - (gates_N * (x @ a0.T)) @ b0.T


def inputs(gates="rows"):
    initial = [random(COMPONENTS, IN).detach(), random(OUT, COMPONENTS).detach()]
    gates_N = random(*GATES[gates], COMPONENTS)
    return [random(2, 4, IN), gates_N, random(COMPONENTS, IN), random(OUT, COMPONENTS)], initial


@pytest.mark.parametrize("gates", GATES)
def test_product_and_gradients_equal_the_formula(gates):
    trained, initial = inputs(gates)
    outputs = [f(*trained, *initial) for f in (GatedChange.apply, naive_product)]
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, trained, upstream) for y in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_changes_no_other_gradient(frozen):
    trained, initial = inputs()
    upstream = torch.randn(2, 4, OUT, dtype=torch.float64)
    GatedChange.apply(*trained, *initial).backward(upstream)
    expected = [tensor.grad for tensor in trained]
    others = [tensor.detach().requires_grad_(i != frozen) for i, tensor in enumerate(trained)]
    GatedChange.apply(*others, *initial).backward(upstream)
    assert others[frozen].grad is None
    for i, tensor in enumerate(others):
        assert i == frozen or torch.equal(tensor.grad, expected[i])


def test_second_derivatives_are_refused():
    trained, initial = inputs()
    (gradient,) = torch.autograd.grad(
        GatedChange.apply(*trained, *initial).square().sum(), trained[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_backward_pass_may_run_under_autocast():
    trained, initial = inputs()
    trained, initial = (
        [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]
        for tensors in (trained, initial)
    )
    output = GatedChange.apply(*trained, *initial)
    upstream = torch.randn_like(output)
    expected = torch.autograd.grad(output, trained, upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, trained, upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
