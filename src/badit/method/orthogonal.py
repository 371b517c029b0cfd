"""Orthogonal updates: components move in orthogonal directions, whatever the factors' scale.

Based on LoRA-RITE (Yen et al. 2025, "LoRA Done RITE: Robust Invariant Transformation Equilibration
for LoRA Optimization", ICLR 2025, arXiv 2410.20625). ΔW = B A has many factorisations, (B R⁻¹)(R A)
for every invertible R, and Adam's change of ΔW depends on the factorisation. Here it is the same
for all R with a condition number up to about 100.

Let X be A or Bᵀ, Y the other factor, and G the gradient of X. All moments are zero at the start.
One step computes:

    R_Y = (Y Yᵀ)^(1/2),  Q_Y = R_Y⁻¹ Y        Y's polar factors: size (N, N), frame (N, D')
    Ḡ = R_Y⁻¹ G                               Q_Y times the gradient of W (or Wᵀ)
    c ← β₂ c + (1 − β₂) diag(Ḡᵀ Ḡ) / N        second moment per feature (D), the same in every frame
    H = Ḡ diag(c / w₂)^(−1/2)                 so that features with large gradients do not dominate
    P = Q_Y Q'_Yᵀ                             from the last step's frame Q'_Y to the current one
    V ← β₂ (P V Pᵀ + e·1) + (1 − β₂) H Hᵀ / D     components' second moment (N, N); e: see below
    S = (V / w₂)^(−1/2) H                     whitened: S Sᵀ = D·1 if V contains only this step
    M ← β₁ P M + (1 − β₁) S                   first moment (N, D)
    X ← X − η l R_Y⁻¹ M / w₁                  ΔW changes along Q_Yᵀ M, or its transpose

* Features: LoRA-RITE has no c. In an LLM, a few features of the residual stream are many times
  larger than the others, and without c an update is mostly along these features
  (benchmarks/experiments/whole-model.md).
* Bias correction: w₁ and w₂ follow w ← β w + (1 − β), which is 1 − βᵗ after t steps.
* Escaped mass: P V Pᵀ loses the part of V outside the new frame. The lost trace is spread evenly
  over the new frame: e = (tr V − tr P V Pᵀ) / N. tr V therefore stays the running mean of ‖H‖² / D,
  and a quickly turning frame does not lengthen the steps. (The paper adds the largest loss of an
  eigenvalue to V; its authors' code does not.)
* Limit: l = min(1, ‖B A‖ / (10 η √(N I))) for A, 1 for B. B starts at zero; while it is small, a
  full step would replace A by the noise of one gradient. The limit keeps A's change of ΔW near or
  below ‖ΔW‖ / 10. (Not in LoRA-RITE.)
* Zero: the inverse root of a zero matrix is zero. While B is zero, A has no frame: it does not
  change and its moments and w are zero. A zero gradient only decays the moments. A feature that
  never had a gradient does not change.
* Floor: inverse roots are those of C + floor·‖C‖·1, which are finite in directions without a
  gradient or a frame.
* Step size: an entry of M is about 1, as in Adam, so the change of ΔW has singular values up
  to η √D.

If X and G are sharded (each process has some of the D columns), only the Gram matrices of the
shards are summed over processes. Products of N × D matrices use the tensors' dtype, N × N algebra
uses float64. An inverse root is a fixed number of matrix products, so that it needs no
synchronisation between GPU and host.

Shape suffixes: N = components, I/O = in/out features, D = I for A and O for B; leading dimensions
are layers. Where both factors' N × N matrices are stacked, the first dimension is A, B.
"""

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from badit.method.grouping import OverShards

Pair = tuple[Tensor, Tensor]  # a tensor of A and the corresponding one of B
# A factor's optimizer state: its own frame Q "basis" and M "first" (…, N, D), c "features"
# (…, 1, D), V "second" (…, N, N), and w₁ and w₂ "weights" (…, 2).
Moments = dict[str, Tensor]

# Matrices up to this norm count as zero; above it, inverse roots are finite in float32.
_TINY = 1e-60
# A larger error ‖Z Y − 1‖ means that C has a negative eigenvalue, see `inverse_root`.
_CONVERGED = 1e-3
_LARGEST_CHANGE = 0.1  # relative change of ΔW in a step of A


