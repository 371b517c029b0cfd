"""DOG: dynamically orthogonal grouping of components by their gradients (paper, section on DOG).

Component i is the pair (row i of A, column i of B); ĝ_i is its concatenated, normalised gradient.
DOG searches for the assignment Π ∈ {0,1}^{N×K} with exactly r components per expert that maximises

    Σ_k ‖Σ_i π_ik ĝ_i‖²  =  tr(Πᵀ G Π),     G = [⟨ĝ_i, ĝ_j⟩].

The solvers need only the Gram matrix G, N² numbers per layer. A running mean of G is also a Gram
matrix, and inner products of sharded gradients are sums over the shards.

* spherical k-means: ⟨ĝ_i, c_k⟩ = (GΠ)_ik / √(ΠᵀGΠ)_kk
* the paper's polar targets: centroid matrix C = U Σ Vᵀ, targets Q = U Vᵀ,
  ⟨ĝ_i, q_k⟩ = (GΠ (ΠᵀGΠ)^(−1/2))_ik
* swapping i ∈ a with j ∈ b changes the objective by
  2(S_ib − S_ia + S_ja − S_jb) + 2(G_ii + G_jj) − 4 G_ij, S = GΠ

The default solver ends with swaps, because k-means and the paper's loop can stop where a single
swap still improves.

Shape suffixes: N = components, K = experts, I/O = in/out features. Solvers run in float64 on the
CPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from badit.support.errors import BaditError, refuse_unknown

Solver = Literal["swap", "paper"]
# (tensor, "max" or "sum") -> the tensor, reduced over the processes that hold the shards.
OverShards = Callable[[Tensor, Literal["max", "sum"]], Tensor]

MIN_RELATIVE_GAIN = 1e-6  # a new grouping with a smaller gain is rejected as rounding noise
_MAX_ROUNDS = 50


def cosine_gram(
    grad_A_NI: Tensor, grad_B_ON: Tensor, over_shards: OverShards = lambda tensor, operation: tensor
) -> Tensor:
    """Returns G_NN = [⟨ĝ_i, ĝ_j⟩] of the components' gradients in float32 on the gradients' device.

    A component whose gradient is zero or not finite has a zero row and column.

    Args:
        grad_A_NI, grad_B_ON: the gradients, or this process's shards of them: some columns of A and
            some rows of B. Leading dimensions, the same for both, are layers; each layer has its
            own Gram matrix.
        over_shards: reduces tensors of N and N² numbers over the processes that hold the other
            shards.
    """
    a_NI = grad_A_NI.detach().float()
    b_NO = grad_B_ON.detach().float().mT
    # Divide by the peak before multiplying: squares of small or large gradients underflow or
    # overflow.
    peak_N = over_shards(torch.maximum(_peaks(a_NI), _peaks(b_NO)), "max")
    peak_N1 = torch.where(peak_N > 0, peak_N, 1.0).unsqueeze(-1)
    a_NI = a_NI / peak_N1
    b_NO = b_NO / peak_N1
    # Component i concatenates its rows of both gradients, so their inner products add up.
    products_NN = over_shards(a_NI @ a_NI.mT + b_NO @ b_NO.mT, "sum")

    squared_N = products_NN.diagonal(dim1=-2, dim2=-1)
    usable_N = (squared_N > 0) & torch.isfinite(squared_N)
    usable_NN = usable_N.unsqueeze(-1) & usable_N.unsqueeze(-2)
    norm_N = torch.where(usable_N, squared_N, 1.0).sqrt()
    norm_NN = norm_N.unsqueeze(-1) * norm_N.unsqueeze(-2)
    return torch.where(usable_NN, products_NN / norm_NN, 0.0)


def _peaks(x_ND: Tensor) -> Tensor:
    """Returns the largest magnitude in every row; 0 for an empty shard."""
    if not x_ND.shape[-1]:
        return x_ND.sum(dim=-1)
    return torch.linalg.vector_norm(x_ND, ord=float("inf"), dim=-1)


def grouping_objective(gram_NN: np.ndarray, labels_N: np.ndarray) -> float:
    """Returns tr(ΠᵀGΠ) = Σ_k ‖Σ_{i ∈ k} ĝ_i‖², the objective that the paper maximises."""
    return float(gram_NN[labels_N[:, None] == labels_N[None, :]].sum())


def group_components(
    gram_NN: np.ndarray,
    current_N: np.ndarray,
    *,
    solver: Solver = "swap",
    restarts: int = 10,
    seed: int | Sequence[int] = 0,
) -> np.ndarray:
    """Returns the best balanced grouping found as labels_N, or ``current_N`` if none is better.

    Args:
        gram_NN: symmetric cosine Gram matrix, or a mean of several.
        current_N: the current labels 0 … K−1, each exactly r = N/K times.
        solver: "swap" (exact pairwise swaps, from the current grouping and from balanced spherical
            k-means) or "paper" (polar targets and integer assignment, from spherical k-means that
            starts with k-means++).
        restarts: number of k-means starts, of which the best result is used; "paper" uses at least
            one.
        seed: random seed; the same seed and Gram matrix give the same labels.

    Returns:
        Integer labels, permuted to overlap ``current_N`` as much as possible, so that experts keep
        their gates.

    Raises:
        BaditError: if the Gram matrix is not finite or not N × N, the labels are unbalanced, or the
            solver is unknown.
    """
    refuse_unknown("solver", solver, get_args(Solver))
    gram_NN = np.asarray(gram_NN, dtype=np.float64)
    current_N = np.asarray(current_N, dtype=np.int64)
    _refuse_unsuitable(gram_NN, current_N)
    # The swaps read rows for columns, but rounding may leave the matrix slightly asymmetric.
    gram_NN = (gram_NN + gram_NN.T) / 2
    num_experts = int(current_N.max()) + 1

    # "swap" also starts from the current grouping, "paper" only from k-means.
    if solver == "paper":
        restarts = max(1, restarts)
    rng = np.random.default_rng(seed)
    k_means = partial(_until_stable, gram_NN, similarity=_centroid_similarity)
    if solver == "swap":
        sorted_N = np.sort(current_N)
        starts = [rng.permutation(sorted_N) for _ in range(restarts)]
        clustered = [k_means(start_N, num_experts) for start_N in starts]
        candidates = _swap_until_optimal(gram_NN, np.stack([current_N, *clustered]), num_experts)
    else:
        starts = [_k_means_plus_plus(gram_NN, num_experts, rng) for _ in range(restarts)]
        # Plain k-means only gives the first centroids; the assignment to the targets balances.
        clustered = [k_means(start_N, num_experts, balanced=False) for start_N in starts]
        candidates = [
            _until_stable(gram_NN, start_N, num_experts, _polar_similarity) for start_N in clustered
        ]

    objective = partial(grouping_objective, gram_NN)
    best_N = max(candidates, key=objective)
    present = objective(current_N)
    if objective(best_N) - present <= MIN_RELATIVE_GAIN * max(1.0, abs(present)):
        return current_N.copy()
    return match_labels(best_N, current_N)


def _refuse_unsuitable(gram_NN: np.ndarray, labels_N: np.ndarray) -> None:
    components = len(labels_N)
    if gram_NN.shape != (components, components):
        raise BaditError(
            f"the Gram matrix has shape {gram_NN.shape}, but there are {components} labels"
        )
    if not np.isfinite(gram_NN).all():
        raise BaditError(
            "the Gram matrix of the components' gradients holds NaN or infinite values"
        )
    sizes_K = np.zeros(1, dtype=np.int64)
    if components and labels_N.min() >= 0:
        sizes_K = np.bincount(labels_N)
    if sizes_K.min() < 1 or sizes_K.min() != sizes_K.max():
        raise BaditError(
            f"every expert must hold the same number of components, got sizes {sizes_K.tolist()}"
        )


def balanced_assignment(similarity_NK: np.ndarray) -> np.ndarray:
    """Returns the labels (N), r = N/K of each expert, with the largest total similarity."""
    components, num_experts = similarity_NK.shape
    size = components // num_experts
    slots = np.repeat(similarity_NK, size, axis=1)  # every expert has `size` slots
    return linear_sum_assignment(slots, maximize=True)[1] // size


def match_labels(labels_N: np.ndarray, reference_N: np.ndarray) -> np.ndarray:
    """Renames the groups of ``labels_N`` to keep as many labels of ``reference_N`` as possible."""
    one_KK = np.eye(int(labels_N.max()) + 1)
    # Entry (a, b): the number of components in group a that have label b in the reference.
    overlap_KK = one_KK[labels_N].T @ one_KK[reference_N]
    _, name_K = linear_sum_assignment(overlap_KK, maximize=True)
    return name_K[labels_N]


def in_order(labels_N: np.ndarray) -> np.ndarray:
    """Returns the labels of the same groups, numbered by their first components.

    Equal groups then have equal labels, whichever start of the solver found them.
    """
    _, first_K, group_N = np.unique(labels_N, return_index=True, return_inverse=True)
    return first_K.argsort().argsort()[group_N]


class ExpertAngles(NamedTuple):
    """Mean angles in degrees between components' gradients (paper, Fig. 4), and mean |cos|.

    They are NaN if there is no pair. A mean angle hides opposite directions: cosines of +0.9 and
    −0.9 average to 90°.
    """

    intra_degrees: float
    inter_degrees: float
    intra_abs_cos: float
    inter_abs_cos: float

    def defined(self) -> dict[str, float | None]:
        """Returns the fields by name, with None for NaN, which JSON does not have."""
        undefined = dict.fromkeys(self._fields)
        return undefined | {
            name: value for name, value in self._asdict().items() if np.isfinite(value)
        }


def expert_angles(gram_NN: np.ndarray, labels_N: np.ndarray) -> ExpertAngles:
    """Returns the angles within and between experts.

    ``gram_NN`` should be of steps that the grouping was not fitted to.
    """
    # A mean over steps in some of which a component had no gradient has a diagonal below 1.
    root_N = np.sqrt(np.diag(gram_NN).astype(np.float64))
    norm_NN = np.outer(root_N, root_N)
    cosine_NN = np.clip(gram_NN / np.fmax(norm_NN, 1e-12), -1.0, 1.0)
    # Every pair once, without components that never had a gradient: they have no direction.
    pair_NN = np.triu(norm_NN, k=1) > 0
    same_NN = labels_N[:, None] == labels_N[None, :]
    intra = cosine_NN[pair_NN & same_NN]
    inter = cosine_NN[pair_NN & ~same_NN]
    return ExpertAngles(
        _mean(np.degrees(np.arccos(intra))),
        _mean(np.degrees(np.arccos(inter))),
        _mean(np.abs(intra)),
        _mean(np.abs(inter)),
    )


def _mean(values: np.ndarray) -> float:
    """Returns the mean, NaN without values (of which numpy would warn)."""
    return float(values.mean()) if values.size else float("nan")


def _k_means_plus_plus(
    gram_NN: np.ndarray, num_experts: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the nearest of K seeds for each component: greedy k-means++ (Arthur, Vassilvitskii).

    A seed is the best of 2 + ⌊ln K⌋ components that are drawn in proportion to their squared
    distance to the nearest earlier seed. The distance of unit gradients, 2 − 2⟨ĝ_i, ĝ_j⟩, orders
    them as their cosine does. From a random partition, k-means would stop at once where gradients
    are noisy: a centroid of few components is most similar to its own ones.
    """
    squared_N = np.diag(gram_NN)
    distance_NN = np.maximum(squared_N[:, None] + squared_N[None, :] - 2 * gram_NN, 0.0)
    seeds = [int(rng.integers(len(gram_NN)))]
    while len(seeds) < num_experts:
        nearest_N = distance_NN[:, seeds].min(axis=1)
        if not nearest_N.any():  # every component equals a seed
            nearest_N = np.ones_like(nearest_N)
        candidates_C = rng.choice(
            len(gram_NN), size=2 + int(np.log(num_experts)), p=nearest_N / nearest_N.sum()
        )
        total_C = np.minimum(nearest_N[:, None], distance_NN[:, candidates_C]).sum(axis=0)
        seeds.append(int(candidates_C[total_C.argmin()]))
    return distance_NN[:, seeds].argmin(axis=1)


