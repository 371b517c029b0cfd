"""Abilities: the key of a prompt, and the codes and groups that gradients at step 0 suggest.

The paper calls a group of components an ability, and represents a task as a combination of
abilities. Here a cluster c of prompts has a code, its K gates g_c. The overlap of two codes is
their cosine. It scales how much training on one cluster changes the other, so it should be large
for clusters whose gradients agree. None of this is in the paper.

Key. m is the mean token embedding of a prompt, μ and Σ are mean and covariance of the vocabulary's
embeddings. Neither depends on the layers or on the training, so a key never changes:

    z = normalise(W (m − μ)),    W = (Σ + ridge)^(−1/2)

Agreement of clusters. a_c and b_c are the gradients of two halves of a cluster's prompts, minus
their mean over clusters. This mean, such as the form of an answer, says nothing about which
clusters differ. Products of different halves have no bias from noise:

    q_c = max(⟨a_c, b_c⟩, 0.1 ‖a_c‖ ‖b_c‖),    cos_cd = ½ (⟨a_c, b_d⟩ + ⟨b_c, a_d⟩) / √(q_c q_d)

Two ways to codes and groups:

    matched    codes whose overlaps are closest to the target; then every component joins an expert
               of the clusters that use it
    grouped    the paper's order: components are grouped by the cosines of their gradients; then
               every cluster has large gates where its gradients are large

Shape suffixes: V = vocabulary, I = features of an embedding, B = prompts, C = clusters, K =
experts, N = components, L = layers.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from badit.method.grouping import balanced_assignment
from badit.method.routing import without_autocast

_RIDGE = 1e-3  # relative to the mean variance; rare directions of the vocabulary stay bounded
_LEAST_RELIABILITY = 0.1  # of a half's gradient; limits how much noise a correction amplifies
_SHRINKAGE = 0.25  # of an overlap towards the mean: cosines of few prompts are noisy
_STEPS = 400
_STEP_SIZE = 0.05
_WEIGHT_OF_LOAD = 0.02  # of the balance of the experts' load, relative to the overlaps


# --- the key of a prompt ---
def vocabulary_moments(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the mean μ (I) and the whitening W (I, I) of a vocabulary, in float32.

    ``pieces`` are its embeddings (rows, I), of which only one piece at a time is in memory.
    """
    count = 0
    origin_I: Any = None  # near the mean, so that the sum of squares keeps its precision
    sum_I: Any = 0.0
    gram_II: Any = 0.0
    for piece in pieces:
        rows_VI = piece.detach().double()
        if origin_I is None:
            origin_I = rows_VI.mean(dim=0)
        rows_VI = rows_VI - origin_I
        count += len(rows_VI)
        sum_I = sum_I + rows_VI.sum(dim=0)
        gram_II = gram_II + rows_VI.T @ rows_VI
    shift_I = sum_I / count
    mean_I = origin_I + shift_I
    covariance_II = (gram_II - count * torch.outer(shift_I, shift_I)) / max(1, count - 1)
    # A vocabulary of equal rows has no variance, and its keys are zero with any ridge above zero.
    ridge = (_RIDGE * covariance_II.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    covariance_II.diagonal().add_(ridge)
    variance_I, directions_II = torch.linalg.eigh(covariance_II)
    scale_I = variance_I.clamp_min(ridge).rsqrt()
    whitening_II = (directions_II * scale_I) @ directions_II.T
    return mean_I.float(), whitening_II.float()


def prompt_keys(means_BI: Tensor, mean_I: Tensor, whitening_II: Tensor) -> Tensor:
    """Returns the keys z (B, I) of prompts, unit vectors, for their mean embeddings (B, I)."""
    return F.normalize(whitened(means_BI, mean_I, whitening_II), dim=-1)


def whitened(means_BI: Tensor, mean_I: Tensor, whitening_II: Tensor) -> Tensor:
    """Returns W (m − μ) (B, I) for mean embeddings m (B, I): keys before they are normalised."""
    with without_autocast(means_BI):
        return (means_BI.float() - mean_I) @ whitening_II


def key_scores(centroids_CI: Tensor, mean_I: Tensor, whitening_II: Tensor) -> tuple[Tensor, Tensor]:
    """Returns D (C, I) and o (C): the centroid with the largest D m + o has the largest cosine.

    m is a prompt's mean embedding. D m + o = ⟨W (m − μ), centroid⟩, so finding it needs no W.
    """
    directions_CI = centroids_CI @ whitening_II
    return directions_CI, -directions_CI @ mean_I


def scores_of(means_BI: Tensor, directions_CI: Tensor, offsets_C: Tensor) -> Tensor:
    """Returns the scores D m + o (B, C) of mean embeddings m (B, I), on their device."""
    device = means_BI.device
    with without_autocast(means_BI):
        return torch.addmm(
            offsets_C.float().to(device), means_BI, directions_CI.float().to(device).T
        )


# --- the agreement of clusters ---
def cluster_cosines(gram_2C2C: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the corrected cosines (C, C) of clusters' gradients, and the reliabilities (C).

    Args:
        gram_2C2C: inner products of the halves' gradients, indexed by half, cluster, half, cluster.

    Returns:
        The cosines are 0 for a gradient of zero and may exceed 1. A reliability is cos(a_c, b_c),
        the cosine of a cluster's halves; 0 for a gradient of zero.
    """
    # Subtracting the mean over clusters from both sides of all inner products.
    gram_2C2C = gram_2C2C.double()
    gram_2C2C = gram_2C2C - gram_2C2C.mean(dim=1, keepdim=True)
    gram_2C2C = gram_2C2C - gram_2C2C.mean(dim=3, keepdim=True)

    between_CC = gram_2C2C[0, :, 1]
    agreement_C = between_CC.diagonal()
    norms_2C = gram_2C2C.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).clamp_min(0).sqrt()
    norms_C = norms_2C[0] * norms_2C[1]
    squared_C = torch.maximum(agreement_C, _LEAST_RELIABILITY * norms_C)
    products_CC = (squared_C[:, None] * squared_C).sqrt()

    cosines_CC = _ratio((between_CC + between_CC.T) / 2, products_CC)
    return cosines_CC, _ratio(agreement_C, norms_C)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Returns a quotient, 0 where the denominator is."""
    is_zero = denominator <= 0
    return torch.where(is_zero, 0.0, numerator / torch.where(is_zero, 1.0, denominator))


def target_overlap(cosines_CC: Tensor) -> Tensor:
    """Returns the overlaps (C, C) that codes should have, for the cosines of their clusters.

    Negative cosines count as 0, because codes have no negative gates. Overlaps are shrunk to their
    mean over pairs. The diagonal is 1.
    """
    clipped_CC = cosines_CC.clamp(0.0, 1.0)
    mean = mean_overlap(clipped_CC)
    target_CC = (1 - _SHRINKAGE) * clipped_CC + _SHRINKAGE * mean
    return target_CC.fill_diagonal_(1.0)


def mean_overlap(overlap_CC: Tensor) -> Tensor:
    """Returns the mean of a matrix over pairs of different clusters; 0 if there is no pair."""
    clusters = len(overlap_CC)
    pairs = clusters * (clusters - 1)
    if pairs == 0:
        return overlap_CC.new_zeros(())
    return (overlap_CC.sum() - overlap_CC.diagonal().sum()) / pairs


def code_overlap(codes_CK: Tensor) -> Tensor:
    """Returns the cosines (…, C, C) of codes."""
    unit_CK = F.normalize(codes_CK, dim=-1)
    return unit_CK @ unit_CK.mT


# --- codes and groups ---
def matched_codes(target_CC: Tensor, start_LCK: Tensor) -> Tensor:
    """Returns codes (L, C, K) with sum 1 whose overlaps are close to a target.

    It minimises, for each layer, Σ over pairs of (overlap − target)² plus 0.02 Σ_k (load_k − 1)²,
    where load_k is K times the mean gate of expert k over clusters.

    Args:
        target_CC: the overlaps of :func:`target_overlap`.
        start_LCK: logits of the gates, random numbers. Layers with different starts have different
            codes, so that two clusters do not share the same experts everywhere.
    """
    clusters, num_experts = start_LCK.shape[-2:]
    is_pair_CC = ~torch.eye(clusters, dtype=torch.bool, device=start_LCK.device)
    target_CC = target_CC.to(start_LCK)
    with torch.enable_grad():
        logits_LCK = start_LCK.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits_LCK], lr=_STEP_SIZE)
        for _ in range(_STEPS):
            codes_LCK = logits_LCK.softmax(dim=-1)
            errors_LCC = (code_overlap(codes_LCK) - target_CC) * is_pair_CC
            load_LK = codes_LCK.mean(dim=-2) * num_experts
            loss = errors_LCC.square().sum() + _WEIGHT_OF_LOAD * (load_LK - 1).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits_LCK.detach().softmax(dim=-1)


