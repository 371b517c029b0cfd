"""The gradients of a step, and changes to weights, wherever an engine for several processes keeps them.

* One process, and DDP: ``.grad`` is the whole, reduced gradient.
* FSDP2: every process holds a shard, a DTensor. The Grams of the shards add up to that of the whole, so N² numbers are
  exchanged and no gradient is put together.
* DeepSpeed's ZeRO: the engine keeps gradients to itself and takes its step inside the backward pass, so they are read
  just before that step, through its own ``safe_get_full_grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from badit.method import cosine_gram


def component_gram(a_NI: nn.Parameter, b_ON: nn.Parameter) -> torch.Tensor | None:
    """The cosine Gram (N, N) of the components' reduced gradients, the same on every process.

    None where a factor has no gradient. Every process must ask for it, and for all layers in the same order.
    """
    grad_A, grad_B = _reduced_gradient(a_NI), _reduced_gradient(b_ON)
    if grad_A is None or grad_B is None:
        return None
    if isinstance(grad_A, DTensor) and isinstance(grad_B, DTensor):
        return _gram_of_shards(grad_A, grad_B)
    return cosine_gram(grad_A, grad_B)


def local_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """This process's part of ``.grad``."""
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


@torch.no_grad()
def scale_columns(b_ON: nn.Parameter, scale_N: torch.Tensor) -> None:
    """Multiplies every column of a weight by a number, in place; every process must give the same numbers."""
    if isinstance(b_ON, DTensor):
        whole = [Replicate()] * b_ON.device_mesh.ndim
        b_ON.mul_(DTensor.from_local(scale_N.to(b_ON), b_ON.device_mesh, whole, run_check=False))
    elif _kept_by_deepspeed(b_ON):
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        master_ON = safe_get_full_fp32_param(b_ON)
        safe_set_full_fp32_param(b_ON, master_ON * scale_N.to(master_ON))
    else:
        b_ON.mul_(scale_N.to(b_ON))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """What training changes, and the buffers, whole and on the CPU, of a model that is kept in shards; else None.

    Every process must ask for it.
    """
    if not any(_in_shards(parameter) for parameter in model.parameters()):
        return None
    trained = {name: _whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = {**trained, **dict(model.named_buffers())}
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def _in_shards(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def before_step(optimizer: Any, read: Callable[[], None]) -> bool:
    """Has ``read`` called before every optimizer step, where the step comes before the Trainer's own event for that.

    Returns:
        Whether that is so. If not, nothing has been done, and ``on_pre_optimizer_step`` is the place to read.
    """
    engine = getattr(optimizer, "optimizer", None)
    if not steps_in_backward(optimizer) or engine is None:
        return False
    step = engine.step

    def reading_step(*args: Any, **kwargs: Any) -> Any:
        read()
        return step(*args, **kwargs)

    engine.step = reading_step
    return True


def steps_in_backward(optimizer: Any) -> bool:
    """Whether it is accelerate's stand-in for DeepSpeed's optimizer, whose own ``step`` does nothing."""
    return any(kind.__name__ == "DeepSpeedOptimizerWrapper" for kind in type(optimizer).__mro__)


def _reduced_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    if not _kept_by_deepspeed(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def _kept_by_deepspeed(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _gram_of_shards(grad_A: DTensor, grad_B: DTensor) -> torch.Tensor:
    """From shards along any dimension. A's, which come as rows, are exchanged for columns: a W-th of it a process."""
    mesh = grad_A.device_mesh

    def along(gradient: DTensor, dim: int) -> torch.Tensor:
        placements = [Shard(dim) if placement.is_shard() else Replicate() for placement in gradient.placements]
        return gradient.redistribute(placements=placements).to_local()

    groups = [mesh.get_group(i) for i, placement in enumerate(grad_A.placements) if placement.is_shard()]

    def over_shards(tensor: torch.Tensor, operation: Literal["max", "sum"]) -> torch.Tensor:
        reduce = torch.distributed.ReduceOp.MAX if operation == "max" else torch.distributed.ReduceOp.SUM
        for group in groups:
            torch.distributed.all_reduce(tensor, op=reduce, group=group)
        return tensor

    return cosine_gram(along(grad_A, 1), along(grad_B, 0), over_shards)
