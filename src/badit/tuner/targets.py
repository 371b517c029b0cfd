"""The weights that are adapted in a base model: default modules, quantised weights, fused weights.

A quantised weight (bitsandbytes in 8 or 4 bits, torchao in int8) is not changed; the experts are
initialised from the dequantised weight. A fused weight of MoE experts is not changed either; each
of its matrices becomes a base layer.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from badit.support.errors import BaditError

# The names of an MLP's gate projection (as in the paper) or first projection, by model family.
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
# If all MLPs are fused, LoRA's default targets.
_PATTERNS = (
    # Only projections of MLPs: attention, routers and norms can have layers with these names.
    *(rf"(?!.*(attn|attention|router|norm)).*\.{name}" for name in PROJECTIONS),
    r".*\.(q_proj|v_proj)",
)
_SPLIT = "split_"  # prefix of the list of a fused weight's matrices
_BITSANDBYTES = ("Int8Params", "Params4bit")


def chosen_targets(model: Any, config: Any) -> set[str] | None:
    """Returns a configuration's target modules; if not set, :func:`default_targets`.

    With target_parameters, no modules are adapted by default.
    """
    if config.target_modules is not None:
        return config.target_modules
    if getattr(config, "target_parameters", None):
        return set()
    targets = default_targets(model)
    layers = config.layers_to_transform
    if targets is None or layers is None:
        return targets
    # PEFT does not apply layers_to_transform to full names.
    chosen = {layers} if isinstance(layers, int) else set(layers)
    indices = {name: re.search(r"\.(\d+)\.", name) for name in targets}
    return {name for name, index in indices.items() if index is None or int(index[1]) in chosen}


def default_targets(model: Any) -> set[str] | None:
    """Returns the default target modules.

    None if not every layer of the decoder (or encoder-decoder) has them.
    """
    layer_of = _layers_of_linear_modules(model)
    for pattern in _PATTERNS:
        names = [name for name in layer_of if re.fullmatch(pattern, name)]
        if names and {layer_of[name] for name in names} == set(layer_of.values()):
            return set(short_module_names(model, names))
    return None


def _layers_of_linear_modules(model: Any) -> dict[str, str]:
    """Returns the name of the layer of each linear module of the decoder or encoder-decoder."""
    decoder = model
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if hasattr(model, "get_decoder") and not is_encoder_decoder:
        decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    layers = {}
    for name, module in model.named_modules():
        layer = re.match(r".*?\.\d+(?=\.)", name)
        # Also GPTQ's and AWQ's layers: they are refused later, with a message that names them.
        is_linear = isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "qweight")
        if is_linear and layer and name.startswith(prefix):
            # A module that another adapter has wrapped.
            layers[name.removesuffix(".base_layer")] = layer[0]
    return layers


def short_module_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Returns the last parts of the modules' names if these match the same modules.

    Otherwise it returns the full names.
    """
    names = set(names)
    last_names = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_names}
    return sorted(last_names if matched == names else names)


def refuse_misplaced_targets(model: nn.Module, config: Any) -> None:
    """Raises BaditError for a fused weight in target_modules, or for none in target_parameters."""
    # By shape only: split_experts() refuses other weights of three dimensions.
    fused_names = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    modules = [name for name, _ in model.named_modules()]

    def is_among(names: Iterable[str], target: str) -> bool:
        return any(f".{name}".endswith(f".{target}") for name in names)

    for target in getattr(config, "target_parameters", None) or ():
        if not is_among(fused_names, target):
            raise BaditError(
                f"target_parameters: the model has no fused weight {target!r}; see "
                "named_parameters()"
            )
    if not isinstance(config.target_modules, set):  # a regex, or 'all-linear'
        return
    for target in config.target_modules:
        if is_among(fused_names, target) and not is_among(modules, target):
            raise BaditError(
                f"target_modules: {target} is a fused weight: name it in target_parameters"
            )


def refuse_unsuitable_layer(layer: nn.Module, name: str, method: str) -> None:
    """Raises BaditError for a layer or a type of weight that is not supported."""
    kind = type(layer).__name__
    if hasattr(layer, "qweight"):
        raise BaditError(
            f"{name} is a {kind}, quantised by GPTQ or AWQ: {method} cannot read its weight; use "
            "the unquantised model, or quantise it with bitsandbytes or torchao"
        )
    if not isinstance(layer, (nn.Linear, Conv1D, FusedExpert)):
        raise BaditError(
            f"{name} is a {kind}; {method} adapts nn.Linear and Conv1D: change target_modules"
        )
    # A float8 weight has its scales in another tensor.
    is_readable = layer.weight.is_floating_point() and layer.weight.itemsize > 1
    if not is_readable and not is_quantised(layer):
        raise BaditError(
            f"{name}: weights of type {layer.weight.dtype} are not supported; change target_modules"
        )


