"""The usual implementations of LoRA mixtures, as baselines for one product of all experts.

Both give the same output as :class:`badit.tuner.layer.ExpertLinear` (``tests/test_benchmarks.py``):

* in a loop: experts run one after another with their own A and B; their outputs are scaled by the
  gates and summed;
* per sequence: every sequence has its own copies of the input and the experts' factors, applied by
  batched products and
  summed with the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from badit.tuner import BaditLinear


def use_loops(model: nn.Module, *, per_sequence: bool) -> None:
    """Makes every BADIT layer of a model compute its experts in a loop or per sequence."""
    delta = _per_sequence if per_sequence else _in_a_loop
    for module in model.modules():
        if isinstance(module, BaditLinear):
            module.forward = partial(_forward, module, delta)


def _forward(
    layer: BaditLinear, delta: Callable[..., torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    y = layer.base_layer(x)
    for adapter in layer.running_adapters:
        y = y + delta(layer, adapter, x).to(y.dtype)
    return y


def _in_a_loop(layer: BaditLinear, adapter: str, x: torch.Tensor) -> torch.Tensor:
    config = layer.badit_config[adapter]
    a_NI, b_ON = layer.badit_A[adapter], layer.badit_B[adapter]
    x = x.to(a_NI.dtype)
    gates = layer.gates(adapter, x)
    a_KRI, b_KOR = _by_expert(layer, adapter, a_NI, b_ON)
    initial_A, initial_B = layer.kept_factors(adapter)
    out = -F.linear(F.linear(x, initial_A), initial_B)
    for expert in range(config.num_experts):
        out = out + gates[..., expert, None] * F.linear(F.linear(x, a_KRI[expert]), b_KOR[expert])
    return config.scaling * out


def _per_sequence(layer: BaditLinear, adapter: str, x: torch.Tensor) -> torch.Tensor:
    config = layer.badit_config[adapter]
    a_NI, b_ON = layer.badit_A[adapter], layer.badit_B[adapter]
    x = x.to(a_NI.dtype)
    gates_BK = layer.gates(adapter, x)[:, 0]
    a_KRI, b_KOR = _by_expert(layer, adapter, a_NI, b_ON)
    rows = len(x)
    # Every expert has its own copy of the input and of the hidden state: (B, K, T, ·).
    x_BKTI = x[:, None].expand(-1, config.num_experts, -1, -1).contiguous()
    a_BKIR = a_KRI.transpose(1, 2)[None].expand(rows, -1, -1, -1).contiguous()
    b_BKRO = b_KOR.transpose(1, 2)[None].expand(rows, -1, -1, -1).contiguous()
    hidden = torch.bmm(x_BKTI.flatten(0, 1), a_BKIR.flatten(0, 1))
    out_BKTO = torch.bmm(hidden, b_BKRO.flatten(0, 1)).unflatten(0, (rows, -1))
    mixed = torch.einsum("bk,bkto->bto", gates_BK.to(out_BKTO), out_BKTO)
    initial_A, initial_B = layer.kept_factors(adapter)
    return config.scaling * (mixed - F.linear(F.linear(x, initial_A), initial_B))


def _by_expert(
    layer: BaditLinear, adapter: str, a_NI: torch.Tensor, b_ON: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A as (K, r, I) and B as (K, O, r)."""
    order = layer.expert_of(adapter).argsort(stable=True)
    rank = layer.badit_config[adapter].r
    return a_NI[order].unflatten(0, (-1, rank)), b_ON[:, order].unflatten(1, (-1, rank)).transpose(
        0, 1
    )