def _until_stable(
    gram_NN: np.ndarray,
    labels_N: np.ndarray,
    num_experts: int,
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
    balanced: bool = True,
) -> np.ndarray:
    """Reassigns components to the most similar experts until the labels are stable."""
    for _ in range(_MAX_ROUNDS):
        onehot_NK = np.eye(num_experts)[labels_N]
        similarity_NK = similarity(onehot_NK, gram_NN @ onehot_NK)
        if balanced:
            new_N = balanced_assignment(similarity_NK)
        else:
            new_N = similarity_NK.argmax(axis=1)
        if np.array_equal(new_N, labels_N):
            break
        labels_N = new_N
    return labels_N


def _centroid_similarity(onehot_NK: np.ndarray, sums_NK: np.ndarray) -> np.ndarray:
    """Returns ⟨ĝ_i, c_k⟩ for unit centroids c_k, from Π and GΠ; 0 if a group sums to zero."""
    # ‖Σ_{i ∈ k} ĝ_i‖² = (ΠᵀGΠ)_kk.
    squared_K = (onehot_NK * sums_NK).sum(axis=0)
    return np.where(squared_K > 1e-12, sums_NK / np.sqrt(np.maximum(squared_K, 1e-12)), 0.0)


def _polar_similarity(onehot_NK: np.ndarray, sums_NK: np.ndarray) -> np.ndarray:
    """Returns ⟨ĝ_i, q_k⟩ from Π and GΠ.

    q_k are the paper's orthogonal targets, the polar factor of the centroids.
    """
    values_K, vectors_KK = np.linalg.eigh(onehot_NK.T @ sums_NK)
    # A linearly dependent or empty centroid has no polar direction; the pseudo-inverse ignores it.
    usable_K = values_K > 1e-10 * max(values_K.max(), 1e-30)
    # GΠ (ΠᵀGΠ)^(−1/2), by the eigenvectors of ΠᵀGΠ.
    inverse_root_K = np.where(usable_K, 1 / np.sqrt(np.where(usable_K, values_K, 1.0)), 0.0)
    return sums_NK @ (vectors_KK * inverse_root_K) @ vectors_KK.T