def labels_by_use(codes_CK: Tensor, energy_CN: Tensor) -> Tensor:
    """Returns the expert of each component (N), balanced, so that experts serve their users.

    The labels maximise Σ_i E_i,expert(i), E_ik = Σ_c g_ck ‖b_ci‖² / Σ_c ‖b_ci‖². A component whose
    gradient is zero fits every expert equally.

    Args:
        codes_CK: the gates of the clusters.
        energy_CN: the squared norms ‖b_ci‖² of the gradient of component i in cluster c.
    """
    energy_CN = energy_CN.double()
    use_NK = _ratio(energy_CN.T @ codes_CK.double(), energy_CN.sum(dim=0)[:, None])
    return torch.from_numpy(balanced_assignment(use_NK.cpu().numpy()))


def centred_gram(products_NN: Tensor, sums_NN: Tensor, clusters: int) -> Tensor:
    """Returns the cosines (N, N) of the components' centred gradients, concatenated over clusters.

    The gradient of component i for cluster c is centred by subtracting its mean over clusters. A
    component without a centred gradient has a row and a column of zeros.

    Args:
        products_NN: Σ_c ⟨g_ci, g_cj⟩.
        sums_NN: ⟨Σ_c g_ci, Σ_c g_cj⟩.
        clusters: the number of clusters, C.
    """
    products_NN = products_NN.double()
    centred_NN = products_NN - sums_NN.double() / clusters
    squared_N = centred_NN.diagonal()
    # Equal gradients in all clusters leave only rounding errors.
    is_usable_N = squared_N > 1e-6 * products_NN.diagonal()
    norm_N = torch.where(is_usable_N, squared_N, torch.inf).sqrt()
    return (centred_NN / (norm_N[:, None] * norm_N)).clamp(-1.0, 1.0)


