"""GOAT: sparse experts, each from its own stretch of the weight's spectrum (Fan et al. 2025, "Make LoRA Great Again:
Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts Optimization Alignment", arXiv 2502.16894).

    y = (W − s/K · Σ_k B0_k A0_k) x + s · Σ_k g_k(x) B_k A_k x,      g = softmax over the top 2 of W_g x, 0 elsewhere

The whole spectrum of W is cut into K chunks, and expert k starts from the first r/K directions of the k-th:
B0_k = U √(Σ/(sρ)), A0_k = √(Σ/(sρ)) Vᵀ. Here r is the total rank and s = lora_alpha / r.

With P_k the part of W that expert k starts from, the model at step 0 adds (1/ρ) · Σ_k (g_k − 1/K) P_k to W: nothing on
average over evenly used experts, for a single token at most a norm of (1 − 1/K) σ₁/ρ, under a tenth of W's own norm σ₁.

From the paper: the equations, K 8, top 2, ρ 10, weight of the balance loss 1e-3. Assumptions: the router starts as
LoRA's A does; r 32 makes experts of rank 4 and alpha 256 keeps s = 8, both as LoRAMoE's here; the balance loss is that
of Switch Transformers with both choices of a token counted, summed over layers, as in the released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from badit.baselines import baseline
from badit.baselines.mixture import BalancedMixtureConfig, MixtureModel
from badit.errors import BaditError
from badit.method import SingularTriples, expert_factors, expert_gates, top_singular_triples
from badit.tuner.config import COUNT, NOT_NEGATIVE, POSITIVE, option


@baseline("goat", MixtureModel)
@dataclass
class GoatConfig(BalancedMixtureConfig):
    """GOAT (arXiv 2502.16894): a sparse mixture of LoRA experts that start from stretches of the weight's spectrum."""

    method: ClassVar[str] = "BADIT_GOAT"

    r: int = option(32, "Total rank; one expert's is r / num_experts.", COUNT)
    lora_alpha: float = option(256, "LoRA's alpha; the scaling is lora_alpha / r.", POSITIVE)
    top_k: int = option(2, "Number of experts that a token uses.")
    rho: float = option(10.0, "The experts start with 1/rho of their part of the weight.", POSITIVE)
    balance_weight: float = option(1e-3, "Weight of the balance loss; 0 leaves it out.", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.num_experts:
            raise BaditError(
                f"r = {self.r} must be a multiple of num_experts = {self.num_experts}: it is GOAT's total rank"
            )
        self._check_top_k(self.top_k)

    @property
    def num_components(self) -> int:
        return self.r

    @property
    def subtracted_share(self) -> float:
        return 1 / self.num_experts

    def gates(self, logits_K: torch.Tensor) -> torch.Tensor:
        return expert_gates(logits_K, kind="softmax", top_k=self.top_k)

    def initial_factors(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rank, chunk = self.r // self.num_experts, min(weight_OI.shape) // self.num_experts
        if rank > chunk:
            raise BaditError(
                f"a weight of shape {tuple(weight_OI.shape)} has {chunk} directions for each of {self.num_experts} "
                f"experts, too few for r = {self.r}: at most r = {chunk * self.num_experts}"
            )
        u, s, vh = top_singular_triples(weight_OI, min(weight_OI.shape), method="exact")
        chosen_N = [k * chunk + i for k in range(self.num_experts) for i in range(rank)]
        return expert_factors(SingularTriples(u[:, chosen_N], s[chosen_N], vh[chosen_N]), self.scaling * self.rho)

    def imbalance(self, logits_LK: torch.Tensor) -> torch.Tensor:
        """K · Σ_k f_k p_k: f_k is the share of positions that choose expert k, p_k the mean of the full softmax."""
        f_K = (self.gates(logits_LK) > 0).float().mean(dim=0)
        return self.num_experts * (f_K * logits_LK.softmax(dim=-1).mean(dim=0)).sum()
