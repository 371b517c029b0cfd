"""BAD: basic ability decomposition of one weight (paper, section on BAD).

    W0 = s · Σ_k B_k A_k + Ŵ,     B_k = U_[k] √(Σ_[k]/s),   A_k = √(Σ_[k]/s) V_[k]ᵀ

where [k] is the k-th group of r triples among the top N = K·r singular triples and s = lora_alpha /
r is LoRA's scaling. Singular values are split as in PiSSA. The paper writes A_k B_k for what LoRA
calls B_k A_k; the code uses LoRA's letters.

Shape suffixes: O/I = out/in features, N = components (K experts of rank r), P = N plus oversampling
(in ``compress``: the new rank), M = the columns of all blocks of P, D = O or I, S/L = the shorter
and the longer side.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from badit.support.errors import BaditError, refuse_unknown

SvdMethod = Literal["auto", "exact", "randomized"]

# Up to this smaller dimension, a dense factorisation is about as fast as the iteration, and exact.
_EXACT_UP_TO = 1024
# A Gram matrix squares σ_N / σ_1. Above this ratio, its float64 eigenvalues still give every triple
# more digits than float32 can hold.
_GRAM_DOWN_TO = 1e-4
# Columns of a block beyond the rank: with them, the last triples converge in fewer passes.
_OVERSAMPLING = 16
_MAX_PASSES = 200
# Limits the memory of the two bases, and the SVD of R in each pass.
_MAX_BLOCKS = 8


class SingularTriples(NamedTuple):
    """The N largest singular triples by descending σ: W ≈ u_ON diag(s_N) vh_NI (all float32)."""

    u_ON: Tensor
    s_N: Tensor
    vh_NI: Tensor


def top_singular_triples(
    weight_OI: Tensor,
    rank: int,
    *,
    method: SvdMethod = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
) -> SingularTriples:
    """Returns the ``rank`` largest singular triples in float32.

    The largest-magnitude entry of every u is positive.

    Args:
        weight_OI: the weight, (out, in), any floating dtype.
        rank: the number of triples, N ≤ min(out, in).
        method: "exact" (a dense factorisation), "randomized" (block Krylov iteration) or "auto",
            which iterates only if both dimensions exceed 1024 and four times the rank.
        tolerance: the randomised method iterates until ‖W v − σ u‖ ≤ max(tolerance · σ, ε √n σ₁)
            for *every* triple.
        seed: seed of the randomised method's random start.

    Raises:
        BaditError: if the weight is not 2-D or not finite, the rank is out of range, or the method
            is unknown.
    """
    _refuse_rank(rank, weight_OI.shape)
    refuse_unknown("svd_method", method, get_args(SvdMethod))
    if weight_OI.is_meta:  # a weight on the meta device has a shape and no values
        return SingularTriples(
            weight_OI.new_empty(len(weight_OI), rank),
            weight_OI.new_empty(rank),
            weight_OI.new_empty(rank, weight_OI.shape[1]),
        )
    w_OI = weight_OI.detach().to(torch.float32)
    # One pass over the weight; minimum and maximum propagate NaN.
    if not torch.isfinite(torch.stack(w_OI.aminmax())).all():
        raise BaditError("the weight holds NaN or infinite values; it cannot be decomposed")

    # A basis of few blocks would already span a weight with a side below four times the rank.
    is_small = min(w_OI.shape) <= max(_EXACT_UP_TO, 4 * rank)
    if method == "exact" or (method == "auto" and is_small):
        u_ON, s_N, vh_NI = _exact_svd(w_OI, rank)
    else:
        u_ON, s_N, vh_NI = _randomized_svd(w_OI, rank, tolerance, seed)

    # u and v may change sign together; the convention makes the result unique.
    peak_N = u_ON.gather(0, u_ON.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    sign_N = torch.where(peak_N < 0, -1.0, 1.0)
    u_ON = u_ON * sign_N
    vh_NI = vh_NI * sign_N[:, None]
    return SingularTriples(u_ON.contiguous(), s_N.contiguous(), vh_NI.contiguous())


def expert_factors(triples: SingularTriples, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns A_NI = √(Σ/s) Vᵀ and B_ON = U √(Σ/s): both factors have half of each singular value.

    s · B_ON @ A_NI is exactly the top-N part of the weight, for any scaling s. Both factors of
    component i have the norm √(σ_i/s). Expert k holds components k·r … k·r + r − 1.
    """
    root_N = (triples.s_N / scaling).sqrt()
    a_NI = root_N[:, None] * triples.vh_NI
    b_ON = triples.u_ON * root_N
    return a_NI, b_ON


