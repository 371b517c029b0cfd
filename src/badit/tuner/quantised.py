"""Base layers with a quantised weight, which the experts leave alone: bitsandbytes' in 8 and 4 bits, torchao's in int8.

The experts start from the weight as the layer uses it, that is from what its numbers stand for.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.errors import BaditError


def is_quantised(layer: nn.Module) -> bool:
    """Whether the weight is one of those that can be adapted without being a plain tensor of numbers."""
    kind = type(getattr(layer, "weight", None))
    return kind.__name__ in ("Int8Params", "Params4bit") or kind.__module__.startswith("torchao.")


def weight_as_used(layer: nn.Module) -> torch.Tensor:
    """The weight (out, in) that the layer multiplies by, dequantised where need be; Conv1D keeps it the other way."""
    weight: Any = layer.weight
    match type(weight).__name__:
        case "Int8Params":
            # bitsandbytes moves the rows' scales (of 127 steps each) to the layer in its first forward pass.
            scale_O = weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB
            return weight.data.float() * (scale_O.float() / 127)[:, None]
        case "Params4bit":
            from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports] (an extra)

            return dequantize_4bit(weight.data, weight.quant_state)
    if is_quantised(layer):
        return weight.dequantize()
    return weight.T if isinstance(layer, Conv1D) else weight


def keep_in_place(model: nn.Module) -> None:
    """Has 4-bit weights stay as they are.

    For evaluation on a CPU with AVX-512 bitsandbytes puts them into another order, with coarser scales; and in that
    order it has no gradients, so that training after an evaluation would go wrong.

    Raises:
        BaditError: that has happened already.
    """
    module: Any
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise BaditError(
                f"{name} has been evaluated on a CPU, where bitsandbytes reorders 4-bit weights so that they cannot be "
                "trained beside: load the model again, and add the adapter before you evaluate it"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) features, without a look at the weight, which may be packed."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return cast(int, layer.out_features), cast(int, layer.in_features)


def refuse_unsuitable_layer(layer: nn.Module, name: str, method: str) -> None:
    """Raises for a layer whose weight cannot be decomposed.

    Raises:
        BaditError: it is none of nn.Linear and Conv1D, or its weight is kept in a form that is not known here.
    """
    kind = type(layer).__name__
    if hasattr(layer, "qweight"):
        raise BaditError(
            f"{name} is a {kind}, quantised by GPTQ or AWQ, which keep no weight that {method} could start from: "
            "take the unquantised model, or quantise that with bitsandbytes or torchao"
        )
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise BaditError(f"{name} is a {kind}; {method} adapts nn.Linear and Conv1D: change target_modules")
    if not is_quantised(layer) and not layer.weight.is_floating_point():
        raise BaditError(f"{name} has a weight of type {layer.weight.dtype}, which cannot be decomposed")
