"""Late grouping: only components that have hardly changed since step 0 may join another expert.

Where gates scale the change of a component, c_i = b_i a_i − b⁰_i a⁰_i, a new expert changes the
model by (g_new − g_old) c_i. This is small for the components with the smallest ‖c_i‖, and zero
once their factors are reset to a⁰_i and b⁰_i. Not in the paper.

Shape suffixes: N = components, I/O = in/out features, F = components that may move.
"""

import numpy as np
from torch import Tensor

from badit.method.grouping import MIN_RELATIVE_GAIN, grouping_objective


def change_norms(a_NI: Tensor, b_ON: Tensor, initial_a_NI: Tensor, initial_b_ON: Tensor) -> Tensor:
    """Returns ‖b_i a_i − b⁰_i a⁰_i‖ (N), the Frobenius norm of each component's change."""
    a_NI = a_NI.double()
    b0_ON = initial_b_ON.double()
    change_a_NI = a_NI - initial_a_NI
    change_b_ON = b_ON - b0_ON
    # δb a + b⁰ δa instead of a difference of products, which would lose the digits of a change
    # that is small.
    squares_N = (
        change_b_ON.square().sum(dim=0) * a_NI.square().sum(dim=1)
        + 2 * (change_b_ON * b0_ON).sum(dim=0) * (change_a_NI * a_NI).sum(dim=1)
        + b0_ON.square().sum(dim=0) * change_a_NI.square().sum(dim=1)
    )
    return squares_N.clamp_min(0).sqrt()


def regroup_smallest(
    gram_NN: np.ndarray, current_N: np.ndarray, norm_N: np.ndarray, share: float
) -> np.ndarray:
    """Returns labels in which only the components with the smallest changes may have moved.

    These components exchange experts, the best pair first, until no exchange improves the
    objective of :func:`grouping_objective`. With fewer than two of them nothing moves.

    Args:
        gram_NN: symmetric cosine Gram matrix, or a mean of several.
        current_N: the current labels.
        norm_N: the norms of the components' changes. Of equal norms, the first components count as
            smaller.
        share: the share of components that may move, rounded to their number.
    """
    gram_NN = (gram_NN + gram_NN.T) / 2
    labels_N = current_N.copy()
    free_F = np.argsort(norm_N, kind="stable")[: round(share * len(norm_N))]
    if len(free_F) < 2:
        return labels_N
    least_gain = MIN_RELATIVE_GAIN * max(1.0, abs(grouping_objective(gram_NN, current_N)))
    while True:
        gain_FF = _gains(gram_NN, labels_N, free_F)
        i, j = np.unravel_index(gain_FF.argmax(), gain_FF.shape)
        if gain_FF[i, j] <= least_gain:
            return labels_N
        pair = free_F[[i, j]]
        labels_N[pair] = labels_N[pair[::-1]]


def _gains(gram_NN: np.ndarray, labels_N: np.ndarray, free_F: np.ndarray) -> np.ndarray:
    """Returns how much an exchange of each two of the components increases the objective."""
    sums_NK = gram_NN @ np.eye(int(labels_N.max()) + 1)[labels_N]
    # Entry (i, j): the sum of the cosines of component i with the expert of component j.
    sums_FF = sums_NK[free_F][:, labels_N[free_F]]
    move_FF = sums_FF - sums_FF.diagonal()[:, None] + gram_NN.diagonal()[free_F][:, None]
    gain_FF = 2 * (move_FF + move_FF.T - 2 * gram_NN[np.ix_(free_F, free_F)])
    is_same_FF = labels_N[free_F][:, None] == labels_N[free_F]
    return np.where(is_same_FF, 0.0, gain_FF)
