"""Routing: hidden states to one gate per expert (the paper's α_k).

    gate = code(nearest(x̂))              the default: each cluster of prompts has fixed random gates
    gate = K · softmax(router(x̂))        mean 1: a zero-initialised router gives gates of exactly 1
    gate = softmax(router(x̄))            the paper's form, sum 1

x̄ is the mean of the layer's input over the prompt's positions, without padding and without the
answer. x̂ measures how a prompt differs from the others (not in the paper):

    x̂ = 8/√I · (x̄ − μ)/√v       μ, v: mean and variance of every feature over training prompts,
                                 with a router running

Codes, the gates of clusters, are not in the paper. Spherical k-means finds C centroids of x̂ before
training, and a cluster's code is softmax(w / 0.1) with w uniform within ±1/√K, the initial weights
of tasks in MTL-LoRA (arXiv 2410.09437). Every layer draws its own, so that two clusters share
experts in some layers and not in others (benchmarks/experiments/task-maps.md).

Shape suffixes: B = batch, T = positions, S = segments of packed rows or prompts, I = in features,
K = experts, C = clusters; `...` may be (B,) or (B, T).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GateKind = Literal["clusters", "mean_one", "softmax"]
RouterInput = Literal["mean", "standardised"]

# The mean norm of x̂ sets how fast a router's gates diverge. On SmolLM2, 7 was best of 2.4 to 24.
_NORM = 8.0
# A batch's minimum weight in the moments: batches fade within hundreds of steps.
_LEAST_WEIGHT = 0.02
_CODE_TEMPERATURE = 0.1
_STARTS = 5  # of k-means
_ITERATIONS = 30


def without_autocast(x: Tensor) -> torch.autocast:
    """Disables 16-bit products of x: training and inference could find other nearest centroids."""
    kind = "cpu" if x.is_meta else x.device.type  # autocast does not know "meta"
    return torch.autocast(kind, enabled=False)


def prompt_mean(x_BTI: Tensor, prompt_mask_BT: Tensor) -> Tensor:
    """Returns x̄_BI, the mean of x over positions where the mask is true, in x's dtype.

    It is zero for a row without any.
    """
    weight_BT = prompt_mask_BT.bool().to(x_BTI.dtype)
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True).clamp_min(1.0)
    # where() instead of only a product: padding may hold NaN or infinity, and 0 · NaN is NaN.
    x_BTI = torch.where(prompt_mask_BT[..., None].bool(), x_BTI, 0.0)
    with without_autocast(x_BTI):
        return torch.einsum("bt,bti->bi", weight_BT, x_BTI)


def segment_means(
    x_BTI: Tensor, prompt_mask_BT: Tensor, segment_BT: Tensor, segments: int
) -> Tensor:
    """Returns x̄_SI of packed rows: the mean of x over the masked positions of each segment.

    It is computed in at least float32 and returned in x's dtype; zero for a segment without masked
    positions.
    """
    segment_P = segment_BT.flatten()  # P: all positions
    weight_BT = prompt_mask_BT.to(torch.promote_types(x_BTI.dtype, torch.float32))
    counts_S = weight_BT.new_zeros(segments).index_add(0, segment_P, weight_BT.flatten())
    weight_BT = weight_BT / counts_S.clamp_min(1.0)[segment_BT]
    masked_BTI = torch.where(prompt_mask_BT[..., None].bool(), x_BTI, 0.0)
    weighted_PI = (masked_BTI * weight_BT[..., None]).flatten(0, 1)
    sums_SI = weighted_PI.new_zeros(segments, x_BTI.shape[-1])
    return sums_SI.index_add(0, segment_P, weighted_PI).to(x_BTI.dtype)


def batch_moments(x_BI: Tensor, add_up: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Returns mean and variance (2, I) over a batch of prompts in float32.

    ``add_up`` sums a tensor over ranks. A row of zeros has no prompt, such as padding in packed
    rows, and does not count. Without any prompt they are NaN.
    """
    x_BI = x_BI.float()
    counts_B1 = x_BI.any(dim=1, keepdim=True).float()
    sums = add_up(torch.cat([x_BI.sum(dim=0), counts_B1.sum(dim=0)]))
    # In two passes, because a difference of means of squares would lose digits.
    mean_I = sums[:-1] / sums[-1]
    squares_I = add_up(((x_BI - mean_I) * counts_B1).square().sum(dim=0))
    return torch.stack([mean_I, squares_I / sums[-1]])


def updated_moments(moments_2I: Tensor, batches: Tensor, new_2I: Tensor) -> Tensor:
    """Returns μ and v (2, I) with batch number n = ``batches`` added, of weight max(1/n, 1/50)."""
    weight = (1 / batches).clamp_min(_LEAST_WEIGHT)
    mean_I, variance_I = torch.lerp(moments_2I, new_2I, weight)
    # The variance of two groups together includes the distance of their means.
    between_I = weight * (1 - weight) * (new_2I[0] - moments_2I[0]).square()
    return torch.stack([mean_I, variance_I + between_I])


