"""Threads that simulate processes, each with a shard of the same tensors."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch


def in_processes(count, function):
    """Returns ``function(rank, over_shards)`` of every rank.

    ``over_shards`` reduces a tensor over all ranks.
    """
    tensors = [None] * count
    barrier = threading.Barrier(count, timeout=30)

    def over_shards(rank, tensor, operation):
        tensors[rank] = tensor
        barrier.wait()
        stacked = torch.stack(tensors)
        barrier.wait()
        return stacked.amax(dim=0) if operation == "max" else stacked.sum(dim=0)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: function(rank, partial(over_shards, rank)), range(count)))
