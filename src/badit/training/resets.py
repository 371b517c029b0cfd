"""Resets components to step 0, with the optimizer's first moments, also in FSDP2's shards."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from badit.method.late_grouping import change_norms
from badit.support.errors import BaditError
from badit.tuner.badit_layer import BaditLinear


def refuse_other_optimizer(optimizer: Any) -> None:
    """Raises BaditError if the moments of a component are not rows and columns as in Adam."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        kind = "none" if inner is None else type(inner).__name__
        raise BaditError(
            "regroup.reset_smallest: needs optimizer=, a torch.optim.Adam or AdamW, whose moments "
            f"it resets; got {kind}"
        )


@torch.no_grad()
def changes(layer: BaditLinear, adapter: str) -> np.ndarray:
    """Returns the norms (N) of the components' changes since step 0; all ranks must call it."""
    a_NI, b_ON = layer.factors(adapter)
    norm_N = change_norms(_whole(a_NI), _whole(b_ON), *layer.kept_factors(adapter))
    return norm_N.cpu().numpy()


@torch.no_grad()
def reset_components(layer: BaditLinear, adapter: str, is_reset_N: Tensor, optimizer: Any) -> None:
    """Sets components to their initial factors and their first moments to zero.

    The second moments stay. Adam's count of steps goes on, so that with second moments of zero the
    next steps would be several times larger than those of the other components.
    """
    is_reset_N = is_reset_N.to(layer.device)
    masks = (is_reset_N[:, None], is_reset_N)  # rows of A, columns of B
    for factor, initial, mask in zip(
        layer.factors(adapter), layer.kept_factors(adapter), masks, strict=True
    ):
        _replace(factor, mask, initial)
        first_moment = optimizer.state.get(factor, {}).get("exp_avg")
        if first_moment is not None:  # None before the first step
            _replace(first_moment, mask, torch.zeros_like(initial))


def _whole(factor: Tensor) -> Tensor:
    return factor.full_tensor() if isinstance(factor, DTensor) else factor


def _replace(tensor: Tensor, mask: Tensor, values: Tensor) -> None:
    """Replaces elements where the mask is true."""
    values = values.to(tensor.dtype)
    if isinstance(tensor, DTensor):
        # DTensor operations do not mix with plain tensors.
        everywhere = [Replicate()] * tensor.device_mesh.ndim
        mask = DTensor.from_local(mask, tensor.device_mesh, everywhere, run_check=False)
        values = DTensor.from_local(values, tensor.device_mesh, everywhere, run_check=False)
    tensor.copy_(torch.where(mask, values, tensor))
