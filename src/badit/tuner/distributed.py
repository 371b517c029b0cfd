"""Access to gradients and weights in one process and under DDP, FSDP2 and DeepSpeed.

* One process and DDP: ``.grad`` is the whole, reduced gradient.
* FSDP2: every process holds a shard, a DTensor. The Gram matrices of the shards add up to that of the whole gradient.
* DeepSpeed's ZeRO: the engine holds the gradients and takes its step inside the backward pass. They are read just
  before that step with DeepSpeed's ``safe_get_full_grad``.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from badit.method.grouping import OverShards, cosine_gram

# At most this number of elements is stacked for one batched operation: 32 MB in float32. A step of orthogonal updates
# temporarily needs about ten times that memory.
_NUMBERS_AT_A_TIME = 2**23


def component_grams(
    factors: Sequence[tuple[nn.Parameter, nn.Parameter]],
) -> list[torch.Tensor | None]:
    """Returns the cosine Gram matrix (N, N) of each layer's reduced component gradients, the same on every process.

    ``factors`` are A (N, I) and B (O, N) of each layer; all processes must pass the same layers in the same order.
    Layers of equal shape are batched, so that a whole model needs few operations and collectives. A layer in which a
    factor has no gradient gets None.
    """

    def reduced(parameter: nn.Parameter) -> torch.Tensor | None:
        return (
            _deepspeed().safe_get_full_grad(parameter)
            if _kept_by_deepspeed(parameter)
            else parameter.grad
        )

    gradients = [(reduced(a_NI), reduced(b_ON)) for a_NI, b_ON in factors]
    grams: list[torch.Tensor | None] = [None] * len(factors)
    for indices in by_shape(gradients):
        grads_A, grads_B = zip(*(gradients[index] for index in indices), strict=True)
        # Row shards of A become column shards; each process communicates 1/W of A.
        stacked_NN = cosine_gram(stacked(grads_A, 1), stacked(grads_B, 0), over_shards(grads_A[0]))
        for index, gram_NN in zip(indices, stacked_NN.unbind(), strict=True):
            grams[index] = gram_NN
    return grams


def by_shape(
    pairs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
) -> Iterator[list[int]]:
    """Yields the indices of complete pairs of equal shape, dtype, device and placement, in chunks of limited size."""
    kinds: dict[Any, list[int]] = {}
    for index, (a, b) in enumerate(pairs):
        if a is not None and b is not None:
            kind = (a.shape, b.shape, a.dtype, b.dtype, a.device, getattr(a, "placements", None))
            kinds.setdefault(kind, []).append(index)
    for kind, indices in kinds.items():
        together = max(1, _NUMBERS_AT_A_TIME // (kind[0].numel() + kind[1].numel()))
        for start in range(0, len(indices), together):
            yield indices[start : start + together]


def stacked(tensors: Sequence[torch.Tensor], features: int) -> torch.Tensor:
    """Stacks tensors of one shape to (L, …); of DTensors, returns only this process's shard along ``features``."""
    whole = torch.stack(list(tensors))
    if not isinstance(whole, DTensor):
        return whole
    return whole.redistribute(placements=placements_along(features + 1, whole)).to_local()


def placements_along(features: int, like: DTensor) -> list[Shard | Replicate]:
    """Returns placements that shard the dimension ``features`` on every mesh dimension on which ``like`` is sharded."""
    return [Shard(features) if place.is_shard() else Replicate() for place in like.placements]


def dtensor(
    local: torch.Tensor, like: DTensor, placements: Sequence[Any], shape: Sequence[int]
) -> DTensor:
    """Returns a DTensor of global shape ``shape``, which need not shard evenly, from this process's ``local`` part."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        local.contiguous(),
        like.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def over_shards(like: torch.Tensor) -> OverShards:
    """Returns a function that all-reduces a tensor in place over the processes with shards of ``like``, if any."""
    groups = []
    if isinstance(like, DTensor):
        groups = [
            like.device_mesh.get_group(i)
            for i, place in enumerate(like.placements)
            if place.is_shard()
        ]

    def combine(tensor: torch.Tensor, operation: Literal["max", "sum"]) -> torch.Tensor:
        for group in groups:
            torch.distributed.all_reduce(
                tensor, op=getattr(torch.distributed.ReduceOp, operation.upper()), group=group
            )
        return tensor

    return combine


@torch.no_grad()
def scale_columns(b_ON: nn.Parameter, scale_N: torch.Tensor) -> None:
    """Multiplies every column of a weight by a number in place. All processes must pass the same numbers."""
    if isinstance(b_ON, DTensor):
        whole = [Replicate()] * b_ON.device_mesh.ndim
        b_ON.mul_(DTensor.from_local(scale_N.to(b_ON), b_ON.device_mesh, whole, run_check=False))
    elif _kept_by_deepspeed(b_ON):
        deepspeed = _deepspeed()
        master_ON = deepspeed.safe_get_full_fp32_param(b_ON)
        scaled_ON = master_ON * scale_N.to(master_ON)
        deepspeed.safe_set_full_fp32_param(b_ON, scaled_ON)
        # The next step starts from this weight. Until then, the forward pass uses a copy, which stage 3 shards.
        with import_module("deepspeed.runtime.zero").GatheredParameters([b_ON], modifier_rank=0):
            b_ON.copy_(scaled_ON)
        if getattr(b_ON, "ds_persist", False):  # small weights stay gathered between steps
            b_ON.all_gather([b_ON])  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    else:
        b_ON.mul_(scale_N.to(b_ON))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Returns a sharded model's trained parameters and buffers on the CPU, else None; all processes must call it."""
    if not (
        is_divided_by_zero3(model)
        or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    ):
        return None
    named = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_shard = isinstance(parameter, DTensor)
            named[name] = (
                parameter.full_tensor()
                if is_shard
                else _deepspeed().safe_get_full_fp32_param(parameter)
            )
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def parameter_count(parameter: nn.Parameter) -> int:
    """Returns the number of elements of a parameter over all its shards (a DTensor's ``numel`` counts all shards)."""
    return getattr(parameter, "ds_numel", parameter.numel())


def before_step(optimizer: Any, read: Callable[[], None]) -> bool:
    """Makes an optimizer that steps in the backward pass call ``read`` before every step; returns whether it does."""
    if not isinstance(
        optimizer, DeepSpeedOptimizerWrapper
    ):  # accelerate's, whose own ``step`` does nothing
        return False
    engine = optimizer.optimizer
    step = engine.step

    def reading_step(*args: Any, **kwargs: Any) -> Any:
        read()
        return step(*args, **kwargs)

    engine.step = reading_step
    return True


def _deepspeed() -> Any:
    return import_module("deepspeed.utils")


def is_divided_by_zero3(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _kept_by_deepspeed(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def rank_and_size() -> tuple[int, int]:
    """Returns the rank of this process and the world size."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def any_of_all(flag: bool) -> bool:
    """Returns whether the flag is true on any rank."""
    return flag if rank_and_size()[1] == 1 else bool(gathered(torch.tensor(flag)).any())


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensors of all ranks, stacked to (ranks, …)."""
    _, processes = rank_and_size()
    if processes == 1:
        return tensor[None]
    on_cpu = any(
        name in torch.distributed.get_backend() for name in ("gloo", "mpi")
    )  # others need device tensors
    tensor = tensor.to(
        "cpu" if on_cpu else torch.accelerator.current_accelerator() or "cpu"
    ).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(processes)]
    torch.distributed.all_gather(parts, tensor)
    return torch.stack(parts)
