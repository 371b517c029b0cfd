"""Base layers with a quantised weight, which stays as it is: bitsandbytes' in 8 and 4 bits, torchao's in int8.

The experts start from the dequantised weight.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.errors import BaditError


def is_quantised(layer: nn.Module) -> bool:
    """Whether the weight is of a known quantised kind."""
    kind = type(getattr(layer, "weight", None))
    return kind.__name__ in ("Int8Params", "Params4bit") or kind.__module__.startswith("torchao.")


def weight_as_used(layer: nn.Module) -> torch.Tensor:
    """The weight (out, in) that the layer multiplies by, dequantised if necessary; Conv1D stores it transposed."""
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
    """Keeps 4-bit weights as they are.

    For evaluation on a CPU with AVX-512, bitsandbytes reorders them, with coarser scales and without gradients.

    Raises:
        BaditError: that has happened already.
    """
    module: Any
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise BaditError(
                f"{name} has been evaluated on a CPU, where bitsandbytes reorders 4-bit weights so that no adapter can "
                "be trained on them: load the model again, and add the adapter before you evaluate it"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) features, without reading the weight, which may be packed."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return cast(int, layer.out_features), cast(int, layer.in_features)


def refuse_unsuitable_layer(layer: nn.Module, name: str, method: str) -> None:
    """Raises BaditError for a layer that is neither nn.Linear nor Conv1D, or whose weight is of an unknown form."""
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
