"""Routing: from hidden states to one gate per expert (the paper's α_k).

    gate = K · softmax(router(x̄))        mean 1: with a router started at zero every gate is exactly 1 at step 0
    gate = softmax(router(x̄))            the paper's form, sum 1; kept as an ablation

x̄ is the mean of the layer's input over the prompt's positions. Never padding, never the answer: the answer is not
there yet when a generation starts, so a gate that had seen it in training would mean something else.

Shape suffixes: B = batch, T = positions, I = in features, K = experts; `...` may be (B,) or (B, T).
"""

from __future__ import annotations

from typing import Literal

import torch

GateKind = Literal["mean_one", "softmax"]


def prompt_mean(x_BTI: torch.Tensor, prompt_mask_BT: torch.Tensor) -> torch.Tensor:
    """x̄_BI, the mean of x over the positions where the mask is true, in x's dtype; zero for a row without any."""
    weight_BT = prompt_mask_BT.bool().to(x_BTI.dtype)
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True).clamp_min(1.0)
    # where() rather than a bare product: padding may hold NaN or infinity, and 0 · NaN is NaN.
    x_BTI = torch.where(prompt_mask_BT[..., None].bool(), x_BTI, 0.0)
    return torch.einsum("bt,bti->bi", weight_BT, x_BTI)


def expert_gates(logits: torch.Tensor, *, kind: GateKind = "mean_one", top_k: int | None = None) -> torch.Tensor:
    """Gates (..., K) from router logits (..., K).

    With ``top_k`` only the k largest logits keep a gate and the softmax runs over those, so that the sum stays K
    ("mean_one") or 1 ("softmax"). Every expert stays in the autograd graph, with a zero gate, which is what
    data-parallel training needs. A tie is broken towards the lower index.
    """
    num_experts = logits.shape[-1]
    kept = logits
    if top_k is not None and top_k < num_experts:
        # A stable sort, since topk leaves the order of ties open and would differ between machines.
        index = torch.argsort(logits, dim=-1, descending=True, stable=True)[..., :top_k]
        kept = torch.full_like(logits, float("-inf")).scatter(-1, index, logits.gather(-1, index))
    if kind == "softmax":
        return torch.softmax(kept, dim=-1)
    # Not K · softmax: K · (1/K) is not 1 for every K in floating point, while K/K is.
    weights = (kept - kept.detach().amax(dim=-1, keepdim=True)).exp()
    return weights * num_experts / weights.sum(dim=-1, keepdim=True)
