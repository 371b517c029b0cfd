"""The product of gated change, without gradients of its frozen factors.

Shape suffixes: I/O = in/out features, N = components, P = 2N, rows of both factors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class GatedChange(torch.autograd.Function):
    """B' (g ∘ A' x) with A' = [A; A − A0] and B' = [B − B0, B0].

    Autograd would compute the gradients of all P rows and columns. Those of A and B need half as
    many products, for a gradient d of the output:

        dA = (g ∘ Bᵀ d) xᵀ,  dB = d (g ∘ A x)ᵀ
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates_P: Tensor, a_PI: Tensor, b_OP: Tensor, *_trained: Tensor
    ) -> Tensor:
        """Returns the product (…, O) for x (…, I), scaled gates (…, P), A' and B'.

        The trained factors A and B follow; they are arguments only to receive their gradients.
        """
        hidden_P = F.linear(x, a_PI)
        gates_P = gates_P.to(hidden_P.dtype)
        ctx.save_for_backward(x, a_PI, b_OP, gates_P, hidden_P)
        return F.linear(hidden_P * gates_P, b_OP)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (by once_differentiable)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, a_PI, b_OP, gates_P, hidden_P = ctx.saved_tensors
        needs_x, needs_gates, _, _, needs_A, needs_B = ctx.needs_input_grad
        dtype = hidden_P.dtype  # under autocast, not that of x and the factors
        grad = grad_outputs[0].to(dtype)
        grad_product_P = grad @ b_OP.to(dtype)
        grad_hidden_P = grad_product_P * gates_P
        grad_x = grad_A = grad_B = grad_gates = None
        if needs_x:
            grad_x = grad_hidden_P @ a_PI.to(dtype)
        if needs_A:
            of_A, of_change = grad_hidden_P.chunk(2, dim=-1)
            grad_A = _sum_of_products(of_A + of_change, x.to(dtype))
        if needs_B:
            gated_N, _ = (hidden_P * gates_P).chunk(2, dim=-1)
            grad_B = _sum_of_products(grad, gated_N)
        if needs_gates:
            grad_gates = (grad_product_P * hidden_P).sum_to_size(gates_P.shape)
        return grad_x, grad_gates, None, None, grad_A, grad_B


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns Σ left rightᵀ over all positions."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)
