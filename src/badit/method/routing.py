"""Routing: hidden states to one gate per expert (the paper's α_k).

    gate = code(nearest(x̂))              the default, fixed: each cluster of prompts has random gates, its code
    gate = K · softmax(router(x̂))        mean 1: a zero-initialised router gives gates of exactly 1
    gate = softmax(router(x̄))            the paper's form, sum 1

x̄ is the mean of the layer's input over the prompt's positions, without padding and without the answer. x̂ measures
how a prompt differs from the others (not in the paper):

    x̂ = 8/√I · (x̄ − μ)/√v       μ, v: mean and variance of every feature over training prompts, with a router running

Codes are not in the paper. Spherical k-means finds C centroids of x̂ before training, and a cluster's code is
softmax(w / 0.1) with w uniform within ±1/√K, the initial weights of tasks in MTL-LoRA (arXiv 2410.09437). Every layer
draws its own, so that two clusters share experts in some layers and not in others (docs/experiments/task-maps.md).

Shape suffixes: B = batch, T = positions, S = segments of packed rows or prompts, I = in features, K = experts,
C = clusters; `...` may be (B,) or (B, T).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

GateKind = Literal["clusters", "mean_one", "softmax"]
RouterInput = Literal["mean", "standardised"]

_NORM = 8.0  # x̂'s mean norm, which sets how fast a router's gates diverge. On SmolLM2, 7 was best of 2.4 to 24.
_LEAST_WEIGHT = (
    0.02  # a batch's minimum weight in the moments; batches fade within hundreds of steps
)
_CODE_TEMPERATURE = 0.1
_STARTS, _ITERATIONS = 5, 30  # of k-means


def _without_autocast(x: torch.Tensor) -> torch.autocast:
    """Disables 16-bit products of x, with which training and inference could find different nearest centroids."""
    return torch.autocast(
        "cpu" if x.is_meta else x.device.type, enabled=False
    )  # autocast does not know "meta"


def prompt_mean(x_BTI: torch.Tensor, prompt_mask_BT: torch.Tensor) -> torch.Tensor:
    """Returns x̄_BI, the mean of x over positions where the mask is true, in x's dtype; zero for a row without any."""
    weight_BT = prompt_mask_BT.bool().to(x_BTI.dtype)
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True).clamp_min(1.0)
    # where() instead of only a product: padding may hold NaN or infinity, and 0 · NaN is NaN.
    x_BTI = torch.where(prompt_mask_BT[..., None].bool(), x_BTI, 0.0)
    with _without_autocast(x_BTI):
        return torch.einsum("bt,bti->bi", weight_BT, x_BTI)


def segment_means(
    x_BTI: torch.Tensor, prompt_mask_BT: torch.Tensor, segment_BT: torch.Tensor, segments: int
) -> torch.Tensor:
    """Returns x̄_SI of packed rows: the mean of x over the masked positions of each segment of the batch.

    It is computed in at least float32 and returned in x's dtype; zero for a segment without masked positions.
    """
    weight_BT = prompt_mask_BT.to(torch.promote_types(x_BTI.dtype, torch.float32))
    counts_S = weight_BT.new_zeros(segments).index_add(0, segment_BT.flatten(), weight_BT.flatten())
    weight_BT = weight_BT / counts_S.clamp_min(1.0)[segment_BT]
    weighted_BTI = torch.where(prompt_mask_BT[..., None].bool(), x_BTI, 0.0) * weight_BT[..., None]
    sums_SI = weighted_BTI.new_zeros(segments, x_BTI.shape[-1])
    return sums_SI.index_add(0, segment_BT.flatten(), weighted_BTI.flatten(0, 1)).to(x_BTI.dtype)


