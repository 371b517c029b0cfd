"""Computes bfloat16 matrix products on the CPU in float32 and rounds the results to bfloat16.

Processors with bfloat16 instructions do the same. On others, PyTorch's own products take about four
times as long. Python imports this file at its start if its folder is in PYTHONPATH::

    PYTHONPATH=benchmarks/bfloat16 badit compare recipes/evidence-cpu.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def _in_float32(name: str) -> Callable[..., Any]:
    """Returns a replacement of aten::``name``, whose last two tensors are the factors."""
    import torch

    operator = getattr(torch, name)

    def product(*tensors: torch.Tensor, **scalars: float) -> torch.Tensor:
        if tensors[0].dtype == torch.bfloat16:
            return operator(*(tensor.float() for tensor in tensors), **scalars).bfloat16()
        shape = (*tensors[-2].shape[:-1], tensors[-1].shape[-1])
        return operator(
            *tensors, **scalars, out=tensors[0].new_empty(shape)
        )  # the operators with out= are unchanged

    return product


# Also in the processes that a comparison starts, but not in pip and other programs, which do not
# need torch.
if any("badit" in argument for argument in sys.orig_argv):
    import torch

    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm", "addmm", "baddbmm"):
        library.impl(name, _in_float32(name), "CPU")