def no_moments(x_ND: Tensor) -> Moments:
    """Returns the moments before the first step, for a factor given as rows."""
    *layers, components, features = x_ND.shape
    zeros = partial(x_ND.new_zeros, dtype=_algebra_dtype(x_ND))
    return {
        "basis": torch.zeros_like(x_ND),
        "first": torch.zeros_like(x_ND),
        "features": zeros(*layers, 1, features),
        "second": zeros(*layers, components, components),
        "weights": zeros(*layers, 2),
    }


def orthogonal_updates(  # noqa: PLR0913 (what one step of an optimizer needs)
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
    """Returns a step's updates, to subtract times the learning rate, and new moments.

    Args:
        factors: A (…, N, I) and Bᵀ (…, N, O) in float32 or float64, or this process's shards: some
            columns of each.
        gradients: the gradients of both factors; gradients and updates have the factors' shapes.
        moments: the moments of both factors; :func:`no_moments` at the start.
        lr: η, for the limit of A's update.
        betas: the decay rates of the first and the second moment.
        floor: the relative floor of inverse roots.
        lengths: I and O; required if the tensors are shards.
        over_shards: reduces tensors of 4 N² and 2 N² numbers per layer over the processes that hold
            the other shards.
    """
    beta_1, beta_2 = betas
    lengths = lengths or (factors[0].shape[-1], factors[1].shape[-1])
    gram_NN, overlap_NN = _own_products(factors, moments, over_shards)
    root_NN = inverse_root(gram_NN, floor)
    # Y is the other factor: A moves in B's frame, and B in A's.
    frame_NN = root_NN.flip(0)  # R_Y⁻¹
    transport_NN = (root_NN @ overlap_NN).flip(0)  # P

    has_frame = (_trace(frame_NN) > 0).to(root_NN)
    last_weights_2 = torch.stack([last["weights"] for last in moments])
    weight_1 = has_frame * (beta_1 * last_weights_2[..., 0] + (1 - beta_1))
    weight_2 = has_frame * (beta_2 * last_weights_2[..., 1] + (1 - beta_2))
    weights_2 = torch.stack([weight_1, weight_2], dim=-1)

    features, scaled = [], []  # c and H of both factors
    for side, gradient_ND in enumerate(gradients):
        framed_ND = _times(frame_NN[side], gradient_ND)
        square_1D = framed_ND.to(has_frame.dtype).square().mean(-2, keepdim=True)
        c_1D = beta_2 * moments[side]["features"] + (1 - beta_2) * square_1D
        c_1D = _each(has_frame[side]) * c_1D
        scale_1D = torch.where(c_1D > 0, (_each(weight_2[side]) / c_1D).sqrt(), 0.0)
        features.append(c_1D)
        scaled.append(framed_ND * scale_1D.to(framed_ND.dtype))

    squares = [h_ND @ h_ND.mT / length for h_ND, length in zip(scaled, lengths, strict=True)]
    square_NN = over_shards(torch.stack(squares), "sum").to(root_NN)
    moved_NN = _transported(torch.stack([last["second"] for last in moments]), transport_NN)
    second_NN = _each(has_frame) * (beta_2 * moved_NN + (1 - beta_2) * square_NN)  # V
    # (1 − β₁) (V / w₂)^(−1/2): the factor of H in M.
    whiten_NN = _each((1 - beta_1) * weight_2.sqrt()) * inverse_root(second_NN, floor)
    # R_Y⁻¹ / w₁, for A with the limit l.
    unframe_NN = frame_NN / _each(torch.where(weight_1 > 0, weight_1, 1.0))
    unframe_NN[0] *= _each(_limit(gram_NN, lengths[0], lr))

    updates, new_moments = [], []
    for side, last in enumerate(moments):
        first_ND = _times(beta_1 * transport_NN[side], last["first"])  # M
        first_ND = first_ND + _times(whiten_NN[side], scaled[side])
        updates.append(_times(unframe_NN[side], first_ND))
        new_moments.append(
            {
                "basis": _times(root_NN[side], factors[side]),
                "first": first_ND,
                "features": features[side],
                "second": second_NN[side],
                "weights": weights_2[side],
            }
        )
    return (updates[0], updates[1]), (new_moments[0], new_moments[1])


def _own_products(
    factors: Pair, moments: tuple[Moments, Moments], over_shards: OverShards
) -> tuple[Tensor, Tensor]:
    """Returns X Xᵀ and X Q'ᵀ (2, …, N, N) of both factors, where Q' is the factor's last frame."""
    products = []
    for x_ND, last in zip(factors, moments, strict=True):
        products += [x_ND @ x_ND.mT, x_ND @ last["basis"].mT]
    products_NN = over_shards(torch.stack(products), "sum").to(_algebra_dtype(factors[0]))
    return products_NN[0::2], products_NN[1::2]


def _transported(second_NN: Tensor, transport_NN: Tensor) -> Tensor:
    """Returns P V Pᵀ + e·1."""
    moved_NN = transport_NN @ second_NN @ transport_NN.mT
    escaped = (_trace(second_NN) - _trace(moved_NN)).clamp_min(0) / second_NN.shape[-1]
    moved_NN.diagonal(dim1=-2, dim2=-1).add_(escaped.unsqueeze(-1))
    return moved_NN


def _limit(gram_NN: Tensor, in_features: int, lr: float) -> Tensor:
    """Returns A's limit l, from ‖B A‖² = ⟨A Aᵀ, Bᵀ B⟩."""
    product_norm = (gram_NN[0] * gram_NN[1]).sum((-2, -1)).clamp_min(0).sqrt()
    largest = _LARGEST_CHANGE / math.sqrt(in_features * gram_NN.shape[-1]) / max(lr, 1e-30)
    return (largest * product_norm).clamp_max(1)


def inverse_root(gram_NN: Tensor, floor: float = 1e-6) -> Tensor:
    """Returns (C + floor·‖C‖·1)^(−1/2) of symmetric positive semi-definite matrices C (…, N, N).

    Zero if C is zero. ‖C‖ is the Frobenius norm. If C has eigenvalues below −floor·‖C‖, this root
    does not exist, and C is treated as ‖C‖·1.

    Coupled Newton–Schulz iteration with the scaling of Chen and Chow (2014, "A Stable Scaling of
    Newton-Schulz for Improving the Sign Function Computation of a Hermitian Matrix").
    """
    norm = torch.linalg.matrix_norm(gram_NN, keepdim=True)
    is_zero = norm <= _TINY
    norm = torch.where(is_zero, 1.0, norm)
    one_NN = torch.eye(gram_NN.shape[-1], dtype=gram_NN.dtype, device=gram_NN.device)
    # y converges to C^(1/2) and z to C^(−1/2); both are polynomials in C.
    y_NN = (gram_NN / norm + floor * one_NN) / (1 + floor)
    z_NN = one_NN.expand_as(gram_NN)
    for scale in _scales(floor):
        step_NN = (z_NN @ y_NN) * (-0.5 * scale**3)
        step_NN.diagonal(dim1=-2, dim2=-1).add_(1.5 * scale)
        y_NN = y_NN @ step_NN
        z_NN = step_NN @ z_NN
    error = torch.linalg.matrix_norm(z_NN @ y_NN - one_NN, keepdim=True)
    root_NN = torch.where(error < _CONVERGED, z_NN, one_NN) / (norm * (1 + floor)).sqrt()
    return torch.where(is_zero, 0.0, root_NN)


@lru_cache
def _scales(floor: float) -> list[float]:
    """Returns each iteration's scale, until the smallest possible singular value reaches 1."""
    smallest = math.sqrt(floor / (1 + floor))
    scales = []
    while 1 - smallest > 1e-12:
        scale = math.sqrt(3 / (1 + smallest + smallest**2))
        smallest = scale * smallest * (3 - (scale * smallest) ** 2) / 2
        scales.append(scale)
    return scales


def _times(small_NN: Tensor, x_ND: Tensor) -> Tensor:
    return small_NN.to(x_ND.dtype) @ x_ND


def _each(number: Tensor) -> Tensor:
    """Returns a number per layer in the shape of its matrices, (…, 1, 1)."""
    return number[..., None, None]


def _trace(matrix_NN: Tensor) -> Tensor:
    return matrix_NN.diagonal(dim1=-2, dim2=-1).sum(-1)


def _algebra_dtype(tensor: Tensor) -> torch.dtype:
    """Returns float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
