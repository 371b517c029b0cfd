"""The weights that are adapted in a base model: default modules, quantised weights and fused weights of MoE layers.

A quantised weight (bitsandbytes in 8 or 4 bits, torchao in int8) is not changed; the experts are initialised from the
dequantised weight. A fused weight of MoE experts is not changed either; each of its matrices becomes a base layer.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.support.errors import BaditError

# The MLP's gate projection (as in the paper) or first projection; if all MLPs are fused, LoRA's default targets.
PROJECTIONS = (
    "gate_proj",
    "gate_up_proj",
    "up_proj",
    "fc1",
    "c_fc",
    "fc_in",
    "dense_h_to_4h",
    "w1",
    "wi_0",
    "wi",
)
_PATTERNS = (
    *(rf"(?!.*(attn|attention|router|norm)).*\.{name}" for name in PROJECTIONS),
    r".*\.(q_proj|v_proj)",
)
_SPLIT = "split_"  # prefix of the list of a fused weight's matrices


def default_targets(model: Any) -> set[str] | None:
    """Returns the default target modules, or None if not every layer of the decoder (or encoder-decoder) has them."""
    is_whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(
        model, "get_decoder"
    )
    decoder = model if is_whole else model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    layers = {}  # module name -> layer name
    for name, module in model.named_modules():
        layer = re.match(r".*?\.\d+(?=\.)", name)
        is_linear = isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "qweight")
        if is_linear and layer and name.startswith(prefix):
            layers[name.removesuffix(".base_layer")] = layer[0]
    for pattern in _PATTERNS:
        found = [name for name in layers if re.fullmatch(pattern, name)]
        if found and {layers[name] for name in found} == set(layers.values()):
            return set(short_module_names(model, found))
    return None


def chosen_targets(model: Any, config: Any) -> set[str] | None:
    """Returns a configuration's target modules; if not set, none with fused weights, else :func:`default_targets`."""
    if config.target_modules is not None:
        return config.target_modules
    found = set() if getattr(config, "target_parameters", None) else default_targets(model)
    layers = config.layers_to_transform
    if found and layers is not None:  # PEFT does not apply it to full names
        chosen = {layers} if isinstance(layers, int) else set(layers)
        found = {
            name
            for name in found
            if not (index := re.search(r"\.(\d+)\.", name)) or int(index[1]) in chosen
        }
    return found


def short_module_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Returns the last parts of the modules' names if these match the same modules; else the full names."""
    names = set(names)
    last_names = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_names}
    return sorted(last_names if meant == names else names)


class FusedExpert(nn.Module):
    """The matrix of one MoE expert in a fused weight, as a linear layer that has no parameters."""

    experts: Any

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        self.__dict__["experts"] = (
            experts  # not registered as a submodule, because it contains this module
        )
        self.parameter, self.index = parameter, index
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> torch.Tensor:
        """The expert's matrix (out, in), a view."""
        weight = getattr(self.experts, self.parameter)[self.index]
        return weight.T if self.experts.is_transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        biases = getattr(self.experts, f"{self.parameter}_bias", None)
        return F.linear(x, self.weight, None if biases is None else biases[self.index])


def split_experts(experts: Any, parameter: str, name: str, routing: Any) -> nn.ModuleList:
    """Returns the matrices of a module's fused weight; the first call replaces its forward by one that calls them.

    BaditError if the parameter is not a floating-point fused weight of transformers' experts interface.
    """
    weights = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    known = hasattr(experts, "is_transposed") and parameter in weights
    if not known or not getattr(experts, parameter).is_floating_point():
        raise BaditError(
            f"{name}: is not a fused weight of MoE experts that can be adapted; change target_parameters"
        )
    if not hasattr(experts, _SPLIT + parameter):
        for each in weights:
            matrices = (FusedExpert(experts, each, index) for index in range(experts.num_experts))
            setattr(experts, _SPLIT + each, nn.ModuleList(matrices))
        experts.routing, experts.tokens_P = routing, None
        experts.forward = partial(_forward, experts)  # a deep or pickled copy binds it to the copy
    return getattr(experts, _SPLIT + parameter)


