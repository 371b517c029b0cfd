"""SAPT's shared attention over the tasks' branches (Zhao et al. 2024, "SAPT: A Shared Attention Framework for
Parameter-Efficient Continual Learning of Large Language Models", arXiv 2401.08295).

    y = W x + s · Σ_{i≤t} a_i B_i A_i x,    a = softmax_i(q · k_i / √d),    q = LayerNorm(SiLU(W2 W1 p0))

p0 is the mean of the token embeddings over the prompt; a is the same in all layers. The branches and keys of earlier
tasks are frozen, the query's network is trained on in every task, and so a changes for earlier tasks, too. A new key
takes the share a_t from all the others alike: next_task() scales what the adapter adds by 1 − a_t.

From the paper: the attention, √d, hidden size 100. From its authors' code for LLaMA: the order of W1, W2, SiLU and
layer norm, and the keys' start, uniform in (−1, 1). Assumption: p0 is a mean, where that code takes the maximum over
the tokens. Left out: the replay of generated pseudo-samples that keeps a in place on earlier tasks (the paper's
attentive reflection), for which this is not SAPT in full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from badit.baselines import baseline
from badit.baselines.branches import BranchGate, BranchModel, GatedBranchConfig


class SaptGate(BranchGate):
    """Attention of the prompt's query to the keys; ``norm_weight`` (D) and ``norm_bias`` (D) are trained, too."""

    def __init__(self, width: int, config: GatedBranchConfig, device: torch.device) -> None:
        super().__init__(width, config, device)
        self.norm_weight = nn.Parameter(torch.ones(width, device=device))
        self.norm_bias = nn.Parameter(torch.zeros(width, device=device))
        self.start_key()

    def forward(self, prompt_BD: torch.Tensor) -> torch.Tensor:
        silu_BD = F.silu(prompt_BD @ self.down.T @ self.up.T)
        query_BD = F.layer_norm(silu_BD, self.key.shape, self.norm_weight, self.norm_bias)
        return (query_BD @ self.keys_KD.T / math.sqrt(len(self.key))).softmax(dim=-1)

    def start_key(self) -> None:
        nn.init.uniform_(self.key, -1, 1)


@baseline("sapt", BranchModel)
@dataclass
class SaptConfig(GatedBranchConfig):
    """SAPT (arXiv 2401.08295) without its replay: one LoRA branch per task, mixed by attention of prompts to keys."""

    method: ClassVar[str] = "BADIT_SAPT"
    gate_cls: ClassVar[Any] = SaptGate
