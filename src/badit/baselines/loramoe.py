"""LoRAMoE: every token mixes all experts (Dou et al. 2024, "LoRAMoE: Alleviate World Knowledge Forgetting in Large
Language Models via MoE-Style Plugin", arXiv 2312.09979).

    y = W x + s · Σ_k softmax(W_g x)_k B_k A_k x

A_k and W_g start as LoRA's A does, B_k at zero. Defaults: 8 experts of rank 4, alpha 32. The balance loss is off unless
it is given a weight, as in the authors' own default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from badit.baselines import baseline
from badit.baselines.mixture import BalancedMixtureConfig, MixtureModel


@baseline("loramoe", MixtureModel)
@dataclass
class LoraMoeConfig(BalancedMixtureConfig):
    """LoRAMoE (arXiv 2312.09979): a dense mixture of LoRA experts, routed by token in each layer."""

    method: ClassVar[str] = "BADIT_LORAMOE"

    def imbalance(self, logits_LK: torch.Tensor) -> torch.Tensor:
        """Var(Z) / mean(Z)² over the experts, with Z_k the sum of expert k's gates over the batch's attended positions.

        The population's variance. The paper multiplies Z by 1 ± δ according to the kind of task that a row is of
        (world knowledge or other), which a mixture of tasks at large does not say: here δ = 0.
        """
        z_K = self.gates(logits_LK).sum(dim=0)
        return z_K.var(correction=0) / z_K.mean().square()
