"""Orthogonal updates: the components of an adapter move in orthogonal directions, independent of the factors' scale.

Based on LoRA-RITE (Yen et al. 2025, "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA
Optimization", ICLR 2025, arXiv 2410.20625). ΔW = B A has many factorisations, (B R⁻¹)(R A) for every invertible R, and
Adam's change of ΔW depends on the factorisation. Here it is the same for all R with a condition number up to about 100.

Let X be A or Bᵀ, Y the other factor, and G the gradient of X. All moments are zero at the start. One step computes:

    R_Y = (Y Yᵀ)^(1/2),  Q_Y = R_Y⁻¹ Y        polar factors of Y: size (N, N), orthonormal frame (N, D')
    Ḡ = R_Y⁻¹ G                               Q_Y times the gradient of W (or Wᵀ), independent of Y's scale
    c ← β₂ c + (1 − β₂) diag(Ḡᵀ Ḡ) / N        the second moment per feature (D), the same in every frame
    H = Ḡ diag(c / w₂)^(−1/2)                 scaled so that features with large gradients do not dominate, as in Adam
    P = Q_Y Q'_Yᵀ                             maps the frame of the last step, Q'_Y, to the current frame
    V ← β₂ (P V Pᵀ + e·1) + (1 − β₂) H Hᵀ / D     the components' second moment (N, N); e: the escaped mass, see below
    S = (V / w₂)^(−1/2) H                     whitened: S Sᵀ = D·1 if V contains only this step
    M ← β₁ P M + (1 − β₁) S                   the first moment (N, D)
    X ← X − η l R_Y⁻¹ M / w₁                  ΔW changes along Q_Yᵀ M (or its transpose), for any scale of Y

* Features: LoRA-RITE has no c. In an LLM, a few features of the residual stream are many times larger than the others,
  and without c an update is mostly along these features (docs/experiments/whole-model.md).
* Bias correction: w₁ and w₂ follow w ← β w + (1 − β), which is 1 − βᵗ after t steps.
* Escaped mass: P V Pᵀ loses the part of V outside the new frame. The lost trace is spread evenly over the new frame:
  e = (tr V − tr P V Pᵀ) / N. tr V therefore stays the running mean of ‖H‖² / D, and a quickly turning frame does not
  lengthen the steps. (The paper adds the largest loss of an eigenvalue to V; its authors' code does not.)
* Limit: l = min(1, ‖B A‖ / (10 η √(N I))) for A, 1 for B. B starts at zero; while it is small, a full step would
  replace A by the noise of one gradient. The limit keeps A's change of ΔW near or below ‖ΔW‖ / 10. (Not in LoRA-RITE.)
* Zero: the inverse root of a zero matrix is zero. While B is zero, A has no frame: it does not change and its moments
  and w are zero. A zero gradient only decays the moments. A feature that never had a gradient does not change.
* Floor: inverse roots are those of C + floor·‖C‖·1, which are finite in directions without a gradient or a frame.
* Step size: an entry of M is about 1, as in Adam, so the change of ΔW has singular values up to η √D.

If X and G are sharded (each process has some of the D columns), only the Gram matrices of the shards are summed over
processes. Products of N × D matrices use the tensors' dtype, N × N algebra uses float64. An inverse root is a fixed
number of matrix products, so that it needs no synchronisation between GPU and host.

Shape suffixes: N = components, I/O = in/out features, D = I for A and O for B; leading dimensions are layers.
"""

import math
from functools import lru_cache, partial

import torch

from badit.method.grouping import OverShards

Pair = tuple[torch.Tensor, torch.Tensor]  # a tensor of A and the corresponding one of B
# A factor's optimizer state: its own frame Q "basis" and M "first" (…, N, D), c "features" (…, 1, D), V "second"
# (…, N, N), and w₁ and w₂ "weights" (…, 2).
Moments = dict[str, torch.Tensor]

