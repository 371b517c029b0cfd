"""The product of gated change, without gradients of its frozen factors.

Shape suffixes: I/O = in/out features, N = components.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        change_A_NI = a_NI - a0_NI
        change_B_ON = b_ON - b0_ON
        hidden_N = F.linear(x, a_NI)
        hidden_change_N = F.linear(x, change_A_NI)
        gates_N = gates_N.to(hidden_N.dtype)
        ctx.save_for_backward(
            x, gates_N, hidden_N, hidden_change_N, a_NI, change_A_NI, change_B_ON, b0_ON
        )
        product = F.linear(hidden_N * gates_N, change_B_ON)
        return _plus_product(product, hidden_change_N * gates_N, b0_ON.T)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (by once_differentiable)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, gates_N, hidden_N, hidden_change_N, *factors = ctx.saved_tensors
        needs_x, needs_gates, needs_A, needs_B, *_ = ctx.needs_input_grad
        dtype = hidden_N.dtype  # under autocast, not that of x and the factors
        a_NI, change_A_NI, change_B_ON, b0_ON = (factor.to(dtype) for factor in factors)
        (grad,) = grad_outputs
        grad = grad.to(dtype)
        of_gated_N = grad @ change_B_ON
        of_gated_change_N = grad @ b0_ON
        of_hidden_N = of_gated_N * gates_N
        of_hidden_change_N = of_gated_change_N * gates_N
        grad_x = grad_gates = grad_A = grad_B = None
        if needs_x:
            grad_x = _plus_product(of_hidden_N @ a_NI, of_hidden_change_N, change_A_NI)
        if needs_gates:
            by_gate = of_gated_N * hidden_N + of_gated_change_N * hidden_change_N
            grad_gates = by_gate.sum_to_size(gates_N.shape)
        if needs_A:
            grad_A = _sum_of_products(of_hidden_N + of_hidden_change_N, x.to(dtype))
        if needs_B:
            grad_B = _sum_of_products(grad, hidden_N * gates_N)
        return grad_x, grad_gates, grad_A, grad_B, None, None


def _plus_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds left · right to a total in place, and returns it."""
    total.flatten(0, -2).addmm_(left.flatten(0, -2), right.to(total.dtype))
    return total


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns Σ left rightᵀ over all positions."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)