def grouped_codes(energy_CN: Tensor, labels_N: Tensor, overlap: float) -> Tensor:
    """Returns codes (C, K) with sum 1 for given groups: softmax(e_ck / T).

    e_ck is the share of the gradient energy of cluster c in the components of expert k, relative to
    the mean of this share over clusters. T is such that the mean overlap of two codes is
    ``overlap``, or as close to it as codes of this form can be.

    Args:
        energy_CN: the squared norms of the gradient of each component in each cluster.
        labels_N: the expert of each component.
        overlap: the mean of :func:`target_overlap` over pairs.
    """
    energy_CN = energy_CN.double()
    num_experts = int(labels_N.max()) + 1
    one_hot_NK = F.one_hot(labels_N.long(), num_experts).to(energy_CN)
    share_CK = _ratio(energy_CN @ one_hot_NK, energy_CN.sum(dim=1, keepdim=True))
    relative_CK = _ratio(share_CK, share_CK.mean(dim=0))

    # The overlap grows with T: from that of the clusters' largest experts to 1.
    low, high = 1e-4, 1e4
    for _ in range(60):
        temperature = (low * high) ** 0.5
        codes_CK = (relative_CK / temperature).softmax(dim=1)
        if mean_overlap(code_overlap(codes_CK)) < overlap:
            low = temperature
        else:
            high = temperature
    return (relative_CK / high).softmax(dim=1).float()


def with_norm_of(codes_CK: Tensor, random_CK: Tensor) -> Tensor:
    """Returns codes with the mean norm of random ones.

    A code of smaller norm would be a lower learning rate for its cluster. Gates of any sum leave
    the model unchanged at step 0 only if they scale the change of the factors.
    """
    norm = random_CK.norm(dim=-1).mean()
    return F.normalize(codes_CK, dim=-1) * norm


def permuted(codes_CK: Tensor) -> Tensor:
    """Returns the codes of other clusters, in an order drawn from torch's random state.

    This placebo keeps the codes, their norms, overlaps and balance. It changes which clusters share
    experts.
    """
    return codes_CK[torch.randperm(len(codes_CK), device="cpu").to(codes_CK.device)]
