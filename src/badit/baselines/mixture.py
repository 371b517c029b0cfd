"""Mixtures of LoRA experts, weighed by a softmax at every position, and the two dense ones among the baselines.

    y = W x + s · (Σ_k g_k(x) B_k A_k x − share · B0 A0 x) + the weighted balance loss of some,      g = softmax(W_g x)

* LoRAMoE (Dou et al. 2024, "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style
  Plugin", arXiv 2312.09979): every expert has its own A_k. The balance loss is off by default, as the authors have it.
* HydraLoRA (Tian et al. 2024, "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
  arXiv 2404.19245): one A for all.

A and W_g start as LoRA's A does, B_k at zero; no share of B0 A0. (:mod:`badit.baselines.goat` is sparse and has one.)

Shape suffixes: K = experts, L = the attended positions of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from badit.baselines import baseline
from badit.errors import BaditError
from badit.method import expert_gates
from badit.tuner.config import COUNT, NOT_NEGATIVE, ExpertConfig, option
from badit.tuner.layer import ExpertLinear
from badit.tuner.model import ExpertModel
from badit.tuner.prompt import inside_backward


@dataclass
class MixtureConfig(ExpertConfig):
    """Experts mixed by a softmax over all of them, at every position and in every adapted layer."""

    def gates(self, logits_K: torch.Tensor) -> torch.Tensor:
        """The experts' gates (…, K) from the router's logits, with sum 1."""
        return expert_gates(logits_K, kind="softmax")


@dataclass
class BalancedMixtureConfig(MixtureConfig):
    """A mixture whose loss has a term, ``imbalance``, that is least where all experts are used alike."""

    balance_weight: float = option(0.0, "Weight of the balance loss; 0 leaves it out.", NOT_NEGATIVE)


class MixtureLinear(ExpertLinear):
    """A router for every position; keeps the last training pass's logits for the balance loss."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._router_logits: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def initialise(self, adapter_name: str) -> None:
        super().initialise(adapter_name)
        nn.init.kaiming_uniform_(self.badit_router[adapter_name], a=math.sqrt(5))

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        logits_K = F.linear(x, self.badit_router[adapter_name]).float()
        # Gradient checkpointing runs the layer again in the backward pass, after the loss has been summed.
        if self._is_balanced(adapter_name) and self.training and torch.is_grad_enabled() and not inside_backward():
            self._router_logits[adapter_name] = logits_K
        return self.badit_config[adapter_name].gates(logits_K)

    def _is_balanced(self, adapter_name: str) -> bool:
        return getattr(self.badit_config[adapter_name], "balance_weight", 0) > 0

    def balance_losses(self, attended_BT: torch.Tensor) -> list[torch.Tensor]:
        """The weighted balance loss of each active adapter that has one, over the last training pass; read it once."""
        kept, self._router_logits = self._router_logits, {}
        losses = []
        for adapter_name in filter(self._is_balanced, self.running_adapters):
            config = self.badit_config[adapter_name]
            if adapter_name not in kept:
                raise BaditError(
                    f"{self.name} has seen no training pass that its balance loss could be taken of; with gradient "
                    "checkpointing set use_reentrant=False, or set balance_weight=0"
                )
            logits_LK = kept[adapter_name].flatten(0, -2)
            if len(logits_LK) != attended_BT.numel():
                sizes = f"{len(logits_LK)} positions, the batch has {attended_BT.numel()}"
                raise BaditError(f"{self.name} sees {sizes}: leave it out of target_modules, or set balance_weight=0")
            logits_LK = logits_LK[attended_BT.flatten().bool().to(logits_LK.device)]
            losses.append(config.imbalance(logits_LK).to(attended_BT.device) * config.balance_weight)
        return losses


class MixtureModel(ExpertModel):
    """A base model with a mixture of LoRA experts in its target modules; :meth:`extra_loss` is added to the loss."""

    tuner_layer_cls = MixtureLinear

    def extra_loss(self, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """The weighted balance losses of all layers, summed as in the released code; None where there are none."""
        losses = [loss for layer in self.expert_layers() for loss in layer.balance_losses(attention_mask)]
        return torch.stack(losses).sum() if losses else None


@baseline("loramoe", MixtureModel)
@dataclass
class LoraMoeConfig(BalancedMixtureConfig):
    """LoRAMoE (arXiv 2312.09979): a dense mixture of LoRA experts, routed by token in each layer."""

    method: ClassVar[str] = "BADIT_LORAMOE"

    def imbalance(self, logits_LK: torch.Tensor) -> torch.Tensor:
        """Var(Z) / mean(Z)² over the experts (population variance), Z_k the sum of expert k's gates over the positions.

        The paper multiplies Z by 1 ± δ for rows of world knowledge and others: here δ = 0.
        """
        z_K = self.gates(logits_LK).sum(dim=0)
        return z_K.var(correction=0) / z_K.mean().square()


@baseline("hydralora", MixtureModel)
@dataclass
class HydraLoraConfig(MixtureConfig):
    """HydraLoRA (arXiv 2404.19245): several B's over one shared A, routed by token in each layer."""

    method: ClassVar[str] = "BADIT_HYDRALORA"
    shares_A: ClassVar[bool] = True

    num_experts: int = option(4, "Number of B's.", COUNT)
    r: int = option(4, "Rank of A and of every B.", COUNT)
