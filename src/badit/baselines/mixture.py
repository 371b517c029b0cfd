"""Mixtures of LoRA experts, weighted by a softmax at every position: LoRAMoE, HydraLoRA and GOAT.

    y = W x + s · (Σ_k g_k(x) B_k A_k x − share · B0 A0 x),      g = softmax(W_g x)

* LoRAMoE (Dou et al. 2024, "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models
  via MoE-Style Plugin", arXiv 2312.09979): every expert has its own A_k. Its balance loss is off by
  default, as in the authors' code.
* HydraLoRA (Tian et al. 2024, "HydraLoRA: An Asymmetric LoRA Architecture for Efficient
  Fine-Tuning", arXiv 2404.19245): all experts share one A.
* GOAT (Fan et al. 2025, "Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and
  Mixture-of-Experts Optimization Alignment", arXiv 2502.16894): only the top 2 of W_g x, and share
  = 1/K. The spectrum of W is cut into K chunks, and expert k starts from the first r/K directions
  of chunk k: B0_k = U √(Σ/(sρ)), A0_k = √(Σ/(sρ)) Vᵀ. Here r is the total rank and s = lora_alpha /
  r.

The other two initialise A as LoRA does and B_k with zeros; all three initialise W_g like LoRA's A.
At step 0, GOAT's model adds (1/ρ) · Σ_k (g_k − 1/K) P_k to W, where P_k is the part of W from which
expert k starts. This is zero on average over evenly used experts. For a single token its norm is at
most (1 − 1/K) σ₁/ρ, below a tenth of W's norm σ₁. Dropout acts only on the change of B_k A_k since
step 0.

GOAT's balance loss is that of Switch Transformers with both choices of a token counted, summed over
layers, as in the released code. Assumptions: the router's initialisation; r 32 (experts of rank 4)
and alpha 256, as in LoRAMoE here.

Shape suffixes: K = experts, I/O = in/out features, N = components, L = the attended positions of a
batch.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badit.baselines import baseline
from badit.method import SingularTriples, expert_factors, expert_gates, top_singular_triples
from badit.support.errors import BaditError
from badit.tuner.config import Count, ExpertConfig, NotNegative, Positive, option
from badit.tuner.context import inside_backward
from badit.tuner.layer import ExpertLinear
from badit.tuner.model import ExpertModel


@dataclass
class MixtureConfig(ExpertConfig):
    """Experts weighted by a softmax at every position in every adapted layer."""

    balance_weight = 0.0  # methods with a balance loss (`imbalance`) override it with an option

    def gates(self, logits: Tensor) -> Tensor:
        """Returns the experts' gates (…, K), with sum 1, from the router's logits (…, K)."""
        return expert_gates(logits, kind="softmax", top_k=self.top_k)


class MixtureLinear(ExpertLinear):
    """A layer that routes each position.

    It trains badit_router (K, I), and stores its logits of the last training pass for the balance
    loss.
    """

    adapter_layer_names = (*ExpertLinear.adapter_layer_names, "badit_router")

    badit_router: nn.ParameterDict

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.router_logits: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"router_logits": {}}  # for copies of the model

    def update_layer(self, adapter_name: str, config: MixtureConfig) -> None:
        router_KI = torch.zeros(config.num_experts, self.in_features)
        self.badit_router[adapter_name] = nn.Parameter(router_KI)
        super().update_layer(adapter_name, config)

    @torch.no_grad()
    def initialise(self, adapter_name: str) -> None:
        super().initialise(adapter_name)
        # Uniform within ±1/√I, as LoRA's A.
        nn.init.kaiming_uniform_(self.badit_router[adapter_name], a=math.sqrt(5))

    def gates(self, adapter_name: str, x: Tensor) -> Tensor:
        config = self.badit_config[adapter_name]
        logits = F.linear(x, self.badit_router[adapter_name]).float()
        # A balance loss is added to the loss once per pass. Gradient checkpointing recomputes the
        # layer in the backward pass, after the loss.
        is_training_pass = self.training and torch.is_grad_enabled() and not inside_backward()
        if config.balance_weight and is_training_pass:
            self.router_logits[adapter_name] = logits
        return config.gates(logits)

    def take_logits(self, adapter_name: str, attention_mask: Tensor) -> Tensor:
        """Removes and returns the logits (L, K) of the last training pass at attended positions."""
        # Removed, so that a later loss cannot use the logits of an earlier pass.
        logits = self.router_logits.pop(adapter_name, None)
        if logits is None:
            raise BaditError(
                f"{self.name}: has seen no training pass, so there is no balance loss; with "
                "gradient checkpointing set use_reentrant=False, or set balance_weight=0"
            )
        logits_LK = logits.flatten(0, -2)
        if len(logits_LK) != attention_mask.numel():
            raise BaditError(
                f"{self.name}: sees {len(logits_LK)} positions, but the batch has "
                f"{attention_mask.numel()}; exclude it from the targets, or set balance_weight=0"
            )
        return logits_LK[attention_mask.flatten().bool().to(logits_LK.device)]


class MixtureModel(ExpertModel):
    """A base model with a mixture of LoRA experts in its target modules."""

    tuner_layer_cls = MixtureLinear

    def extra_loss(self, attention_mask: Tensor) -> Tensor | None:
        """Returns the last training pass's weighted balance loss, summed over layers."""
        losses = []
        for layer in self.expert_layers():
            for adapter_name in layer.running_adapters:
                config = self.peft_config[adapter_name]
                if config.balance_weight:
                    logits_LK = layer.take_logits(adapter_name, attention_mask)
                    # Layers of a model with a device map are on several devices.
                    loss = config.imbalance(logits_LK).to(attention_mask.device)
                    losses.append(loss * config.balance_weight)
        return torch.stack(losses).sum() if losses else None


