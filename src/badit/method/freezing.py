"""A mixture of experts under fixed gates is a plain LoRA, exactly; and the best LoRA of a smaller rank.

    s · (B (g ∘ A x) − share · B0 A0 x)  =  B' A' x,      A' = [A; A0],   B' = s · [B diag(g), −share · B0]

It takes the rank 2N, since A0 and B0 are as wide as A and B. Experts that share one A need the rank of that A only:
their B's are summed, each times its gate.

Shape suffixes: O/I = out/in features, N = components, R = rows of A (N, or r where experts share one A), P = rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class CompressedFactors(NamedTuple):
    """A LoRA of smaller rank in float32, and the Frobenius norms of what the product lost and of the product itself."""

    a_PI: torch.Tensor
    b_OP: torch.Tensor
    lost: float
    norm: float


def frozen_factors(
    a_RI: torch.Tensor,
    b_ON: torch.Tensor,
    scale_N: torch.Tensor,
    initial: tuple[torch.Tensor, torch.Tensor] | None = None,
    initial_scale: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' and B' of the LoRA that the components are under fixed gates.

    Args:
        a_RI: A, of which component i uses row i mod R.
        b_ON: B.
        scale_N: s · gate of every component.
        initial: A0 (N, I) and B0 (O, N), if a part of them is subtracted; ``initial_scale`` is s times that part.

    Returns:
        A' (P, I) and B' (O, P), P = R, or R + N with initial factors.
    """
    b_OR = (b_ON * scale_N).unflatten(1, (-1, len(a_RI))).sum(dim=1)
    if initial is None:
        return a_RI, b_OR
    initial_A, initial_B = initial
    return torch.cat([a_RI, initial_A]), torch.cat([b_OR, -initial_scale * initial_B], dim=1)


def compress(a_RI: torch.Tensor, b_OR: torch.Tensor, rank: int) -> CompressedFactors:
    """The closest product of rank P (Eckart & Young 1936), the singular values split evenly between the factors.

    The SVD is that of the small core between two QR factorisations, in float64. What the weight's own dimensions cannot
    fill of P is zero.
    """
    q_OC, core_CR = torch.linalg.qr(b_OR.double())
    q_IC, core_AR = torch.linalg.qr(a_RI.double().T)
    u, s, vh = torch.linalg.svd(core_CR @ core_AR.T, full_matrices=False)
    root_P = s[:rank].sqrt()
    a_PI, b_OP = root_P[:, None] * (vh[:rank] @ q_IC.T), (q_OC @ u[:, :rank]) * root_P
    missing = rank - len(root_P)
    if missing > 0:
        a_PI = torch.cat([a_PI, a_PI.new_zeros(missing, a_PI.shape[1])])
        b_OP = torch.cat([b_OP, b_OP.new_zeros(len(b_OP), missing)], dim=1)
    lost, norm = float(torch.linalg.vector_norm(s[rank:])), float(torch.linalg.vector_norm(s))
    return CompressedFactors(a_PI.float(), b_OP.float(), lost, norm)
