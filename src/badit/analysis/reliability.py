"""Reliability of measured gradients: how much of a mean over instances is signal, not noise.

A task's gradient is a mean over n instances. If s is the share of E‖mean‖² that the gradient
without noise has, the means over two halves of the instances have an expected cosine of about
s / (2 − s). The Spearman–Brown formula inverts this, and predicts s for other numbers of instances.
"""

import torch
from torch import Tensor

#: The cosine of two tasks is interpreted only if both gradients are at least this reliable.
RELIABLE = 0.7


def spearman_brown(reliability: Tensor, factor: float | Tensor) -> Tensor:
    """Returns the reliability r' = f r / (1 + (f − 1) r) of a mean over f times as many instances.

    It is 0 if ``reliability`` is not positive, and NaN if it is NaN.
    """
    positive = reliability.clamp_min(0.0)
    # A reliability of 1 may be exceeded by rounding.
    return (factor * positive / (1 + (factor - 1) * positive)).clamp_max(1.0)


def instances_needed(reliability: Tensor, instances: Tensor, target: float = RELIABLE) -> Tensor:
    """Returns the smallest number of instances with a predicted reliability of ``target``.

    ``reliability`` is that of a mean over ``instances``. NaN if it is not positive.
    """
    known = torch.where(reliability > 0, reliability, torch.nan)
    # Two gradients that agree exactly need the fewest instances that can be halved.
    exact = target * (1 - known) / (known * (1 - target)) * instances
    # Rounding must not add an instance where the number is exact.
    return (exact - 1e-9 * exact.abs()).ceil().clamp_min(2.0)
