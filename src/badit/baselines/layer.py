"""One layer of a mixture:  y = W x + s · (Σ_k g_k(x) B_k A_k x − share · B0 A0 x), with the gates of every position.

The product is :mod:`badit.tuner.base_layer`'s; what sets one rival apart from another is its configuration's.

Shape suffixes: I/O = in/out features, N = components, K = experts, L = the attended positions of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from badit.baselines.config import BalancedMixtureConfig, MixtureConfig
from badit.errors import BaditError
from badit.tuner.base_layer import ExpertLayer
from badit.tuner.prompt import inside_backward


class MixtureLayer(ExpertLayer):
    """State of the adapters on one base layer, and of its last forward pass what the balance loss needs."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self._router_logits: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def _initialise(self, adapter_name: str, config: MixtureConfig) -> None:
        super()._initialise(adapter_name, config)
        nn.init.kaiming_uniform_(self.badit_router[adapter_name], a=math.sqrt(5))

    def _decompose(self, config: MixtureConfig) -> tuple[torch.Tensor, torch.Tensor]:
        return config.initial_factors(self.weight_OI)

    def _component_gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        config: MixtureConfig = self.badit_config[adapter_name]
        logits_K = F.linear(x, self.badit_router[adapter_name]).float()
        self._keep_for_balance(adapter_name, config, logits_K)
        return config.gates(logits_K).repeat_interleave(config.num_components // config.num_experts, dim=-1)

    def _keep_for_balance(self, adapter_name: str, config: MixtureConfig, logits_K: torch.Tensor) -> None:
        # Gradient checkpointing runs the layer again within the backward pass, when the loss has long been summed.
        needed = isinstance(config, BalancedMixtureConfig) and config.balance_weight > 0
        if needed and self.training and torch.is_grad_enabled() and not inside_backward():
            self._router_logits[adapter_name] = logits_K

    def balance_losses(self, attended_BT: torch.Tensor) -> Iterator[torch.Tensor]:
        """The weighted balance loss of each active adapter that has one, over the last training pass; read it once."""
        kept, self._router_logits = self._router_logits, {}
        for adapter_name in self._running_adapters:
            config: MixtureConfig = self.badit_config[adapter_name]
            if not isinstance(config, BalancedMixtureConfig) or not config.balance_weight:
                continue
            logits_K = kept.get(adapter_name)
            if logits_K is None:
                raise BaditError(
                    f"{self.name} has seen no training pass that its balance loss could be taken of; with gradient "
                    "checkpointing set use_reentrant=False, or set balance_weight=0"
                )
            if logits_K.shape[:-1].numel() != attended_BT.numel():
                raise BaditError(
                    f"{self.name} sees {logits_K.shape[:-1].numel()} positions, the batch has {attended_BT.numel()}: "
                    "leave it out of target_modules, or set balance_weight=0"
                )
            logits_LK = logits_K.flatten(0, -2)[attended_BT.flatten().bool().to(logits_K.device)]
            yield config.imbalance(logits_LK) * config.balance_weight

    def delete_adapter(self, adapter_name: str) -> None:
        self._router_logits.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise BaditError(
            "a mixture of experts weighs them anew at every position and so has no single weight to merge into; "
            "keep it as an adapter (unload() gives the base model back)"
        )


class MixtureLinear(nn.Module, MixtureLayer):
    """A mixture on ``nn.Linear`` or transformers' ``Conv1D``."""

    def __init__(self, base_layer: nn.Module, name: str, adapter_name: str, config: MixtureConfig) -> None:
        super().__init__()
        MixtureLayer.__init__(self, base_layer, name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._adapted(x, *args, **kwargs)

    def __repr__(self) -> str:
        return "badit." + super().__repr__()
