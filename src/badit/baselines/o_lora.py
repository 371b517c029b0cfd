"""O-LoRA: each task's branch in a subspace orthogonal to the earlier ones' (Wang et al. 2023, "Orthogonal Subspace
Learning for Language Model Continual Learning", arXiv 2310.14152).

    y = W x + s · Σ_{i≤t} B_i A_i x,        loss + λ1 · Σ_{i<t} Σ |A_i A_tᵀ|

From the paper: the branches and λ1 = 0.5. The paper's equation squares the entries of A_i A_tᵀ, its authors' code sums
their absolute values, and so does this. Left out: the authors' second penalty, on the norms of A_t and B_t.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from badit.baselines import baseline
from badit.baselines.branches import BranchConfig, BranchModel
from badit.errors import BaditError
from badit.tuner.config import is_number


@baseline("o-lora", BranchModel)
@dataclass
class OLoraConfig(BranchConfig):
    """O-LoRA (arXiv 2310.14152): one LoRA branch per task, orthogonal to those before it.

    Shape suffixes: I = in features, R = rank of a branch, P = rank of the frozen branches together.
    """

    method: ClassVar[str] = "BADIT_O_LORA"

    orthogonality_weight: float = field(default=0.5, metadata={"help": "Weight of the penalty, λ1; 0 leaves it out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.orthogonality_weight) or self.orthogonality_weight < 0:
            raise BaditError(f"orthogonality_weight must be a number of at least 0, got {self.orthogonality_weight!r}")

    def penalty(self, past_A_PI: torch.Tensor, a_RI: torch.Tensor) -> torch.Tensor | None:
        """λ1 · Σ_{i<t} Σ |A_i A_tᵀ| of one layer."""
        if not self.past_branches or not self.orthogonality_weight:
            return None
        return self.orthogonality_weight * (past_A_PI @ a_RI.T).abs().sum()