_TINY = (
    1e-60  # matrices up to this norm count as zero; above it, inverse roots are finite in float32
)
_CONVERGED = 1e-3
_LARGEST_CHANGE = 0.1  # relative change of ΔW in a step of A


def no_moments(x_ND: torch.Tensor) -> Moments:
    """Returns the moments before the first step, for a factor given as rows."""
    zero_ND, leading, (components, length) = (
        torch.zeros_like(x_ND),
        x_ND.shape[:-2],
        x_ND.shape[-2:],
    )
    exact = partial(x_ND.new_zeros, dtype=_accumulation_dtype(x_ND))
    sizes = {"features": (1, length), "second": (components, components), "weights": (2,)}
    return {
        "basis": zero_ND,
        "first": zero_ND,
        **{name: exact((*leading, *sizes[name])) for name in sizes},
    }


def orthogonal_updates(
    factors: Pair,
    gradients: Pair,
    moments: tuple[Moments, Moments],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    floor: float = 1e-6,
    lengths: tuple[int, int] | None = None,
    over_shards: OverShards = lambda tensor, operation: tensor,
) -> tuple[Pair, tuple[Moments, Moments]]:
    """Returns the updates of one step of every layer, to subtract after scaling by the learning rate, and new moments.

    Args:
        factors: A (…, N, I) and Bᵀ (…, N, O) in float32 or float64, or this process's shards: some columns of each.
        gradients: the gradients of both factors; gradients and updates have the factors' shapes.
        moments: the moments of both factors; :func:`no_moments` at the start.
        lr: η, for the limit of A's update.
        betas: the decay rates of the first and the second moment.
        floor: the relative floor of inverse roots.
        lengths: I and O; required if the tensors are shards.
        over_shards: reduces tensors of 4 N² and 2 N² numbers per layer over the processes that hold the other shards.
    """
    beta_1, beta_2 = betas
    products = [
        p for x, own in zip(factors, moments, strict=True) for p in (x @ x.mT, x @ own["basis"].mT)
    ]
    products_NN = over_shards(torch.stack(products), "sum").to(_accumulation_dtype(products[0]))
    # From here on, N × N matrices of A and B are stacked: (2, …, N, N).
    root_NN = inverse_root(products_NN[0::2], floor)
    # A moves in B's frame, and B in A's.
    frame_NN, transport_NN = root_NN.flip(0), (root_NN @ products_NN[1::2]).flip(0)
    framed = [_times(frame, gradient) for frame, gradient in zip(frame_NN, gradients, strict=True)]

    has_frame = (_trace(frame_NN) > 0).to(root_NN)
    last_weights_2 = torch.stack([own["weights"] for own in moments])
    first_weight = has_frame * (beta_1 * last_weights_2[..., 0] + (1 - beta_1))
    second_weight = has_frame * (beta_2 * last_weights_2[..., 1] + (1 - beta_2))
    weights_2 = torch.stack([first_weight, second_weight], dim=-1)

    features, scaled = [], []
    for index, (g_ND, own) in enumerate(zip(framed, moments, strict=True)):
        keep, weight = has_frame[index, ..., None, None], second_weight[index, ..., None, None]
        square_1D = g_ND.to(keep.dtype).square().mean(-2, keepdim=True)
        c_1D = keep * (beta_2 * own["features"] + (1 - beta_2) * square_1D)
        features.append(c_1D)
        scaled.append(g_ND * torch.where(c_1D > 0, (weight / c_1D).sqrt(), 0.0).to(g_ND.dtype))

    lengths = lengths or (factors[0].shape[-1], factors[1].shape[-1])
    squares = [h_ND @ h_ND.mT / length for h_ND, length in zip(scaled, lengths, strict=True)]
    square_NN = over_shards(torch.stack(squares), "sum").to(root_NN)
    last_NN = torch.stack([own["second"] for own in moments])
    moved_NN = transport_NN @ last_NN @ transport_NN.mT
    escaped = (_trace(last_NN) - _trace(moved_NN)).clamp_min(0) / last_NN.shape[-1]
    moved_NN.diagonal(dim1=-2, dim2=-1).add_(escaped.unsqueeze(-1))
    second_NN = (beta_2 * moved_NN + (1 - beta_2) * square_NN) * has_frame[..., None, None]
    whiten_NN = (
        inverse_root(second_NN, floor) * ((1 - beta_1) * second_weight.sqrt())[..., None, None]
    )
    unframe_NN = frame_NN / torch.where(first_weight > 0, first_weight, 1.0)[..., None, None]
    product = (products_NN[0] * products_NN[2]).sum((-2, -1)).clamp_min(0).sqrt()  # the norm of B A
    largest = _LARGEST_CHANGE / math.sqrt(lengths[0] * last_NN.shape[-1]) / max(lr, 1e-30) * product
    unframe_NN[0] *= largest.clamp_max(1)[..., None, None]

    updates, after = [], []
    for index, (x_ND, h_ND, own) in enumerate(zip(factors, scaled, moments, strict=True)):
        first_ND = _times(beta_1 * transport_NN[index], own["first"]) + _times(
            whiten_NN[index], h_ND
        )
        updates.append(_times(unframe_NN[index], first_ND))
        of_D = {
            "basis": _times(root_NN[index], x_ND),
            "first": first_ND,
            "features": features[index],
        }
        after.append({**of_D, "second": second_NN[index], "weights": weights_2[index]})
    return (updates[0], updates[1]), (after[0], after[1])


