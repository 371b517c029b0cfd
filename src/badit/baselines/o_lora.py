"""O-LoRA: each task's branch in a subspace orthogonal to the earlier ones' (Wang et al. 2023, "Orthogonal Subspace
Learning for Language Model Continual Learning", arXiv 2310.14152).

    y = W x + s · Σ_{i≤t} B_i A_i x,        loss + λ1 · Σ_{i<t} Σ |A_i A_tᵀ|

From the paper: the branches and λ1 = 0.5. The paper's equation squares the entries of A_i A_tᵀ; its authors' code sums
their absolute values, as here. Left out: the authors' second penalty, on the norms of A_t and B_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from badit.baselines import baseline
from badit.baselines.branches import BranchConfig, BranchModel
from badit.tuner.config import NOT_NEGATIVE, option


@baseline("o-lora", BranchModel)
@dataclass
class OLoraConfig(BranchConfig):
    """O-LoRA (arXiv 2310.14152): one LoRA branch per task, orthogonal to those before it."""

    method: ClassVar[str] = "BADIT_O_LORA"

    orthogonality_weight: float = option(0.5, "Weight of the penalty, λ1; 0 leaves it out.", NOT_NEGATIVE)

    def penalty(self, past_A_PI: torch.Tensor, a_RI: torch.Tensor) -> torch.Tensor | None:
        """λ1 · Σ_{i<t} Σ |A_i A_tᵀ| of one layer."""
        if not self.past_branches or not self.orthogonality_weight:
            return None
        return self.orthogonality_weight * (past_A_PI @ a_RI.T).abs().sum()
