"""Access to gradients and weights in one process and under DDP, FSDP2 and DeepSpeed.

* One process and DDP: ``.grad`` is the whole, reduced gradient.
* FSDP2: every process holds a shard, a DTensor. The Gram matrices of the shards add up to that of
  the whole gradient.
* DeepSpeed's ZeRO: the engine holds the gradients and takes its step inside the backward pass. They
  are read just before that step with DeepSpeed's ``safe_get_full_grad``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, Literal

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from badit.method.grouping import OverShards, cosine_gram

# At most this number of elements is stacked for one batched operation: 32 MB in float32. A step of
# orthogonal updates temporarily needs about ten times that memory.
_NUMBERS_AT_A_TIME = 2**23


def component_grams(factors: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> list[Tensor | None]:
    """Returns the cosine Gram matrix (N, N) of each layer's reduced component gradients.

    It is the same on every process. ``factors`` are A (N, I) and B (O, N) of each layer; all
    processes must pass the same layers in the same order. Layers of equal shape are batched, so
    that a whole model needs few operations and collectives. A layer in which a factor has no
    gradient gets None.
    """
    gradients = [(_reduced_gradient(a_NI), _reduced_gradient(b_ON)) for a_NI, b_ON in factors]
    grams: list[Tensor | None] = [None] * len(factors)
    for indices in by_shape(gradients):
        grads_A, grads_B = zip(*(gradients[index] for index in indices), strict=True)
        # Row shards of A become column shards; each process communicates 1/W of A.
        grams_NN = cosine_gram(stacked(grads_A, 1), stacked(grads_B, 0), over_shards(grads_A[0]))
        for index, gram_NN in zip(indices, grams_NN.unbind(), strict=True):
            grams[index] = gram_NN
    return grams


def _reduced_gradient(parameter: nn.Parameter) -> Tensor | None:
    if _is_kept_by_deepspeed(parameter):
        return _deepspeed().safe_get_full_grad(parameter)
    return parameter.grad


def by_shape(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> Iterator[list[int]]:
    """Yields the indices of complete pairs that can be stacked, in chunks of limited size.

    They have equal shapes, dtypes, devices and placements.
    """
    # Keyed by all that must be equal for one torch.stack.
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, (a, b) in enumerate(pairs):
        if a is not None and b is not None:
            placements = getattr(a, "placements", None)
            alike[a.shape, b.shape, a.dtype, b.dtype, a.device, placements].append(index)
    for (shape_A, shape_B, *_), indices in alike.items():
        together = max(1, _NUMBERS_AT_A_TIME // (shape_A.numel() + shape_B.numel()))
        for start in range(0, len(indices), together):
            yield indices[start : start + together]


def stacked(tensors: Sequence[Tensor], features: int) -> Tensor:
    """Stacks tensors of one shape to (L, …).

    Of DTensors, it returns only this process's shard along the dimension ``features``.
    """
    stack = torch.stack(list(tensors))
    if not isinstance(stack, DTensor):
        return stack
    # The stack's first dimension is the layer.
    return stack.redistribute(placements=placements_along(features + 1, stack)).to_local()


def placements_along(features: int, like: DTensor) -> list[Shard | Replicate]:
    """Returns placements that shard ``features`` on every mesh dimension that shards ``like``."""
    return [Shard(features) if place.is_shard() else Replicate() for place in like.placements]


def dtensor(
    local: Tensor, like: DTensor, placements: Sequence[Any], shape: Sequence[int]
) -> DTensor:
    """Returns a DTensor from this process's ``local`` part.

    Its global ``shape`` need not shard evenly.
    """
    return DTensor.from_local(
        local.contiguous(),
        like.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        # Without shape and strides, from_local assumes that all shards are equal.
        stride=torch.empty(tuple(shape), device="meta").stride(),
    )


def over_shards(like: Tensor) -> OverShards:
    """Returns a function that all-reduces in place over the processes with shards of ``like``."""
    groups = []
    if isinstance(like, DTensor):
        # Not over replicating mesh dimensions (HSDP): their processes have the same values.
        groups = [
            like.device_mesh.get_group(i)
            for i, place in enumerate(like.placements)
            if place.is_shard()
        ]

    def combine(tensor: Tensor, operation: Literal["max", "sum"]) -> Tensor:
        for group in groups:
            reduction = getattr(torch.distributed.ReduceOp, operation.upper())
            torch.distributed.all_reduce(tensor, op=reduction, group=group)
        return tensor

    return combine


@torch.no_grad()
def scale_columns(b_ON: nn.Parameter, scale_N: Tensor) -> None:
    """Multiplies every column of a weight by a number in place.

    All processes must pass the same numbers.
    """
    if isinstance(b_ON, DTensor):
        replicated = [Replicate()] * b_ON.device_mesh.ndim
        # DTensor operations do not mix with plain tensors.
        scale = DTensor.from_local(scale_N.to(b_ON), b_ON.device_mesh, replicated, run_check=False)
        b_ON.mul_(scale)
    elif _is_kept_by_deepspeed(b_ON):
        _scale_columns_in_deepspeed(b_ON, scale_N)
    else:
        b_ON.mul_(scale_N.to(b_ON))


def _scale_columns_in_deepspeed(b_ON: Any, scale_N: Tensor) -> None:
    # The optimizer's float32 weight: b_ON itself may be a 16-bit copy or empty.
    master_ON = _deepspeed().safe_get_full_fp32_param(b_ON)
    scaled_ON = master_ON * scale_N.to(master_ON)
    _deepspeed().safe_set_full_fp32_param(b_ON, scaled_ON)
    # The next step starts from this weight. Until then, the forward pass uses a copy, which stage 3
    # shards.
    with import_module("deepspeed.runtime.zero").GatheredParameters([b_ON], modifier_rank=0):
        b_ON.copy_(scaled_ON)
    if getattr(b_ON, "ds_persist", False):  # small weights stay gathered between steps
        b_ON.all_gather([b_ON])


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """Returns a sharded model's trained parameters and buffers on the CPU.

    None if it is not sharded. All processes must call it.
    """
    is_dtensor = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    if not any(is_dtensor) and not is_divided_by_zero3(model):
        return None
    # FSDP and ZeRO shard parameters only.
    tensors = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            tensors[name] = parameter.full_tensor()
        else:
            tensors[name] = _deepspeed().safe_get_full_fp32_param(parameter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def parameter_count(parameter: nn.Parameter) -> int:
    """Returns the number of elements of a parameter over all its shards.

    A DTensor's ``numel`` counts all shards.
    """
    return getattr(parameter, "ds_numel", parameter.numel())


def before_step(optimizer: Any, read: Callable[[], None]) -> bool:
    """Makes an optimizer that steps in the backward pass call ``read`` before every step.

    Returns whether it is such an optimizer.
    """
    if not isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return False
    engine = optimizer.optimizer  # accelerate's wrapper has a ``step`` that does nothing
    step = engine.step

    def reading_step(*args: Any, **kwargs: Any) -> Any:
        read()
        return step(*args, **kwargs)

    engine.step = reading_step
    return True


def gathered_weight(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Returns a context in which a weight that ZeRO-3 has divided is whole; all ranks enter it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    return import_module("deepspeed.runtime.zero").GatheredParameters([parameter])


def is_divided_by_zero3(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _is_kept_by_deepspeed(parameter: nn.Parameter) -> bool:
    # Set by DeepSpeed: _hp_mapping in stages 1 and 2, ds_id in stage 3.
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _deepspeed() -> Any:
    # Imported when used, because DeepSpeed is optional.
    return import_module("deepspeed.utils")


def rank_and_size() -> tuple[int, int]:
    """Returns the rank of this process and the world size."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def any_of_all(flag: bool) -> bool:
    """Returns whether the flag is true on any rank."""
    if rank_and_size()[1] == 1:
        return flag
    return bool(gathered(torch.tensor(flag)).any())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Replaces a tensor by its sum over all ranks, and returns it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def objects_of_ranks(value: Any) -> list[Any]:
    """Returns the picklable values of all ranks, in their order; tensors should be on the CPU."""
    _, processes = rank_and_size()
    if processes == 1:
        return [value]
    of_ranks = [None] * processes
    torch.distributed.all_gather_object(of_ranks, value)
    return of_ranks


def gathered(tensor: Tensor) -> Tensor:
    """Returns the tensors of all ranks, stacked to (ranks, …)."""
    _, processes = rank_and_size()
    if processes == 1:
        return tensor[None]
    backend = torch.distributed.get_backend()
    device: Any = "cpu"
    if "gloo" not in backend and "mpi" not in backend:  # these alone take CPU tensors
        device = torch.accelerator.current_accelerator() or "cpu"
    tensor = tensor.to(device).contiguous()
    of_ranks = [torch.empty_like(tensor) for _ in range(processes)]
    torch.distributed.all_gather(of_ranks, tensor)
    return torch.stack(of_ranks)
