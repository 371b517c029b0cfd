"""A training that gives the same bits every time, on devices where it otherwise would not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Within, torch takes deterministic algorithms alone, and raises a RuntimeError for an operation that has none.

    cuBLAS is deterministic only with a fixed workspace, which it reads from the environment when it starts: so the
    variable stays set.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