def expert_directions(triples: SingularTriples) -> tuple[Tensor, Tensor]:
    """Returns the experts' directions without their magnitudes: A_NI = Vᵀ/√3, B_ON = 0.

    1/√3 is the expected norm of a row of LoRA's random A. B is zero, so no gate scales a part of
    the pretrained weight. This initialisation is not in the paper.
    """
    return triples.vh_NI / math.sqrt(3), torch.zeros_like(triples.u_ON)


def compress(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Returns the rank-P factors whose product is closest to B A (Eckart & Young 1936).

    They are A (P, I) and B (O, P) in float32, with half of each singular value, followed by the
    Frobenius norms of the truncation error and of B A. Components beyond the largest possible rank
    of B A are zero.
    """
    # In float64: the SVD of the small core matrix between two QR factorisations.
    q_OC, core_CR = torch.linalg.qr(b_OR.double())
    q_IC, core_AR = torch.linalg.qr(a_RI.double().T)
    u, s, vh = torch.linalg.svd(core_CR @ core_AR.T, full_matrices=False)

    root_P = s[:rank].sqrt()
    missing = rank - len(root_P)
    a_PI = F.pad(root_P[:, None] * (vh[:rank] @ q_IC.T), (0, 0, 0, missing))
    b_OP = F.pad((q_OC @ u[:, :rank]) * root_P, (0, missing))
    return a_PI.float(), b_OP.float(), float(s[rank:].norm()), float(s.norm())


def _refuse_rank(rank: int, shape: torch.Size) -> None:
    if len(shape) != 2:
        raise BaditError(f"only a 2-D weight can be decomposed, got one of shape {tuple(shape)}")
    if not 1 <= rank <= min(shape):
        raise BaditError(
            f"num_experts × r = {rank} singular triples do not fit a weight of shape "
            f"{tuple(shape)}: at most {min(shape)} exist; lower num_experts or r"
        )


def _exact_svd(w_OI: Tensor, rank: int) -> SingularTriples:
    if w_OI.is_cpu:  # where eigenvectors of a Gram matrix are faster than an SVD
        triples = _svd_of_gram(w_OI, rank)
        if triples is not None:
            return triples
    u, s, vh = torch.linalg.svd(w_OI, full_matrices=False)
    return SingularTriples(u[:, :rank], s[:rank], vh[:rank])


def _svd_of_gram(w_OI: Tensor, rank: int) -> SingularTriples | None:
    """Decomposes the shorter side's float64 Gram matrix; None if σ_N is too small to be precise."""
    is_wide = w_OI.shape[0] <= w_OI.shape[1]
    if not is_wide:
        w_OI = w_OI.T
    wide_SL = w_OI.double()
    # W Wᵀ = U Σ² Uᵀ.
    squares_S, vectors_SS = torch.linalg.eigh(wide_SL @ wide_SL.T)  # ascending
    # Rounding can make a zero eigenvalue negative.
    s_N = squares_S[-rank:].clamp_min(0).sqrt().flip(0)
    if s_N[-1] <= _GRAM_DOWN_TO * s_N[0]:
        return None

    short_SN = vectors_SS[:, -rank:].flip(1)
    # The other side's vectors: vᵀ = uᵀ W / σ.
    long_NL = short_SN.T @ wide_SL / s_N[:, None]
    if is_wide:
        return SingularTriples(short_SN.float(), s_N.float(), long_NL.float())
    return SingularTriples(long_NL.T.float(), s_N.float(), short_SN.T.float())


def _randomized_svd(w_OI: Tensor, rank: int, tolerance: float, seed: int) -> SingularTriples:
    """Runs block Krylov iteration with Rayleigh–Ritz until every residual is small.

    Musco & Musco 2015, arXiv 1504.05477. The Ritz triples come from the span of all blocks so far,
    W·(WᵀW)^j·random. The two bases satisfy UᵀW = RᵀVᵀ, so Wᵀu = σv holds for every triple and
    ‖W v − σ u‖ is its only residual. The iteration restarts after _MAX_BLOCKS blocks.
    """
    unit = _power_of_two(w_OI)
    w_OI = w_OI / unit
    out_features, in_features = w_OI.shape
    block = min(rank + _OVERSAMPLING, out_features, in_features)
    longest_basis = min(_MAX_BLOCKS * block, out_features, in_features)

    # Drawn on the CPU, so that all devices start from the same block.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    new_IP = torch.randn(in_features, block, generator=generator).to(w_OI.device)
    u_OM = w_OI.new_empty(out_features, 0)
    v_IM = w_OI.new_empty(in_features, 0)
    r_MM = w_OI.new_empty(0, 0)
    for _ in range(_MAX_PASSES):
        # Both bases grow by a block, and R by its columns.
        q_OP, _ = _new_directions(u_OM, w_OI @ new_IP)
        new_IP, r_MP = _new_directions(v_IM, w_OI.T @ q_OP)
        u_OM = torch.cat([u_OM, q_OP], dim=1)
        v_IM = torch.cat([v_IM, new_IP], dim=1)
        r_MM = torch.cat([F.pad(r_MM, (0, 0, 0, block)), r_MP], dim=1)

        # Uᵀ W V = Rᵀ in the two bases: the triples of this small matrix are the Ritz triples of W.
        left_MM, s_M, right_MM = torch.linalg.svd(r_MM.T)
        u_ON = u_OM @ left_MM[:, :rank]
        s_N = s_M[:rank]
        v_IN = v_IM @ right_MM[:rank].T
        residual_N = torch.linalg.vector_norm(w_OI @ v_IN - u_ON * s_N, dim=0)
        # For small σ, the bound is float32's rounding error of the largest σ instead.
        noise = s_N[0] * torch.finfo(torch.float32).eps * max(w_OI.shape) ** 0.5
        if (residual_N <= (tolerance * s_N).clamp_min(noise)).all():
            return SingularTriples(u_ON, s_N * unit, v_IN.T)

        if u_OM.shape[1] + block > longest_basis:
            # The leading Ritz vectors keep what the dropped blocks have found.
            new_IP = v_IM @ right_MM[:block].T
            u_OM, v_IM, r_MM = u_OM[:, :0], v_IM[:, :0], r_MM[:0, :0]
    # No convergence within the limit.
    u_ON, s_N, vh_NI = _exact_svd(w_OI, rank)
    return SingularTriples(u_ON, s_N * unit, vh_NI)


def _power_of_two(w_OI: Tensor) -> Tensor:
    """Returns a power of two of about the weight's largest magnitude: dividing by it is exact.

    Without it, squares of very small or large weights underflow or overflow in float32.
    """
    low, high = w_OI.aminmax()
    peak = torch.maximum(-low, high).clamp_min(torch.finfo(torch.float32).tiny)
    # peak = mantissa · 2^e with 1/2 ≤ mantissa < 1, so this is 2^(e − 1).
    return peak / (2 * torch.frexp(peak).mantissa)


def _new_directions(basis_DM: Tensor, new_DP: Tensor) -> tuple[Tensor, Tensor]:
    """Returns q_DP and r_M'P with new = [basis, q] r and orthonormal [basis, q]."""
    within_MP = basis_DM.T @ new_DP
    q_DP, r_PP = torch.linalg.qr(new_DP - basis_DM @ within_MP)
    # A second pass removes the parts along the basis that rounding has left.
    left_MP = basis_DM.T @ q_DP
    q_DP, second_PP = torch.linalg.qr(q_DP - basis_DM @ left_MP)
    return q_DP, torch.cat([within_MP + left_MP @ r_PP, second_PP @ r_PP])
