"""Threads that stand for processes, each with a shard of the same tensors."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch


def in_processes(count: int, function: Callable[[int, Callable[[torch.Tensor, str], torch.Tensor]], Any]) -> list[Any]:
    """What ``function(rank, over_shards)`` returns on each rank; ``over_shards`` waits for the others' tensors."""
    tensors: list[Any] = [None] * count
    barrier = threading.Barrier(count, timeout=30)

    def over_shards(rank: int, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        tensors[rank] = tensor
        barrier.wait()
        stacked = torch.stack(tensors)
        barrier.wait()
        return stacked.amax(dim=0) if operation == "max" else stacked.sum(dim=0)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: function(rank, partial(over_shards, rank)), range(count)))
