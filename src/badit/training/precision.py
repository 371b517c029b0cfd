"""Whether this machine computes in a 16-bit type at speed: processors without instructions for it do so in software."""

from __future__ import annotations

import sys
import time
from functools import cache
from typing import Literal

import torch

from badit.recipe import Dtype

SettledDtype = Literal["auto", "float32", "bfloat16", "float16"]

_ROWS, _WIDTH, _ROUNDS = 64, 512, 3
# bfloat16 takes from half of float32's time, with instructions for it, to forty times, without.
_SLOW = 3.0


@cache
def slowdown(dtype: str) -> float:
    """The time of this processor's matrix product in a dtype ("bfloat16", "float16"), over that in float32.

    The best of some rounds of a few milliseconds each, measured once a process.
    """
    seconds = {}
    for name in (dtype, "float32"):
        x, weight = (torch.ones(size, _WIDTH, dtype=getattr(torch, name)) for size in (_ROWS, _WIDTH))
        seconds[name] = min(_seconds_of_product(x, weight) for _ in range(_ROUNDS))
    return seconds[dtype] / seconds["float32"]


def settled_dtype(dtype: Dtype, device: torch.device) -> SettledDtype:
    """A recipe's dtype, with "fast" settled for this machine."""
    return fast_dtype(device) if dtype == "fast" else dtype


def fast_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """bfloat16, unless this is a processor that computes in it slowly: then float32."""
    return "float32" if device.type == "cpu" and slowdown("bfloat16") > _SLOW else "bfloat16"


@cache
def warn_of_slow_dtype(dtype: str, device: torch.device) -> None:
    """Says on stderr, once a process, if this processor computes in a model's dtype slowly, and what to set instead."""
    if device.type != "cpu" or dtype not in ("bfloat16", "float16"):
        return
    ratio = slowdown(dtype)
    if ratio > _SLOW:
        print(
            f"badit: this processor has no instructions for {dtype} and takes {ratio:.0f} times as long as in float32; "
            "model.dtype=float32 is faster here",
            file=sys.stderr,
        )


def _seconds_of_product(x: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - started
