"""What the methods of :mod:`badit.baselines.branches` differ in: a penalty on the branches, or a gate that weighs them.

Shape suffixes: B = batch, N = prompts, D = width of the token embeddings, K = branches, I = in features,
R = rank of a branch, P = (K − 1)·R, the rank of the frozen branches together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from badit.errors import BaditError
from badit.tuner.base_config import ExpertConfig, is_int


@dataclass
class BranchConfig(ExpertConfig):
    """One trained LoRA branch and the frozen ones of the tasks before, each of rank ``r``."""

    gate_cls: ClassVar[type[BranchGate] | None] = None  # None: every branch has the weight 1

    num_experts: int = field(default=1, init=False)  # trained at a time
    past_branches: int = field(default=0, metadata={"help": "Number of frozen branches; next_task() adds to it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.past_branches) or self.past_branches < 0:
            raise BaditError(f"past_branches must be a whole number of at least 0, got {self.past_branches!r}")

    def to_dict(self) -> dict[str, Any]:
        """What is saved: all but ``num_experts``, which is no option here, so that loading would refuse it."""
        return {name: value for name, value in super().to_dict().items() if name != "num_experts"}

    @property
    def num_branches(self) -> int:
        """K, the current branch among them."""
        return self.past_branches + 1

    @property
    def routes_in_layer(self) -> bool:
        return False

    @property
    def has_fixed_gates(self) -> bool:
        return self.gate_cls is None

    def penalty(self, past_A_PI: torch.Tensor, a_RI: torch.Tensor) -> torch.Tensor | None:
        """What one layer adds to the loss: a scalar, or nothing."""
        return None


@dataclass
class GatedBranchConfig(BranchConfig):
    """Branches weighed by a small network that reads the prompt."""

    gate_hidden_size: int = field(default=100, metadata={"help": "Hidden size of the gate's network."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.gate_hidden_size) or self.gate_hidden_size < 1:
            raise BaditError(f"gate_hidden_size must be a whole number of at least 1, got {self.gate_hidden_size!r}")


class BranchGate(nn.Module):
    """The weights of one adapter's branches, from p0, the mean of the token embeddings over the prompt.

    ``key`` (D) is the current task's and trained, ``past_keys`` (K − 1, D) are the earlier tasks' and frozen. All
    tensors lie flat in the module: PEFT looks for the adapter's name right before a tensor's.
    """

    past_keys: torch.Tensor

    def __init__(self, width: int, config: GatedBranchConfig, device: torch.device) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(width, device=device))
        self.register_buffer("past_keys", torch.zeros(config.past_branches, width, device=device))

    @property
    def keys_KD(self) -> torch.Tensor:
        return torch.cat([self.past_keys, self.key[None]])

    def forward(self, prompt_BD: torch.Tensor) -> torch.Tensor:
        """The weights (B, K), the current branch's last."""
        raise NotImplementedError

    def next_task(self) -> None:
        """Freezes what is the current task's own and starts it anew."""
        self.past_keys = self.keys_KD.detach()
        self.start_key()

    def start_key(self) -> None:
        """Fills the current key."""
        raise NotImplementedError

    def start_task(self, prompt_ND: torch.Tensor) -> None:
        """Sets itself up for a task, from p0 of its N training prompts, before it is trained."""

    def end_task(self, prompt_ND: torch.Tensor) -> None:
        """Keeps what it needs to know of the task, from p0 of the task's N training prompts."""

    def before_update(self) -> None:
        """Is called before every step of the optimiser."""

    def after_update(self) -> None:
        """Is called after every step of the optimiser."""