def base_layer(model: nn.Module, name: str) -> Any:
    """Returns the module of this name; for EXPERTS.PARAMETER.INDEX, the matrix with this index of a fused weight."""
    weight, _, index = name.rpartition(".")
    experts, _, parameter = weight.rpartition(".")
    if index.isdigit() and isinstance(
        getattr(model.get_submodule(experts), parameter, None), nn.Parameter
    ):
        return FusedExpert(model.get_submodule(experts), parameter, int(index))
    return model.get_submodule(name)


def join_experts(model: nn.Module) -> None:
    """Undoes :func:`split_experts` in all modules of a model."""
    for module in model.modules():
        lists = [name for name in module._modules if name.startswith(_SPLIT)]
        for name in ("forward", "routing", "tokens_P", *lists) if lists else ():
            delattr(module, name)


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Returns the output (tokens, hidden) of the experts that the MoE's router chose, computed expert by expert.

    Sets ``tokens_P``: the indices, in the batch, of the tokens that the adapted layers receive.
    """
    lists = [getattr(self, name) for name in self._modules if name.startswith(_SPLIT)]
    choices_C = top_k_index.flatten()
    order_C = choices_C.argsort(stable=True)
    counts = choices_C.bincount(minlength=self.num_experts).tolist()
    decodes = self.routing.forward_pass().held is not None
    result = torch.zeros_like(hidden_states)
    for (first, last), choice_P in zip(
        zip(*lists, strict=True), order_C.split(counts), strict=True
    ):
        # Experts without tokens run too: decoding needs their gates, and in training all ranks need the same gradients.
        if decodes and not len(choice_P):
            continue
        self.tokens_P = choice_P // top_k_index.shape[-1]
        x = first(hidden_states[self.tokens_P])
        x = last(self._apply_gate(x) if self.has_gate else self.act_fn(x))
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        x = x * top_k_weights.flatten()[choice_P, None]
        result.index_add_(0, self.tokens_P, x.to(result.dtype))
    return result


def is_quantised(layer: nn.Module) -> bool:
    """Returns whether the layer's weight has a supported quantised type."""
    kind = type(getattr(layer, "weight", None))
    return kind.__name__ in ("Int8Params", "Params4bit") or kind.__module__.startswith("torchao.")


def weight_as_used(layer: nn.Module) -> torch.Tensor:
    """Returns the layer's weight as (out, in), dequantised if necessary; Conv1D stores it transposed."""
    weight: Any = layer.weight
    if type(weight).__name__ in ("Int8Params", "Params4bit"):
        # Not with PEFT's dequantize_module_weight, which replaces the weight on a CPU: after an 8-bit layer's first
        # forward pass, when bitsandbytes has moved the scales to the layer's state, the new weight has none.
        return dequantize_bnb_weight(weight, getattr(layer, "state", None))
    if is_quantised(layer):
        return weight.dequantize()
    return weight.T if isinstance(layer, Conv1D) else weight


def keep_in_place(model: nn.Module) -> None:
    """Prevents bitsandbytes from reordering 4-bit weights on CPUs with AVX-512; BaditError if it already has."""
    module: Any
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            fix = "load the model again, and add the adapter before you evaluate it"
            raise BaditError(
                f"{name}: has been evaluated on a CPU, where bitsandbytes reorders 4-bit weights; {fix}"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refuse_unsuitable_layer(layer: nn.Module, name: str, method: str) -> None:
    """Raises BaditError for a layer that is not nn.Linear or Conv1D, or whose weight has an unsupported type."""
    kind = type(layer).__name__
    if hasattr(layer, "qweight"):
        fix = "use the unquantised model, or quantise it with bitsandbytes or torchao"
        raise BaditError(
            f"{name} is a {kind}, quantised by GPTQ or AWQ: {method} cannot read its weight; {fix}"
        )
    if not isinstance(layer, (nn.Linear, Conv1D, FusedExpert)):
        raise BaditError(
            f"{name} is a {kind}; {method} adapts nn.Linear and Conv1D: change target_modules"
        )
    if not is_quantised(layer) and (
        layer.weight.itemsize == 1 or not layer.weight.is_floating_point()
    ):
        raise BaditError(
            f"{name}: weights of type {layer.weight.dtype} are not supported; change target_modules"
        )
