"""A new task for a trained adapter: coverage, confusion, and directions that nothing uses yet.

None of this is in the paper. Keys and centroids are those of :mod:`badit.method.abilities`.

Coverage. A task needs no expert of its own if most of its prompts are close to an existing
centroid. Confusion. A prompt z of cluster c is nearer to a new centroid d if ⟨z, d − c⟩ > 0. With
the mean of the cluster's keys, their largest principal components u_k σ_k, and a normal
distribution:

    P = Φ(⟨mean, d − c⟩ / √(Σ_k ⟨u_k σ_k, d − c⟩²))

Mixing. c_1 and c_2 are the cosines of a prompt to the nearest centroids of its two nearest tasks.
With a temperature T, these tasks have the shares softmax(c / T) in the prompt's change.

Directions. G = ∂L/∂W of the new task, P the projector on the rows of all frozen A's. The rows of
the new A are the top right singular vectors of G (I − P). G is never stored: two passes over the
same batches give Ω G, with random Ω, and then G Q, with Q an orthonormal basis of the rows of
Ω G (I − P) (Halko et al. 2011, arXiv 0909.4061). The result is exact if G has at most as many
singular values above zero as Ω has rows.

Shape suffixes: S = prompts, E = features of a key, C = clusters, D = other clusters, X = nearest
tasks of a prompt, O/I = out/in features, R = rank, F = rows of frozen A's, M = rows of the sketch,
P = positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Principal components of a cluster's keys; single features vary together.
PRINCIPAL_COMPONENTS = 8
_UNLIKE_DEVIATIONS = 3
_ROUNDING = 1e-4  # of a cosine: the prompts of a cluster may all be equal
_LEAST_SHARE = 1e-3  # of the second task of a prompt; below it, the prompt has one task
_OVERSAMPLING = 8  # rows of a sketch beyond the rank
_NOISE = 1e-6  # of a sketch's norm; fills the basis if the gradient has too small a rank
_NEGLIGIBLE = 1e-5  # of a norm: what rounding leaves of a vector inside the frozen space


# --- clusters ---
def is_covered(cosines_SC: Tensor, threshold: float, share: float) -> bool:
    """Returns whether at least a share of prompts has a cosine above the threshold."""
    if not len(cosines_SC):
        return False
    return bool((cosines_SC.amax(dim=1) > threshold).double().mean() >= share)


def key_spread(keys_SE: Tensor, cluster_S: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Returns the means (C, E) of the keys of each cluster, and the principal components (C, K, E).

    A component has the length of its standard deviation. Both are 0 for a cluster without prompts.
    """
    features = keys_SE.shape[1]
    means_CE = keys_SE.new_zeros(clusters, features)
    spread_CKE = keys_SE.new_zeros(clusters, PRINCIPAL_COMPONENTS, features)
    for cluster in cluster_S.unique().tolist():
        own_SE = keys_SE[cluster_S == cluster]
        means_CE[cluster] = own_SE.mean(dim=0)
        centred_SE = (own_SE - means_CE[cluster]) / len(own_SE) ** 0.5
        _, sizes, directions = torch.linalg.svd(centred_SE, full_matrices=False)
        components_KE = (sizes[:, None] * directions)[:PRINCIPAL_COMPONENTS]
        spread_CKE[cluster, : len(components_KE)] = components_KE
    return means_CE, spread_CKE