def _swap_until_optimal(gram_NN: np.ndarray, starts_SN: np.ndarray, num_experts: int) -> np.ndarray:
    """Swaps the best pair of components in each of S groupings until no single swap improves it.

    Components are sorted by expert, so that a group is a slice; R = components per expert, C =
    experts of the last swap. All groupings are swapped together; once half of them have converged,
    the others continue without them.
    """
    starts, components = starts_SN.shape
    size = components // num_experts
    noise = 1e-9 * max(1.0, float(np.abs(gram_NN).max()))  # smaller gains may be rounding errors
    order_SN = np.argsort(starts_SN, axis=1, kind="stable")
    gram_SNN = gram_NN[order_SN[:, :, None], order_SN[:, None, :]]
    # Views of the Gram matrices and of S = GΠ, which reflect the swaps.
    gram_SKRKR = gram_SNN.reshape(starts, num_experts, size, num_experts, size)
    sums_SKRK = gram_SKRKR.sum(axis=-1)
    sums_SNK = sums_SKRK.reshape(starts, components, num_experts)
    diagonal_SKR = np.einsum("skrkr->skr", gram_SKRKR)  # G_ii
    own_SKR = np.einsum("skrk->skr", sums_SKRK)  # S_ia of i's own group a

    s = np.arange(starts)
    best_SKK = np.zeros((starts, num_experts, num_experts))
    changed_SC = np.tile(np.arange(num_experts), (starts, 1))
    while True:
        # A gain divided by 4 is (S_ib − S_ia + G_ii) / 2 + (S_ja − S_jb + G_jj) / 2 − G_ij.
        move_SKRK = (sums_SKRK - (own_SKR - diagonal_SKR)[..., None]) / 2
        _update_best_gains(best_SKK, changed_SC, move_SKRK, gram_SKRKR)
        a, b = np.divmod(best_SKK.reshape(starts, -1).argmax(axis=1), num_experts)
        improves_S = best_SKK[s, a, b] > noise / 4
        if 2 * improves_S.sum() <= starts:
            break

        there_SRR = move_SKRK[s, a, :, b][:, :, None]
        back_SRR = move_SKRK[s, b, :, a][:, None]
        gain_SRR = there_SRR + back_SRR - gram_SKRKR[s, a, :, b]
        i, j = np.divmod(gain_SRR.reshape(starts, -1).argmax(axis=1), size)
        i = a * size + i
        j = np.where(improves_S, b * size + j, i)  # a converged grouping swaps i with itself
        # S = GΠ: group a loses column i of G and gains column j, group b the reverse.
        exchange_SN = gram_SNN[s, j] - gram_SNN[s, i]
        sums_SNK[s, :, a] += exchange_SN
        sums_SNK[s, :, b] -= exchange_SN
        # The Gram matrices change places in rows and, by the transposed view, in columns.
        for rows in (order_SN, sums_SNK, gram_SNN, gram_SNN.transpose(0, 2, 1)):
            rows[s, i], rows[s, j] = rows[s, j], rows[s, i]
        changed_SC = np.stack([a, b], axis=1)

    # From positions sorted by expert back to the components' own order.
    labels_SN = np.empty_like(starts_SN)
    labels_SN[s[:, None], order_SN] = np.arange(components) // size
    if improves_S.any():
        labels_SN[improves_S] = _swap_until_optimal(gram_NN, labels_SN[improves_S], num_experts)
    return labels_SN


def _update_best_gains(
    best_SKK: np.ndarray, changed_SC: np.ndarray, move_SKRK: np.ndarray, gram_SKRKR: np.ndarray
) -> None:
    """Updates the largest gain of a swap between two experts, after these C experts changed."""
    rows = np.arange(len(best_SKK))[:, None]
    there_SCRK = move_SKRK[rows, changed_SC]
    back_SCKR = move_SKRK.transpose(0, 3, 1, 2)[rows, changed_SC]
    gain_SCRKR = there_SCRK[..., None] + back_SCKR[:, :, None] - gram_SKRKR[rows, changed_SC]
    best_SCK = gain_SCRKR.max(axis=2).max(axis=-1)
    # A swap of a and b is one of b and a, so rows and columns have the same gains.
    best_SKK[rows, changed_SC] = best_SCK
    best_SKK[rows, :, changed_SC] = best_SCK
    # A swap within an expert changes nothing.
    diagonal = np.arange(best_SKK.shape[1])
    best_SKK[:, diagonal, diagonal] = 0.0
