"""HydraLoRA: one A for all, a B for each expert (Tian et al. 2024, "HydraLoRA: An Asymmetric LoRA Architecture for
Efficient Fine-Tuning", arXiv 2404.19245).

    y = W x + s · Σ_k softmax(W_g x)_k B_k A x

The gates are per token and dense. A and W_g start as LoRA's A does, B_k at zero. Defaults: 4 B's, rank 4, alpha 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from badit.baselines import baseline
from badit.baselines.mixture import MixtureConfig, MixtureModel
from badit.tuner.config import COUNT, option


@baseline("hydralora", MixtureModel)
@dataclass
class HydraLoraConfig(MixtureConfig):
    """HydraLoRA (arXiv 2404.19245): several B's over one shared A, routed by token in each layer."""

    method: ClassVar[str] = "BADIT_HYDRALORA"
    shares_A: ClassVar[bool] = True

    num_experts: int = option(4, "Number of B's.", COUNT)
    r: int = option(4, "Rank of A and of every B.", COUNT)