class FusedExpert(nn.Module):
    """The matrix of one MoE expert in a fused weight, as a linear layer without parameters."""

    experts: Any

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        # Not registered as a submodule, because it contains this module.
        self.__dict__["experts"] = experts
        self.parameter = parameter
        self.index = index
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        """The expert's matrix (out, in), a view."""
        weight = getattr(self.experts, self.parameter)[self.index]
        return weight.T if self.experts.is_transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        biases = getattr(self.experts, f"{self.parameter}_bias", None)
        bias = None if biases is None else biases[self.index]
        return F.linear(x, self.weight, bias)


def split_experts(experts: Any, parameter: str, name: str, routing: Any) -> nn.ModuleList:
    """Returns the matrices of a module's fused weight.

    The first call replaces the module's forward by one that calls them. BaditError if the parameter
    is not a floating-point fused weight of transformers' experts interface.
    """
    first = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    is_fused = hasattr(experts, "is_transposed") and parameter in (first, "down_proj")
    if not is_fused or not getattr(experts, parameter).is_floating_point():
        raise BaditError(
            f"{name}: is not a fused weight of MoE experts that can be adapted; change "
            "target_parameters"
        )
    if not hasattr(experts, _SPLIT + parameter):
        # Both, because the new forward calls both; possibly only one of them gets adapters.
        for fused in (first, "down_proj"):
            matrices = [FusedExpert(experts, fused, i) for i in range(experts.num_experts)]
            setattr(experts, _SPLIT + fused, nn.ModuleList(matrices))
        experts.routing = routing
        experts.tokens_P = None
        experts.forward = partial(_forward, experts)  # a deep or pickled copy binds it to the copy
    return getattr(experts, _SPLIT + parameter)


def join_experts(model: nn.Module) -> None:
    """Undoes :func:`split_experts` in all modules of a model."""
    for module in model.modules():
        lists = [name for name in module._modules if name.startswith(_SPLIT)]
        if not lists:
            continue
        # Without the attribute, the class's own forward is used again.
        for name in ("forward", "routing", "tokens_P", *lists):
            delattr(module, name)


def base_layer(model: nn.Module, name: str) -> Any:
    """Returns the module of this name.

    EXPERTS.PARAMETER.INDEX is the matrix with this index of a fused weight.
    """
    weight, _, index = name.rpartition(".")
    parent, _, parameter = weight.rpartition(".")
    # Matrices of fused weights are named by the parameter, which is not a module.
    if index.isdigit():
        experts = model.get_submodule(parent)
        if isinstance(getattr(experts, parameter, None), nn.Parameter):
            return FusedExpert(experts, parameter, int(index))
    return model.get_submodule(name)


def _forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Returns the output (tokens, hidden) of the chosen experts, computed expert by expert.

    Sets ``tokens_P``: the indices, in the batch, of the tokens that the adapted layers receive.
    """
    lists = [getattr(self, name) for name in self._modules if name.startswith(_SPLIT)]
    # Choices sorted by expert: a token that chooses k experts occurs k times.
    choices_C = top_k_index.flatten()
    order_C = choices_C.argsort(stable=True)
    counts = choices_C.bincount(minlength=self.num_experts).tolist()
    weight_C = top_k_weights.flatten()
    decodes = self.routing.forward_pass().held is not None
    result = torch.zeros_like(hidden_states)
    for first, last, choice_P in zip(*lists, order_C.split(counts), strict=True):
        # Experts without tokens run too: decoding needs their gates, and in training all ranks need
        # the same gradients.
        if decodes and not len(choice_P):
            continue
        self.tokens_P = choice_P // top_k_index.shape[-1]
        x = first(hidden_states[self.tokens_P])
        x = last(self._apply_gate(x) if self.has_gate else self.act_fn(x))
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        x = x * weight_C[choice_P, None]
        result.index_add_(0, self.tokens_P, x.to(result.dtype))
    return result


def is_quantised(layer: nn.Module) -> bool:
    """Returns whether the layer's weight has a supported quantised type."""
    kind = type(getattr(layer, "weight", None))
    # By name, because both libraries are optional.
    return kind.__name__ in _BITSANDBYTES or kind.__module__.startswith("torchao.")


def weight_as_used(layer: nn.Module) -> Tensor:
    """Returns the layer's weight as (out, in), dequantised; Conv1D stores it transposed."""
    weight: Any = layer.weight
    if type(weight).__name__ in _BITSANDBYTES:
        # Not with PEFT's dequantize_module_weight, which replaces the weight on a CPU: after an
        # 8-bit layer's first forward pass, when bitsandbytes has moved the scales to the layer's
        # state, the new weight has none.
        return dequantize_bnb_weight(weight, getattr(layer, "state", None))
    if is_quantised(layer):
        return weight.dequantize()
    return weight.T if isinstance(layer, Conv1D) else weight


def keep_in_place(model: nn.Module) -> None:
    """Prevents bitsandbytes from reordering 4-bit weights on CPUs with AVX-512.

    BaditError if it already has.
    """
    module: Any
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise BaditError(
                f"{name}: has been evaluated on a CPU, where bitsandbytes reorders 4-bit weights; "
                "load the model again, and add the adapter before you evaluate it"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
