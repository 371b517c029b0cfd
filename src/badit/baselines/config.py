"""What mixtures of LoRA experts differ in. Each rival answers in a file of its own, with its source."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from badit.errors import BaditError
from badit.method import expert_gates
from badit.tuner.base_config import ExpertConfig, is_number


@dataclass
class MixtureConfig(ExpertConfig):
    """Experts mixed by a softmax at every position and in every adapted layer, all of them.

    Shape suffixes: I/O = in/out features, N = components, K = experts, L = the attended positions of a batch.
    """

    def gates(self, logits_K: torch.Tensor) -> torch.Tensor:
        """The experts' gates (…, K) from the router's logits, with sum 1."""
        return expert_gates(logits_K, kind="softmax")

    def initial_factors(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A (N, I) and B (O, N) at step 0, for a rival that ``decomposes``."""
        raise NotImplementedError


@dataclass
class BalancedMixtureConfig(MixtureConfig):
    """A mixture whose loss has a term that keeps its experts in use."""

    balance_weight: float = field(default=0.0, metadata={"help": "Weight of the balance loss; 0 leaves it out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.balance_weight) or self.balance_weight < 0:
            raise BaditError(f"balance_weight must be a number of at least 0, got {self.balance_weight!r}")

    def imbalance(self, logits_LK: torch.Tensor) -> torch.Tensor:
        """A scalar that is least where all experts are used alike."""
        raise NotImplementedError