def standardised(x: Tensor, moments_2I: Tensor) -> Tensor:
    """Returns x̂ (…, I) in x's dtype.

    It is 0 for a feature whose variance is 0, and for a row of zeros (no prompt).
    """
    mean_I, variance_I = moments_2I
    varies_I = variance_I > 0
    # where() twice: with the outer one alone, the gradient of masked features would be 0 · ∞.
    scale_I = torch.where(varies_I, variance_I, 1.0).rsqrt()
    unit = torch.where(varies_I, (x.float() - mean_I) * scale_I, 0.0)
    has_prompt = x.any(dim=-1, keepdim=True)
    return (unit * (_NORM / math.sqrt(x.shape[-1]))).to(x.dtype) * has_prompt


def prompt_centroids(x_SI: Tensor, clusters: int) -> Tensor:
    """Returns C centroids (C, I) of prompts, unit vectors in float32 on the CPU.

    Spherical k-means: of several starts with k-means++, the one with the largest sum of cosines is
    returned. The result depends only on x. Rows of zeros do not count; without any other row, the
    centroids are zero. Centroids may be equal.
    """
    x_SI = x_SI.float().cpu()
    unit_SI = F.normalize(x_SI[x_SI.any(dim=1)], dim=1)
    best_CI = unit_SI.new_zeros(clusters, x_SI.shape[1])
    if not len(unit_SI):
        return best_CI

    best_sum = -math.inf
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STARTS):
        centroids_CI = _distant_rows(unit_SI, clusters, generator)
        for _ in range(_ITERATIONS):
            nearest_S = (unit_SI @ centroids_CI.T).argmax(dim=1)
            sums_CI = torch.zeros_like(centroids_CI).index_add(0, nearest_S, unit_SI)
            has_prompts_C1 = sums_CI.any(dim=1, keepdim=True)
            centroids_CI = torch.where(has_prompts_C1, F.normalize(sums_CI, dim=1), centroids_CI)
        sum_of_cosines = float((unit_SI @ centroids_CI.T).amax(dim=1).sum())
        if sum_of_cosines > best_sum:
            best_sum = sum_of_cosines
            best_CI = centroids_CI
    return best_CI


def first_equal(centroids_CI: Tensor) -> Tensor:
    """Returns for each centroid the index (C) of the first one that is equal up to rounding."""
    return (centroids_CI @ centroids_CI.T > 1 - 1e-5).int().argmax(dim=1)


def _distant_rows(unit_SI: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns random rows (C, I), each drawn by its distance to the earlier ones (k-means++)."""
    chosen_C = torch.randint(len(unit_SI), (1,), generator=generator, device="cpu")
    while len(chosen_C) < count:
        distance_S = 1 - (unit_SI @ unit_SI[chosen_C].T).amax(dim=1)
        # Above zero: multinomial refuses weights that are all zero, as of equal prompts.
        drawn = torch.multinomial(distance_S.clamp_min(1e-6), 1, generator=generator)
        chosen_C = torch.cat([chosen_C, drawn])
    return unit_SI[chosen_C]


def random_codes(clusters: int, num_experts: int) -> Tensor:
    """Draws the codes (C, K) of a layer's clusters from torch's random state: gates with sum 1."""
    weights_CK = (2 * torch.rand(clusters, num_experts) - 1) / math.sqrt(num_experts)
    return torch.softmax(weights_CK / _CODE_TEMPERATURE, dim=1)


def cluster_gates(x: Tensor, centroids_CI: Tensor, codes_CK: Tensor) -> Tensor:
    """Returns gates (…, K): for every x̂ (…, I) the code of the centroid with the largest cosine."""
    return codes_CK.float()[nearest_clusters(x, centroids_CI)]


def nearest_clusters(x: Tensor, centroids_CI: Tensor) -> Tensor:
    """Returns the cluster (…) of every x̂ (…, I): that of the centroid with the largest cosine."""
    with without_autocast(x):
        cosines = F.linear(x.float(), centroids_CI.float())  # times the norm of x̂
    return cosines.argmax(dim=-1)


def expert_gates(
    logits: Tensor, *, kind: GateKind = "mean_one", top_k: int | None = None
) -> Tensor:
    """Returns gates (..., K) from router logits (..., K).

    With ``top_k`` the softmax runs over the k largest logits (on ties, the lower index); the sum
    stays K ("mean_one") or 1 ("softmax"). The other experts have a zero gate but stay in the
    autograd graph, for data-parallel training.
    """
    num_experts = logits.shape[-1]
    if top_k is not None and top_k < num_experts:
        # A stable sort, because topk does not define the order of ties, which may differ between
        # machines.
        index = torch.argsort(logits, dim=-1, descending=True, stable=True)[..., :top_k]
        unused = torch.full_like(logits, float("-inf"))
        logits = unused.scatter(-1, index, logits.gather(-1, index))
    if kind == "softmax":
        return torch.softmax(logits, dim=-1)
    # Not K · softmax: in floating point, K · (1/K) is not 1 for every K, but K/K is.
    weights = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
    return weights * num_experts / weights.sum(dim=-1, keepdim=True)