def batch_moments(
    x_BI: torch.Tensor, add_up: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> torch.Tensor:
    """Returns mean and variance (2, I) over a batch of prompts in float32; ``add_up`` sums a tensor over ranks.

    A row of zeros has no prompt, such as padding in packed rows, and does not count. Without any prompt they are NaN.
    """
    x_BI = x_BI.float()
    counts_B1 = x_BI.any(dim=1, keepdim=True).float()
    total = add_up(torch.cat([x_BI.sum(dim=0), counts_B1.sum(dim=0)]))
    mean_I = total[:-1] / total[-1]
    return torch.stack(
        [mean_I, add_up(((x_BI - mean_I) * counts_B1).square().sum(dim=0)) / total[-1]]
    )


def updated_moments(
    moments_2I: torch.Tensor, batches: torch.Tensor, new_2I: torch.Tensor
) -> torch.Tensor:
    """Returns μ and v (2, I) with batch number ``batches`` = n added: its moments ``new_2I`` weigh max(1/n, 1/50)."""
    weight = (1 / batches).clamp_min(_LEAST_WEIGHT)
    between_I = weight * (1 - weight) * (new_2I[0] - moments_2I[0]).square()
    mixed_2I = torch.lerp(moments_2I, new_2I, weight)
    return torch.stack([mixed_2I[0], mixed_2I[1] + between_I])


def standardised(x: torch.Tensor, moments_2I: torch.Tensor) -> torch.Tensor:
    """Returns x̂ (…, I) in x's dtype; 0 for a feature whose variance is 0, and for a row of zeros (no prompt)."""
    mean_I, variance_I = moments_2I
    varies_I = variance_I > 0
    # where() twice: with the outer one alone, the gradient of masked features would be 0 · ∞.
    scale_I = torch.where(varies_I, variance_I, 1.0).rsqrt()
    unit = torch.where(varies_I, (x.float() - mean_I) * scale_I, 0.0)
    return (unit * (_NORM / math.sqrt(x.shape[-1]))).to(x.dtype) * x.any(dim=-1, keepdim=True)


def prompt_centroids(x_SI: torch.Tensor, clusters: int) -> torch.Tensor:
    """Returns C centroids (C, I) of prompts with spherical k-means: unit vectors, in float32 on the CPU.

    Of several starts with k-means++, the one with the largest sum of cosines is returned. The result depends only on
    x. Rows of zeros do not count; without any other row, the centroids are zero. Centroids may be equal.
    """
    x_SI = x_SI.float().cpu()
    unit_SI = F.normalize(x_SI[x_SI.any(dim=1)], dim=1)
    best, best_CI, generator = (
        -math.inf,
        unit_SI.new_zeros(clusters, x_SI.shape[1]),
        torch.Generator().manual_seed(0),
    )
    for _ in range(_STARTS if len(unit_SI) else 0):
        chosen_C = torch.randint(len(unit_SI), (1,), generator=generator, device="cpu")
        while len(chosen_C) < clusters:
            distance_S = 1 - (unit_SI @ unit_SI[chosen_C].T).amax(dim=1)
            another = torch.multinomial(distance_S.clamp_min(1e-6), 1, generator=generator)
            chosen_C = torch.cat([chosen_C, another])
        centroids_CI = unit_SI[chosen_C]
        for _ in range(_ITERATIONS):
            nearest_S = (unit_SI @ centroids_CI.T).argmax(dim=1)
            sums_CI = torch.zeros_like(centroids_CI).index_add(0, nearest_S, unit_SI)
            centroids_CI = torch.where(
                sums_CI.any(dim=1, keepdim=True), F.normalize(sums_CI, dim=1), centroids_CI
            )
        total = float((unit_SI @ centroids_CI.T).amax(dim=1).sum())
        if total > best:
            best, best_CI = total, centroids_CI
    return best_CI


def random_codes(clusters: int, num_experts: int) -> torch.Tensor:
    """Returns the codes (C, K) of a layer's clusters, drawn from torch's random state: gates with sum 1."""
    weights_CK = (2 * torch.rand(clusters, num_experts) - 1) / math.sqrt(num_experts)
    return torch.softmax(weights_CK / _CODE_TEMPERATURE, dim=1)


def cluster_gates(
    x: torch.Tensor, centroids_CI: torch.Tensor, codes_CK: torch.Tensor
) -> torch.Tensor:
    """Returns gates (…, K): for every x̂ (…, I) the code of the centroid with the largest cosine."""
    with _without_autocast(x):
        return codes_CK.float()[F.linear(x.float(), centroids_CI.float()).argmax(dim=-1)]


def expert_gates(
    logits: torch.Tensor, *, kind: GateKind = "mean_one", top_k: int | None = None
) -> torch.Tensor:
    """Returns gates (..., K) from router logits (..., K).

    With ``top_k`` the softmax runs over the k largest logits (on ties, the lower index); the sum stays K ("mean_one")
    or 1 ("softmax"). The other experts have a zero gate but stay in the autograd graph, for data-parallel training.
    """
    num_experts = logits.shape[-1]
    if top_k is not None and top_k < num_experts:
        # A stable sort, because topk does not define the order of ties, which may differ between machines.
        index = torch.argsort(logits, dim=-1, descending=True, stable=True)[..., :top_k]
        logits = torch.full_like(logits, float("-inf")).scatter(-1, index, logits.gather(-1, index))
    if kind == "softmax":
        return torch.softmax(logits, dim=-1)
    # Not K · softmax: in floating point, K · (1/K) is not 1 for every K, but K/K is.
    weights = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
    return weights * num_experts / weights.sum(dim=-1, keepdim=True)
