"""One layer's attention on a CPU: plain products against PyTorch's fused attention, by length.

    python benchmarks/speed/attention.py

The result determines ``badit.training.attention.LONGEST``. Shapes are SmolLM2-135M's: 4 rows, 9
heads of 64, groups of 3 with a shared key.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, keep, options, ratio
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from badit.training import attention as plain

LENGTHS = (64, 128, 256, 384, 512, 768)
ROWS, HEADS, SHARED, WIDTH = 4, 9, 3, 64


class _Module(nn.Module):
    is_causal = True
    num_key_value_groups = HEADS // SHARED


def way(function: Callable[..., Any], length: int) -> Callable[[], object]:
    query = torch.randn(ROWS, HEADS, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(ROWS, SHARED, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(ROWS, 1, -1, -1).clone()
    allowed[0, :, :, -length // 10 :] = False  # a padded row
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(
        ~allowed, torch.finfo(torch.bfloat16).min
    )
    module = _Module()

    def call() -> None:
        function(module, query, key, value, mask)[0].sum().backward()

    return call


def main(arguments: argparse.Namespace) -> None:
    plain.LONGEST = max(LENGTHS)
    result = {}
    for length in LENGTHS:
        samples = in_turns(
            {"fused": way(sdpa_attention_forward, length), "plain": way(plain.attention, length)},
            rounds=arguments.rounds,
        )
        result[str(length)] = {
            "seconds": samples,
            "fused / plain": ratio(samples, "fused", "plain"),
        }
    keep("attention", {"by length": result})


if __name__ == "__main__":
    main(options(__doc__, rounds=15).parse_args())