def inverse_root(gram_NN: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    """Returns (C + floor·‖C‖·1)^(−1/2) of symmetric positive semi-definite matrices C (…, N, N); zero if C is zero.

    Coupled Newton–Schulz iteration with the scaling of Chen and Chow (2014, "A Stable Scaling of Newton-Schulz for
    Improving the Sign Function Computation of a Hermitian Matrix"). ‖C‖ is the Frobenius norm. If C has eigenvalues
    below −floor·‖C‖, this root does not exist, and C is treated as ‖C‖·1.
    """
    norm = torch.linalg.matrix_norm(gram_NN, keepdim=True)
    is_zero = norm <= _TINY
    norm = torch.where(is_zero, 1.0, norm)
    one_NN = torch.eye(gram_NN.shape[-1], dtype=gram_NN.dtype, device=gram_NN.device)
    # y converges to C^(1/2) and z to C^(−1/2); both are polynomials in C.
    y_NN, z_NN = (gram_NN / norm + floor * one_NN) / (1 + floor), one_NN.expand_as(gram_NN)
    for scale in _scales(floor):
        step_NN = (z_NN @ y_NN) * (-0.5 * scale**3)
        step_NN.diagonal(dim1=-2, dim2=-1).add_(1.5 * scale)
        y_NN, z_NN = y_NN @ step_NN, step_NN @ z_NN
    error = torch.linalg.matrix_norm(z_NN @ y_NN - one_NN, keepdim=True)
    root_NN = torch.where(error < _CONVERGED, z_NN, one_NN) / (norm * (1 + floor)).sqrt()
    return torch.where(is_zero, 0.0, root_NN)


@lru_cache
def _scales(floor: float) -> list[float]:
    """Returns the scale of each iteration step, until the smallest possible singular value reaches 1."""
    smallest, scales = math.sqrt(floor / (1 + floor)), []
    while 1 - smallest > 1e-12:
        scale = math.sqrt(3 / (1 + smallest + smallest**2))
        smallest = scale * smallest * (3 - (scale * smallest) ** 2) / 2
        scales.append(scale)
    return scales


def _times(small_NN: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
    return small_NN.to(x_ND.dtype) @ x_ND


def _trace(matrix_NN: torch.Tensor) -> torch.Tensor:
    return matrix_NN.diagonal(dim1=-2, dim2=-1).sum(-1)


def _accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype of N × N algebra: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
