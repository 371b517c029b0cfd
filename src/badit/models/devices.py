"""The device of a process, and the dtype in which it computes fast."""

from __future__ import annotations

import os
import timeit
from functools import cache
from typing import TYPE_CHECKING, Literal

from badit.support.console import say

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Relative to float32, 16-bit products take 0.5 times as long with native instructions, and
# 3 to 40 times without. On some virtual machines they take twice as long with them.
_SLOW = 1.5


def device() -> torch.device:
    """Returns this process's accelerator, by local rank.

    Returns the CPU if there is none or ACCELERATE_USE_CPU is set.
    """
    import torch

    # Without the check, this is the accelerator that torch was built for, present or not.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return torch.device("cpu")
    # A launcher starts one process per accelerator of a machine and numbers them.
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def fast_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """Returns bfloat16, or float32 on a CPU that computes slowly in bfloat16."""
    return "float32" if device.type == "cpu" and slowdown("bfloat16") > _SLOW else "bfloat16"


@cache
def slowdown(dtype: str) -> float:
    """Returns the time of this CPU's matrix product in a dtype, relative to float32.

    The dtype is "bfloat16" or "float16".
    """
    return _seconds_of_product(dtype) / _seconds_of_product("float32")


def _seconds_of_product(dtype: str) -> float:
    import torch

    x, weight = (torch.ones(size, 512, dtype=getattr(torch, dtype)) for size in (64, 512))
    # The best of ten rounds, so that other busy processes do not distort the result.
    return min(timeit.repeat(lambda: torch.nn.functional.linear(x, weight), number=1, repeat=10))


@cache
def warn_of_slow_dtype(dtype: str, device: torch.device) -> None:
    """Warns on stderr, once per process and dtype, if this CPU computes slowly in the dtype."""
    if device.type != "cpu" or dtype not in ("bfloat16", "float16"):
        return
    ratio = slowdown(dtype)
    if ratio > _SLOW:
        say(
            f"badit: in {dtype} this processor takes {ratio:.1f} times as long as in float32; "
            "set model.dtype=float32"
        )
