"""The product of gated change, without gradients of its frozen factors.

Shape suffixes: I/O = in/out features, N = components.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from badit.method.routing import without_autocast


class GatedChange(torch.autograd.Function):
    """(B − B0) (g ∘ A x) + B0 (g ∘ (A − A0) x), for frozen A0 and B0.

    Autograd would compute the gradients of all four factors. Those of A and B need half as many
    products, for a gradient d of the output:

        dA = (g ∘ Bᵀ d) xᵀ,  dB = d (g ∘ A x)ᵀ
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates_N: Tensor, *factors: Tensor) -> Tensor:
        """Returns the product (…, O) for x (…, I), scaled gates (…, N), and A, B, A0, B0."""
        a_NI, b_ON, a0_NI, b0_ON = factors
        hidden_N = F.linear(x, a_NI)
        hidden_change_N = F.linear(x, a_NI - a0_NI)
        gates_N = gates_N.to(hidden_N.dtype)
        product = F.linear(hidden_N * gates_N, b_ON - b0_ON)
        _add_product(product, hidden_change_N * gates_N, b0_ON.T)
        # Only the gradient of the gates needs the last one.
        needs_gates = ctx.needs_input_grad[1]
        ctx.save_for_backward(
            x, gates_N, *factors, hidden_N, hidden_change_N if needs_gates else None
        )
        return product

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (by once_differentiable)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_outputs[0]):
            return _gradients(ctx, *grad_outputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the inputs, in the dtype of the forward pass."""
    x, gates_N, a_NI, b_ON, a0_NI, b0_ON, hidden_N, hidden_change_N = ctx.saved_tensors
    needs_x, needs_gates, needs_A, needs_B, *_ = ctx.needs_input_grad
    dtype = hidden_N.dtype  # under autocast, not that of x and the factors
    grad = grad.to(dtype)
    of_gated_N = grad @ (b_ON - b0_ON).to(dtype)
    of_gated_change_N = grad @ b0_ON.to(dtype)
    of_hidden_N = of_gated_N * gates_N
    of_hidden_change_N = of_gated_change_N * gates_N
    grad_x = grad_gates = grad_A = grad_B = None
    if needs_x:
        grad_x = of_hidden_N @ a_NI.to(dtype)
        _add_product(grad_x, of_hidden_change_N, a_NI - a0_NI)
    if needs_gates:
        by_gate = of_gated_N * hidden_N + of_gated_change_N * hidden_change_N
        grad_gates = by_gate.sum_to_size(gates_N.shape)
    if needs_A:
        grad_A = _sum_of_products(of_hidden_N + of_hidden_change_N, x.to(dtype))
    if needs_B:
        grad_B = _sum_of_products(grad, hidden_N * gates_N)
    return grad_x, grad_gates, grad_A, grad_B, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left · right to a contiguous total in place."""
    total.view(-1, total.shape[-1]).addmm_(left.flatten(0, -2), right.to(total.dtype))


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns Σ left rightᵀ over all positions."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)
