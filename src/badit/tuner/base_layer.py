"""One adapted layer, as BADIT and its rivals share it:  y = W x + s · (B (g ∘ A x) − share · B0 A0 x).

All experts are one LoRA of rank N = K·r whose components are scaled by gates, so there is no loop over experts and no
copy of x for each. A method says how its experts start and which gate a component gets.

A0 and B0 are the frozen initial factors of methods that start from the base weight. Subtracting them in the forward
pass leaves that weight as it was.

Shape suffixes: I/O = in/out features, K = experts, N = components, R = rows of A (N, or r where experts share one A).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.errors import BaditError
from badit.method import frozen_factors
from badit.tuner.quantised import shape_of, weight_as_used


class WideProduct(NamedTuple):
    """What an adapter computes of an input x:  B' (scale ∘ A' x),  of P rows of A' and N columns of B'.

    Where experts share rows of A', P divides N, and each run of P columns takes all rows. A scale of None is worked
    into B'.
    """

    a_PI: torch.Tensor
    b_ON: torch.Tensor
    scale: torch.Tensor | None


class ExpertLayer(BaseTunerLayer):
    """State of the adapters on one base layer. Names carry the ``badit_`` prefix, or PEFT would not save them.

    badit_A (R, I), badit_B (O, N) and, where layers route for themselves, badit_router (K, I) are trained; badit_A0 and
    badit_B0 (the initial factors, of methods that start from a part of the weight) are saved buffers.
    """

    adapter_layer_names = ("badit_A", "badit_B", "badit_router")
    other_param_names = ("badit_A0", "badit_B0", "badit_config", "badit_dropout")
    training: bool  # nn.Module's, of the class that mixes this one in

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        self.base_layer = base_layer
        self.name = name
        self.out_features, self.in_features = self.weight_OI.shape
        self.badit_A = nn.ParameterDict()
        self.badit_B = nn.ParameterDict()
        self.badit_router = nn.ParameterDict()
        self.badit_A0 = BufferDict(persistent=True)
        self.badit_B0 = BufferDict(persistent=True)
        self.badit_config: dict[str, Any] = {}
        self.badit_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []

    @property
    def weight_OI(self) -> torch.Tensor:
        """The base layer's present weight as (out, in); of a quantised one, a copy of what it stands for."""
        return weight_as_used(self.get_base_layer())

    @property
    def device(self) -> torch.device:
        """The base layer's."""
        return cast(torch.Tensor, self.get_base_layer().weight).device

    def initial_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A0 (N, I) and B0 (O, N), of an adapter that decomposed its weight."""
        return cast(torch.Tensor, self.badit_A0[adapter_name]), cast(torch.Tensor, self.badit_B0[adapter_name])

    def expert_of(self, adapter_name: str) -> torch.Tensor:
        """The N labels that name every component's expert: runs of r, unless a method regroups them."""
        config = self.badit_config[adapter_name]
        labels_K = torch.arange(config.num_experts, device=self.device)
        return labels_K.repeat_interleave(config.num_components // config.num_experts)

    def update_layer(self, adapter_name: str, config: Any, inference_mode: bool = False) -> None:
        """Adds an adapter: makes its tensors, then fills them as its method starts."""
        out_features, in_features = shape_of(self.get_base_layer())
        components = config.num_components
        self.badit_config[adapter_name] = config
        self.badit_A[adapter_name] = nn.Parameter(torch.zeros(config.rows_of_A, in_features))
        self.badit_B[adapter_name] = nn.Parameter(torch.zeros(out_features, components))
        if config.routes_in_layer:
            self.badit_router[adapter_name] = nn.Parameter(torch.zeros(config.num_experts, in_features))
        self.badit_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if config.keeps_initial_factors:
            self.badit_A0[adapter_name] = torch.zeros(components, in_features)
            self.badit_B0[adapter_name] = torch.zeros(out_features, components)
        # On the meta device, and in an adapter that is only read, the values are about to be loaded: no need of an SVD.
        to_be_loaded = self.badit_A[adapter_name].is_meta or (config.decomposes and config.inference_mode)
        if not to_be_loaded:
            self._initialise(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def _initialise(self, adapter_name: str, config: Any) -> None:
        a_RI, b_ON = self.badit_A[adapter_name], self.badit_B[adapter_name]
        if not config.decomposes:
            nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
            return
        try:
            factor_A, factor_B = self._decompose(config)
        except BaditError as error:
            raise BaditError(f"{self.name}: {error}") from None
        a_RI.copy_(factor_A)
        b_ON.copy_(factor_B)
        if config.keeps_initial_factors:
            initial_A, initial_B = self.initial_factors(adapter_name)
            initial_A.copy_(factor_A)
            initial_B.copy_(factor_B)

    def _decompose(self, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The initial A (N, I) and B (O, N) from the base weight."""
        raise NotImplementedError

    def _component_gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The gates (…, N) of the components for an input x (…, I)."""
        raise NotImplementedError

    def _factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, I) and B (O, N) of the wide product; a method may join frozen ones to those it trains."""
        return self.badit_A[adapter_name], self.badit_B[adapter_name]

    def _hidden(self, adapter_name: str, x: torch.Tensor, a_RI: torch.Tensor) -> torch.Tensor:
        """A x, (…, R), before the gates."""
        return F.linear(x, a_RI)

    @torch.no_grad()
    def frozen_factors(
        self, adapter_name: str, gates_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The LoRA that the adapter is under fixed gates, on the base weight as it was before any adapter.

        Args:
            gates_N: a gate for every component (default: all 1).

        Returns:
            A' (P, I) and B' (O, P) in at least float32, with the scaling in B'; P = R, or 2N where initial factors are
            removed.
        """
        config = self.badit_config[adapter_name]
        a_RI, b_ON = map(_precise, self._factors(adapter_name))
        scale_N = torch.full((b_ON.shape[1],), config.scaling, dtype=b_ON.dtype, device=b_ON.device)
        if gates_N is not None:
            scale_N = scale_N * gates_N.to(scale_N)
        if not config.removed_share:
            return frozen_factors(a_RI, b_ON, scale_N)
        initial_A, initial_B = map(_precise, self.initial_factors(adapter_name))
        removed = config.scaling * config.removed_share
        return frozen_factors(a_RI, b_ON, scale_N, (initial_A, initial_B), removed)

    def get_delta_weight(self, adapter_name: str, gates_K: torch.Tensor | None = None) -> torch.Tensor:
        """What the adapter adds to the base weight under fixed gates (default: all 1), in that weight's own layout."""
        gates_N = None if gates_K is None else gates_K[self.expert_of(adapter_name)]
        a_PI, b_OP = self.frozen_factors(adapter_name, gates_N)
        delta_OI = b_OP @ a_PI
        return delta_OI.T if isinstance(self.get_base_layer(), Conv1D) else delta_OI

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` may take :meth:`get_delta_weight` for the adapter: where gates are fixed.

        Other mixtures become a LoRA by a choice of gates, which PEFT does not ask for: see :func:`badit.export`.
        """
        return self.badit_config[adapter_name].has_fixed_gates

    def unmerge(self) -> None:
        """Nothing to do: an adapter whose gates depend on the input is never merged."""

    def _adapted(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output, and what each active adapter adds to it."""
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in self._running_adapters:
            result = result + self._delta(adapter_name, x).to(result.dtype)
        return result

    @property
    def _running_adapters(self) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.badit_A]

    def _delta(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        x = self._cast_input_dtype(x, self.badit_A[adapter_name].dtype)
        a_PI, b_ON, scale = self._wide_product(adapter_name, x)
        hidden = self._hidden(adapter_name, self.badit_dropout[adapter_name](x), a_PI)
        if scale is not None:
            scale = scale.to(hidden.dtype).unflatten(-1, (-1, hidden.shape[-1]))
            hidden = (hidden[..., None, :] * scale).flatten(-2)
        return F.linear(hidden, b_ON)

    def _wide_product(self, adapter_name: str, x: torch.Tensor) -> WideProduct:
        config = self.badit_config[adapter_name]
        a_RI, b_ON = self._factors(adapter_name)
        scale = config.scaling * self._component_gates(adapter_name, x)
        if not config.subtracted_share:
            return WideProduct(a_RI, b_ON, scale)
        # The initial factors ride along as N more components of a negative gate: two products instead of four.
        initial_A, initial_B = self.initial_factors(adapter_name)
        removed = torch.full_like(scale, -config.scaling * config.subtracted_share)
        return WideProduct(
            torch.cat([a_RI, initial_A]), torch.cat([b_ON, initial_B], dim=1), torch.cat([scale, removed], dim=-1)
        )


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