@baseline("loramoe", MixtureModel)
@dataclass
class LoraMoeConfig(MixtureConfig):
    """LoRAMoE (arXiv 2312.09979): a dense mixture of LoRA experts, routed by token."""

    method: ClassVar[str] = "BADIT_LORAMOE"

    balance_weight: NotNegative = option(0.0, "Weight of the balance loss; 0 disables it.")

    def imbalance(self, logits_LK: Tensor) -> Tensor:
        """Returns Var(Z) / mean(Z)² (population variance).

        Z_k is the sum of expert k's gates over the positions. The paper multiplies Z by 1 ± δ,
        depending on whether a row is about world knowledge; here δ = 0.
        """
        z_K = self.gates(logits_LK).sum(dim=0)
        return z_K.var(correction=0) / z_K.mean().square()


@baseline("hydralora", MixtureModel)
@dataclass
class HydraLoraConfig(MixtureConfig):
    """HydraLoRA (arXiv 2404.19245): several B's and one shared A, routed by token."""

    method: ClassVar[str] = "BADIT_HYDRALORA"
    shares_A: ClassVar[bool] = True

    num_experts: Count = option(4, "Number of B's.")
    r: Count = option(4, "Rank of A and of each B.")


@baseline("goat", MixtureModel)
@dataclass
class GoatConfig(MixtureConfig):
    """GOAT (arXiv 2502.16894): a sparse mixture of experts from parts of the weight's spectrum."""

    method: ClassVar[str] = "BADIT_GOAT"

    r: Count = option(32, "Total rank; each expert has rank r / num_experts.")
    lora_alpha: Positive = option(256, "LoRA's alpha; the scaling is lora_alpha / r.")
    top_k: int = option(2, "Number of experts per token.")
    rho: Positive = option(
        10.0, "The experts are initialised with 1/rho of their part of the weight."
    )
    balance_weight: NotNegative = option(1e-3, "Weight of the balance loss; 0 disables it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.num_experts:
            raise BaditError(
                f"r = {self.r}, GOAT's total rank, must be a multiple of num_experts = "
                f"{self.num_experts}"
            )

    @property
    def num_components(self) -> int:
        return self.r

    @property
    def subtracted_share(self) -> float:
        # The mean of the K gates, which have sum 1.
        return 1 / self.num_experts

    def initial_factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        directions = min(weight_OI.shape)
        rank = self.r // self.num_experts
        chunk = directions // self.num_experts
        if rank > chunk:
            raise BaditError(
                f"a weight of shape {tuple(weight_OI.shape)} has {chunk} directions for each of "
                f"{self.num_experts} experts, too few for r = {self.r}; use at most r = "
                f"{chunk * self.num_experts}"
            )
        # The whole spectrum, because its last chunk has the smallest singular values.
        u, s, vh = top_singular_triples(weight_OI, directions, method="exact")
        # The first `rank` directions of each of the spectrum's chunks.
        chosen_N = [k * chunk + i for k in range(self.num_experts) for i in range(rank)]
        triples = SingularTriples(u[:, chosen_N], s[chosen_N], vh[chosen_N])
        # B0 A0 = part / (s ρ), so s · B0 A0 is 1/ρ of the experts' part of the weight.
        return expert_factors(triples, self.scaling * self.rho)

    def imbalance(self, logits_LK: Tensor) -> Tensor:
        """Returns K · Σ_k f_k p_k.

        f_k is the share of positions that choose expert k, p_k its mean softmax value.
        """
        # Experts that are not chosen have a gate of exactly 0. Only p has a gradient.
        f_K = (self.gates(logits_LK) > 0).float().mean(dim=0)
        p_K = logits_LK.softmax(dim=-1).mean(dim=0)
        return self.num_experts * (f_K * p_K).sum()
