"""What the processes of one training agree on. With a single process every call here is free."""

from __future__ import annotations

import torch


def several() -> bool:
    """Whether more than one process trains."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the only process, or the first of those that train."""
    return not several() or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    if several():
        torch.distributed.barrier()


def any_of_all(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    if not several():
        return flag
    count = torch.tensor(int(flag), device=communicating_device())
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return bool(count)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of every process, (ranks, …)."""
    if not several():
        return tensor[None]
    tensor = tensor.to(communicating_device()).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return torch.stack(parts)


def own_part(parts: torch.Tensor) -> torch.Tensor:
    """This process's row of what :func:`gathered` gave; an even share of the sum where there were more or fewer."""
    ranks = torch.distributed.get_world_size() if several() else 1
    if len(parts) != ranks:
        return parts.sum(dim=0) / ranks
    return parts[torch.distributed.get_rank() if several() else 0]


def communicating_device() -> torch.device:
    """Where a tensor must be for the processes to exchange it."""
    backend = torch.distributed.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