def mixing_shares(cosines_SC: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the indices (S, X) and the shares (S, X) of the two nearest tasks of prompts.

    The cosines are those to the nearest centroid of each task, of which there are at least two. A
    share below 0.001 becomes 0, and the other one 1.
    """
    # Stable, so that of equally near tasks the earlier one is first.
    sorted_SC, order_SC = cosines_SC.sort(dim=1, descending=True, stable=True)
    difference_S = sorted_SC[:, 1].double() - sorted_SC[:, 0].double()
    second_S = torch.sigmoid(difference_S / temperature)  # the softmax of two
    second_S = torch.where(second_S < _LEAST_SHARE, 0.0, second_S)
    return order_SC[:, :2], torch.stack([1 - second_S, second_S], dim=1).float()


class Likeness(NamedTuple):
    """How prompts compare with those that clusters were found from.

    Attributes:
        unlike_share: the share of prompts whose cosine to their centroid c is more than three
            standard deviations below the mean of the cluster's prompts:
            ⟨z, c⟩ < ⟨mean, c⟩ − 3 √(Σ_k ⟨u_k σ_k, c⟩²).
        shift: the distance of the prompts' mean from the mean of their clusters' prompts,
            ‖mean(z) − mean(mean_c(z))‖.
    """

    unlike_share: float
    shift: float


def likeness(
    keys_SE: Tensor, means_CE: Tensor, spread_CKE: Tensor, centroids_CE: Tensor
) -> Likeness:
    """Compares prompts with the clusters that are nearest to them."""
    centroids_CE = centroids_CE.double()
    cosine_S, cluster_S = (keys_SE.double() @ centroids_CE.T).max(dim=1)
    mean_C = (means_CE.double() * centroids_CE).sum(dim=1)
    deviation_C = torch.einsum("cke,ce->ck", spread_CKE.double(), centroids_CE).norm(dim=1)
    least_C = mean_C - _UNLIKE_DEVIATIONS * deviation_C - _ROUNDING
    is_unlike_S = cosine_S < least_C[cluster_S]
    shift_E = (keys_SE.double() - means_CE.double()[cluster_S]).mean(dim=0)
    return Likeness(float(is_unlike_S.double().mean()), float(shift_E.norm()))


def confused_shares(
    means_CE: Tensor, spread_CKE: Tensor, centroids_CE: Tensor, others_DE: Tensor
) -> Tensor:
    """Returns the share (C, D) of each cluster's prompts that is nearer to another centroid."""
    difference_CDE = others_DE.double() - centroids_CE.double()[:, None]
    mean_CD = torch.einsum("ce,cde->cd", means_CE.double(), difference_CDE)
    deviations_CKD = torch.einsum("cke,cde->ckd", spread_CKE.double(), difference_CDE)
    # Without variance the share is 0 or 1, and 0 if the centroids are equal.
    deviation_CD = deviations_CKD.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.ndtr(mean_CD / deviation_CD) * (difference_CDE != 0).any(dim=2)


# --- directions ---
def sketch_rows(rank: int, out_features: int, in_features: int) -> int:
    """Returns M, the number of rows of the sketch of a gradient."""
    return min(rank + _OVERSAMPLING, out_features, in_features)


def frozen_basis(rows_FI: Tensor) -> Tensor:
    """Returns an orthonormal basis (F', I) of the space of rows, in float64 on the CPU."""
    rows_FI = rows_FI.detach().double().cpu()
    # Unit rows, so that a row counts however small it is.
    rows_FI = F.normalize(rows_FI[rows_FI.any(dim=1)], dim=1)
    if not len(rows_FI):
        return rows_FI
    _, sizes, directions_FI = torch.linalg.svd(rows_FI, full_matrices=False)
    return directions_FI[sizes > _NEGLIGIBLE * sizes[0]]


def complement_basis(sketch_MI: Tensor, frozen_FI: Tensor, rank: int) -> Tensor | None:
    """Returns Q (M', I), orthonormal rows that span those of Ω G (I − P), in float64 on the CPU.

    None if the complement of the frozen basis (F, I) has fewer dimensions than the rank, or holds
    nothing of the gradient. A sketch of zeros gives random directions in the complement.
    """
    sketch_MI = sketch_MI.detach().double().cpu()
    frozen_FI = frozen_FI.double().cpu()
    free = sketch_MI.shape[1] - len(frozen_FI)
    if free < rank:
        return None
    norm = float(sketch_MI.norm())
    outside_MI = _without(sketch_MI, frozen_FI)
    if norm > 0 and outside_MI.norm() <= _NEGLIGIBLE * norm:
        return None
    generator = torch.Generator().manual_seed(0)
    random_MI = torch.randn(sketch_MI.shape, generator=generator, dtype=torch.float64)
    scale = (_NOISE * norm or 1.0) / random_MI.norm()
    outside_MI = outside_MI + scale * _without(random_MI, frozen_FI)
    _, _, basis_MI = torch.linalg.svd(outside_MI, full_matrices=False)
    basis_MI = basis_MI[:free]
    # Projected again: of small rows, rounding leaves a part inside the frozen space.
    return torch.linalg.qr(_without(basis_MI, frozen_FI).T).Q.T


def _without(rows_MI: Tensor, frozen_FI: Tensor) -> Tensor:
    """Returns rows minus their projection on an orthonormal basis."""
    return rows_MI - (rows_MI @ frozen_FI.T) @ frozen_FI


def top_directions(image_OM: Tensor, basis_MI: Tensor, rank: int) -> Tensor:
    """Returns the top right singular vectors (R, I) of G Q Qᵀ, for the image G Q (O, M)."""
    image_OM = image_OM.detach().double().cpu()
    _, _, rotation_MM = torch.linalg.svd(image_OM, full_matrices=True)
    directions_RI = rotation_MM[:rank] @ basis_MI.double().cpu()
    # A decomposition leaves the signs open; rounding must not choose them.
    largest_R1 = directions_RI.abs().argmax(dim=1, keepdim=True)
    return directions_RI * directions_RI.gather(1, largest_R1).sign()


def add_to_sketch(sketch_MI: Tensor, probe_MO: Tensor, x_PI: Tensor, gradient_PO: Tensor) -> None:
    """Adds Ω G of a batch to its sketch, for G = Σ_p gradient_p x_pᵀ."""
    sketch_MI += (gradient_PO @ probe_MO.T).T @ x_PI


def add_to_image(image_OM: Tensor, basis_MI: Tensor, x_PI: Tensor, gradient_PO: Tensor) -> None:
    """Adds G Q of a batch to its image."""
    image_OM += gradient_PO.T @ (x_PI @ basis_MI.T)
