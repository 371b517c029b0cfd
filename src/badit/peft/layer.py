"""One adapted layer:  y = W x + s · (B (g ∘ A x) − B0 A0 x),   g_i = gate[expert_of[i]].

All K experts are one LoRA of rank N = K·r whose components are scaled by their expert's gate, so there is no loop over
experts and no copy of x for each. Regrouping (DOG) changes the N integers of ``expert_of`` and nothing else.

A0 and B0 are the frozen initial factors. Subtracting them in the forward pass equals the paper's residual Ŵ while the
base weight W stays as it was ("delta"); "folded" writes Ŵ = W − s·B0 A0 into the base layer instead.

Shape suffixes: B = batch, T = positions, I/O = in/out features, N = components, K = experts.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.errors import BaditError
from badit.method import expert_factors, expert_gates, prompt_mean, top_singular_triples
from badit.peft.config import BaditConfig
from badit.peft.routing_context import RoutingContext


class BaditLayer(BaseTunerLayer):
    """State of the adapters on one base layer. Names carry the ``badit_`` prefix, or PEFT would not save them.

    badit_A (N, I), badit_B (O, N) and badit_router (K, I) are trained; badit_A0, badit_B0 (the initial factors) and
    badit_expert_of (N integers) are saved buffers.
    """

    adapter_layer_names = ("badit_A", "badit_B", "badit_router")
    training: bool  # nn.Module's, of the class that mixes this one in

    other_param_names = ("badit_A0", "badit_B0", "badit_expert_of", "badit_config", "badit_dropout")

    def __init__(self, base_layer: nn.Module, name: str, routing: RoutingContext) -> None:
        self.base_layer = base_layer
        self.name = name
        self.routing = routing
        self.badit_A = nn.ParameterDict()
        self.badit_B = nn.ParameterDict()
        self.badit_router = nn.ParameterDict()
        self.badit_A0 = BufferDict(persistent=True)
        self.badit_B0 = BufferDict(persistent=True)
        self.badit_expert_of = BufferDict(persistent=True)
        self.badit_config: dict[str, BaditConfig] = {}
        self.badit_dropout = nn.ModuleDict()
        self.gate_sums: dict[str, torch.Tensor] = {}
        self._weight_before_folding: torch.Tensor | None = None
        self._disable_adapters = False
        self.merged_adapters = []

    @property
    def weight_OI(self) -> torch.Tensor:
        """The base layer's present weight as (out, in); Conv1D keeps it the other way round."""
        weight = cast(torch.Tensor, self.get_base_layer().weight)
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def initial_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A0 (N, I) and B0 (O, N), of an adapter initialised by BAD."""
        return cast(torch.Tensor, self.badit_A0[adapter_name]), cast(torch.Tensor, self.badit_B0[adapter_name])

    def expert_of(self, adapter_name: str) -> torch.Tensor:
        """The N labels that name every component's expert."""
        return cast(torch.Tensor, self.badit_expert_of[adapter_name])

    def update_layer(self, adapter_name: str, config: BaditConfig, inference_mode: bool = False) -> None:
        """Adds an adapter: makes its tensors, then fills them by BAD (or as ``config.init_weights`` says)."""
        self.unfold()
        out_features, in_features = self.weight_OI.shape
        components = config.num_components
        self.badit_config[adapter_name] = config
        self.badit_A[adapter_name] = nn.Parameter(torch.zeros(components, in_features))
        self.badit_B[adapter_name] = nn.Parameter(torch.zeros(out_features, components))
        self.badit_router[adapter_name] = nn.Parameter(torch.zeros(config.num_experts, in_features))
        self.badit_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if config.decomposes:
            self.badit_A0[adapter_name] = torch.zeros(components, in_features)
            self.badit_B0[adapter_name] = torch.zeros(out_features, components)
        # On the meta device, and in an adapter that is only read, the values are about to be loaded: no need of an SVD.
        to_be_loaded = self.badit_A[adapter_name].is_meta or (config.decomposes and config.inference_mode)
        if not to_be_loaded:
            self._initialise(adapter_name, config)
        self.badit_expert_of[adapter_name] = torch.arange(config.num_experts).repeat_interleave(config.r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        labels = self.expert_of(adapter_name)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        # PEFT before 0.21 casts integers to the base layer's dtype as well.
        self.badit_expert_of[adapter_name] = labels.to(self.expert_of(adapter_name).device)

    @torch.no_grad()
    def _initialise(self, adapter_name: str, config: BaditConfig) -> None:
        a_NI, b_ON = self.badit_A[adapter_name], self.badit_B[adapter_name]
        if config.decomposes:
            try:
                triples = top_singular_triples(
                    self.weight_OI,
                    config.num_components,
                    method=config.svd_method,  # pyright: ignore[reportArgumentType] (validated by the config)
                    tolerance=config.svd_tolerance,
                )
            except BaditError as error:
                raise BaditError(f"{self.name}: {error}") from None
            factor_A, factor_B = expert_factors(triples, config.scaling)
            initial_A, initial_B = self.initial_factors(adapter_name)
            for tensor, value in ((a_NI, factor_A), (b_ON, factor_B), (initial_A, factor_A), (initial_B, factor_B)):
                tensor.copy_(value)
        else:
            nn.init.kaiming_uniform_(a_NI, a=math.sqrt(5))
            if config.init_weights is False:
                nn.init.normal_(b_ON, std=0.02)
                nn.init.normal_(self.badit_router[adapter_name], std=0.02)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self.unfold()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.unfold()

    def delete_adapter(self, adapter_name: str) -> None:
        self.unfold()
        self.gate_sums.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise BaditError(
            "a BADIT adapter mixes its experts anew for every prompt and so has no single weight to merge into; "
            "keep it as an adapter (unload() gives the base model back), "
            "or take the weight of one fixed mixture from layer.get_delta_weight(adapter, gates)"
        )

    def unmerge(self) -> None:
        """Nothing to do: BADIT never merges."""

    def get_delta_weight(self, adapter_name: str, gates_K: torch.Tensor | None = None) -> torch.Tensor:
        """s·(B diag(gate[expert_of]) A − B0 A0), (O, I): what the adapter adds under fixed gates (default: all 1)."""
        a_NI, b_ON = self.badit_A[adapter_name], self.badit_B[adapter_name]
        if gates_K is not None:
            b_ON = b_ON * gates_K.to(b_ON)[self.expert_of(adapter_name)]
        delta_OI = b_ON @ a_NI
        if adapter_name in self.badit_A0:
            initial_A, initial_B = self.initial_factors(adapter_name)
            delta_OI = delta_OI - initial_B @ initial_A
        return delta_OI * self.badit_config[adapter_name].scaling

    @torch.no_grad()
    def _fold(self, adapter_name: str) -> None:
        if self._weight_before_folding is not None:
            return
        initial_A, initial_B = self.initial_factors(adapter_name)
        initial_OI = self.badit_config[adapter_name].scaling * (initial_B.float() @ initial_A.float())
        self._weight_before_folding = self.weight_OI.detach().clone()
        self.weight_OI.copy_(self.weight_OI.float() - initial_OI)

    @torch.no_grad()
    def unfold(self) -> None:
        """Puts the base weight back, to the bit. A folded adapter folds again at its next forward pass."""
        if self._weight_before_folding is not None:
            self.weight_OI.copy_(self._weight_before_folding)
            self._weight_before_folding = None

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The gates for an input x (B, T, I): (B, 1, K) for routing by prompt, (B, T, K) by token.

        For x (B, I), as in models without positions, (B, K).
        """
        config = self.badit_config[adapter_name]
        if config.routing == "token":
            return self._route(adapter_name, x)
        forward_pass = self.routing.forward_pass()
        key = f"{self.name}.{adapter_name}"
        if forward_pass is not None and forward_pass.held is not None:
            return self._held(forward_pass.held, key, x)
        mask_BT = None if forward_pass is None else forward_pass.prompt_mask_BT
        if forward_pass is None or mask_BT is None:
            mask_BT = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            return self._route(adapter_name, prompt_mean(x, mask_BT)[:, None] if x.ndim == 3 else x)
        if x.ndim != 3 or x.shape[:2] != mask_BT.shape:
            raise BaditError(
                f"{self.name} sees an input of shape {tuple(x.shape)}, the batch has {tuple(mask_BT.shape)} positions: "
                "leave it out of target_modules, or use routing='token'"
            )
        gates = self._route(adapter_name, prompt_mean(x, mask_BT.to(x.device))[:, None])
        forward_pass.fresh[key] = gates.detach()
        return gates

    def _held(self, held: dict[str, torch.Tensor], key: str, x: torch.Tensor) -> torch.Tensor:
        gates = held.get(key)
        if gates is None:
            raise BaditError(
                "this cache was filled without the adapter, so it holds no routing of its prompt; "
                "fill it with the adapter active, or use routing='token'"
            )
        if gates.shape[0] != x.shape[0]:
            raise BaditError(
                f"this cache was filled with a batch of {gates.shape[0]}, the present batch has {x.shape[0]} rows"
            )
        return gates.to(x.device)

    def _route(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        config = self.badit_config[adapter_name]
        logits = F.linear(x, self.badit_router[adapter_name]).float()
        gates = expert_gates(logits, kind=config.gates, top_k=config.top_k)  # pyright: ignore[reportArgumentType]
        if self.training and torch.is_grad_enabled():
            self._count_gates(adapter_name, gates.detach())
        return gates

    def _count_gates(self, adapter_name: str, gates: torch.Tensor) -> None:
        """Adds to the running sum of gates (K) and their number (last entry), which regrouping reads."""
        flat = gates.reshape(-1, gates.shape[-1])
        sums = F.pad(flat.sum(dim=0), (0, 1), value=float(len(flat)))
        self.gate_sums[adapter_name] = sums + self.gate_sums.get(adapter_name, torch.zeros_like(sums))


class BaditLinear(nn.Module, BaditLayer):
    """BADIT on ``nn.Linear`` or transformers' ``Conv1D``."""

    def __init__(
        self, base_layer: nn.Module, name: str, routing: RoutingContext, adapter_name: str, config: BaditConfig
    ) -> None:
        super().__init__()
        BaditLayer.__init__(self, base_layer, name, routing)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # These two stand here and not in BaditLayer, which nn.Module precedes in the order of inheritance.
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A residual saved as the base weight would be folded a second time after loading.
        self.unfold()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Loading may replace A0, B0 or the base weight itself: a residual made of the old ones would be wrong.
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.badit_A]
        for adapter_name in active:
            if self.badit_config[adapter_name].base_weight == "folded":
                self._fold(adapter_name)
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in active:
            result = result + self._delta(adapter_name, x).to(result.dtype)
        return result

    def _delta(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        config = self.badit_config[adapter_name]
        a_NI, b_ON = self.badit_A[adapter_name], self.badit_B[adapter_name]
        x = self._cast_input_dtype(x, a_NI.dtype)
        scale = config.scaling * self.gates(adapter_name, x)[..., self.expert_of(adapter_name)]
        if config.decomposes and config.base_weight == "delta":
            # The initial factors ride along as N more components of gate −1: two products instead of four.
            initial_A, initial_B = self.initial_factors(adapter_name)
            a_NI, b_ON = torch.cat([a_NI, initial_A]), torch.cat([b_ON, initial_B], dim=1)
            scale = torch.cat([scale, torch.full_like(scale, -config.scaling)], dim=-1)
        hidden = F.linear(self.badit_dropout[adapter_name](x), a_NI)
        return F.linear(hidden * scale.to(hidden.dtype), b_ON)

    def __repr__(self) -> str:
        return "badit." + super().__repr__()
