"""Sequential learning with one LoRA branch per task: O-LoRA, SAPT and what GainLoRA shares with them.

    y = W x + s · Σ_{i≤t} a_i(p0) B_i A_i x        branches i < t frozen, branch t trained

All branches are one wide product (:mod:`badit.tuner.layer`), the frozen ones in buffers before the trained one. The
weights a_i are 1, or those of one gate for all layers: a hook on the token embeddings computes them for each pass from
p0, their mean over the prompt.

* O-LoRA (Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", arXiv 2310.14152):
  a_i = 1, and λ1 · Σ_{i<t} Σ |A_i A_tᵀ| is added to the loss. From the paper: the branches and λ1 = 0.5. The paper's
  equation squares the entries of A_i A_tᵀ; its authors' code sums their absolute values, as here. Left out: the
  authors' second penalty, on the norms of A_t and B_t.
* SAPT's shared attention (Zhao et al. 2024, "SAPT: A Shared Attention Framework for Parameter-Efficient Continual
  Learning of Large Language Models", arXiv 2401.08295): a = softmax_i(q · k_i / √d), q = LayerNorm(SiLU(W2 W1 p0)).
  The keys of earlier tasks are frozen; W1, W2 and the layer norm are trained in every task, and so a changes for
  earlier tasks, too. A new key takes the share a_t from all the others alike: next_task() scales what the adapter adds
  by 1 − a_t. From the paper: the attention, √d, hidden size 100. From its authors' code for LLaMA: the order of W1, W2,
  SiLU and layer norm, and the keys' start, uniform in (−1, 1). Assumption: p0 is a mean, where that code takes the
  maximum over the tokens. Left out: the replay of generated pseudo-samples that keeps a in place on earlier tasks (the
  paper's attentive reflection), for which this is not SAPT in full.

Shape suffixes: B = batch, T = positions, N = prompts, D = width of the token embeddings, K = branches,
I/O = in/out features, R = rank of a branch, P = (K − 1)·R, the rank of the frozen branches together.
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
from badit.method import prompt_mean
from badit.tuner.config import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, ExpertConfig, option
from badit.tuner.layer import Buffers, ExpertLinear, Pair
from badit.tuner.model import ExpertModel
from badit.tuner.prompt import RoutingContext


@dataclass
class BranchConfig(ExpertConfig):
    """One trained LoRA branch and the frozen ones of the tasks before, each of rank ``r``."""

    needs_whole_weights: ClassVar[bool] = True
    gate_cls: ClassVar[type[BranchGate] | None] = None  # None: every branch has the weight 1

    #: One is trained at a time; no option.
    num_experts: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    past_branches: int = option(0, "Number of frozen branches; next_task() adds to it.", COUNT_OR_ZERO)

    @property
    def has_fixed_gates(self) -> bool:
        return self.gate_cls is None


@dataclass
class GatedBranchConfig(BranchConfig):
    """Branches weighed by a small network that reads the prompt."""

    gate_hidden_size: int = option(100, "Hidden size of the gate's network.", COUNT)


class BranchGate(nn.Module):
    """The weights of one adapter's branches, from p0, the mean of the token embeddings over the prompt.

    ``down`` (H, D) and ``up`` (D, H), a network with the hidden size H, and the current task's ``key`` (D) are trained;
    ``past_keys`` (K − 1, D) are frozen. All lie flat: PEFT looks for the adapter's name right before a tensor's. A
    method's ``forward`` gives the weights (B, K), the current branch's last.
    """

    past_keys: torch.Tensor

    def __init__(self, width: int, config: GatedBranchConfig, device: torch.device) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(width, device=device))
        self.down = nn.Parameter(torch.empty(config.gate_hidden_size, width, device=device))
        self.up = nn.Parameter(torch.empty(width, config.gate_hidden_size, device=device))
        self.register_buffer("past_keys", torch.zeros(config.past_branches, width, device=device))
        for weight in (self.down, self.up):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    @property
    def keys_KD(self) -> torch.Tensor:
        return torch.cat([self.past_keys, self.key[None]])

    def start_key(self) -> None:
        """Fills the current key."""
        raise NotImplementedError

    def next_task(self) -> None:
        """Freezes what is the current task's own and starts it again."""
        self.past_keys = self.keys_KD.detach()
        self.start_key()


class BranchLinear(ExpertLinear):
    """badit_A (R, I), badit_B (O, R) are trained; badit_A_past (P, I), badit_B_past (O, P) are saved buffers."""

    adapter_layer_names = ("badit_A", "badit_B")
    other_param_names = (*ExpertLinear.other_param_names, "badit_A_past", "badit_B_past")

    badit_A_past: Buffers
    badit_B_past: Buffers

    def update_layer(self, adapter_name: str, config: BranchConfig, inference_mode: bool = False) -> None:
        """Adds an adapter: room for its frozen branches, whose values are loaded, and a new current one."""
        past_rank = config.past_branches * config.r
        self.badit_A_past[adapter_name] = torch.zeros(past_rank, self.in_features)
        self.badit_B_past[adapter_name] = torch.zeros(self.out_features, past_rank)
        super().update_layer(adapter_name, config, inference_mode)

    def expert_of(self, adapter_name: str) -> torch.Tensor:
        """The branch that every component belongs to, the frozen ones' first."""
        config: BranchConfig = self.badit_config[adapter_name]
        return torch.arange(config.past_branches + 1, device=self.device).repeat_interleave(config.r)

    @torch.no_grad()
    def next_task(self, adapter_name: str) -> None:
        """Freezes the current branch after the earlier ones and starts it again, as LoRA starts."""
        self.badit_A_past[adapter_name], self.badit_B_past[adapter_name] = self.factors(adapter_name)
        self.badit_B[adapter_name].zero_()
        self.initialise(adapter_name)

    def factors(self, adapter_name: str) -> Pair:
        a_RI, b_OR = super().factors(adapter_name)
        past_A_PI, past_B_OP = self.badit_A_past[adapter_name], self.badit_B_past[adapter_name]
        return torch.cat([past_A_PI, a_RI]), torch.cat([past_B_OP, b_OR], dim=1)

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """a (B, 1, K) of the running pass: new from its prompt, or held by the cache since the prompt's pass."""
        config: BranchConfig = self.badit_config[adapter_name]
        if config.gate_cls is None:
            return torch.ones(config.past_branches + 1, device=x.device)
        forward_pass = self.routing.forward_pass()
        weights_BK = (forward_pass.fresh if forward_pass.held is None else forward_pass.held).get(adapter_name)
        if weights_BK is None or x.ndim != 3 or len(x) != len(weights_BK):
            raise BaditError(
                f"{self.name} finds no gates for an input of shape {tuple(x.shape)}, since they follow the prompt's "
                "tokens: call the whole model, with input_ids (not inputs_embeds), decode from a cache filled with the "
                "adapter active and as many rows, or leave the layer out of target_modules"
            )
        if forward_pass.held is None and weights_BK.requires_grad and not torch.is_grad_enabled():
            raise BaditError("gradient checkpointing would cut the gates off from the loss: set use_reentrant=False")
        return weights_BK.to(x.device)[:, None]


class BranchModel(ExpertModel):
    """A base model with LoRA branches in its target modules and, next to it, every adapter's gate."""

    tuner_layer_cls = BranchLinear
    routes_prompts = True

    badit_gate: Any  # a ModuleDict of every adapter's BranchGate

    def _pre_injection_hook(self, model: nn.Module, config: BranchConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.badit_gate = nn.ModuleDict()
        self._embedding_hook: Any = None

    def _refuse_unsuitable(self, config: BranchConfig) -> None:
        unsuitable = self._is_encoder_decoder() or not hasattr(self.model, "get_input_embeddings")
        if config.gate_cls is not None and unsuitable:
            raise BaditError(f"{config.method} is for decoder-only language models: its gates follow the prompt")

    def _create_and_replace(self, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if peft_config.gate_cls is not None and adapter_name not in self.badit_gate:
            embeddings = self.model.get_input_embeddings()
            width, device = embeddings.weight.shape[1], embeddings.weight.device
            self.badit_gate[adapter_name] = peft_config.gate_cls(width, peft_config, device)
            if self._embedding_hook is None:
                self._embedding_hook = embeddings.register_forward_hook(self._weigh)
        super()._create_and_replace(peft_config, adapter_name, *args, **kwargs)

    def _weigh(self, embeddings: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """Computes the weights of a pass; in a layer, checkpointing would compute them again in the backward pass."""
        forward_pass = RoutingContext.of(self.model).forward_pass()
        if forward_pass.held is not None:
            return
        for adapter_name in {name for layer in self.expert_layers() for name in layer.running_adapters}:
            if (mask_BT := forward_pass.prompt_mask_BT) is not None:
                gate = self.badit_gate[adapter_name]
                forward_pass.fresh[adapter_name] = gate(mean_embedding(output, mask_BT).to(gate.key.dtype))

    def _active_gates(self) -> list[Any]:
        return [self.badit_gate[name] for name in self.active_adapters if name in self.badit_gate]

    @torch.no_grad()
    def next_task(self) -> None:
        """Freezes the active adapters' current branches, and gates, and starts new ones in the same parameters."""
        for gate in self._active_gates():
            gate.next_task()
        for adapter_name in self.active_adapters:
            for layer in self.expert_layers():
                if adapter_name in layer.badit_A:
                    layer.next_task(adapter_name)
            self.peft_config[adapter_name].past_branches += 1

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._train_gates_with_layers()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._train_gates_with_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.badit_gate:
            del self.badit_gate[adapter_name]
        self._train_gates_with_layers()

    def _train_gates_with_layers(self) -> None:
        trained = {name for layer in self.expert_layers() for name, a_RI in layer.badit_A.items() if a_RI.requires_grad}
        for name, gate in self.badit_gate.items():
            gate.requires_grad_(name in trained)

    def unload(self) -> nn.Module:
        if self._embedding_hook is not None:
            self._embedding_hook.remove()
        return super().unload()


def mean_embedding(embeddings_BTD: torch.Tensor, prompt_mask_BT: torch.Tensor) -> torch.Tensor:
    """p0 (B, D) in full precision and without a gradient: the gate trains, the embeddings do not."""
    dtype = torch.promote_types(embeddings_BTD.dtype, torch.float32)
    return prompt_mean(embeddings_BTD.detach().to(dtype), prompt_mask_BT.to(embeddings_BTD.device))


class OLoraModel(BranchModel):
    """Branches with a penalty on what a new one shares with the earlier ones."""

    def extra_loss(self, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """λ1 · Σ_{i<t} Σ |A_i A_tᵀ|, summed over the adapted layers; None where there are no earlier branches."""
        penalties = []
        for layer in self.expert_layers():
            for name in layer.running_adapters:
                config = self.peft_config[name]
                if config.past_branches and config.orthogonality_weight:
                    overlap = (layer.badit_A_past[name] @ layer.badit_A[name].T).abs().sum()
                    penalties.append((config.orthogonality_weight * overlap).to(attention_mask.device))
        return torch.stack(penalties).sum() if penalties else None


@baseline("o-lora", OLoraModel)
@dataclass
class OLoraConfig(BranchConfig):
    """O-LoRA (arXiv 2310.14152): one LoRA branch per task, orthogonal to those before it."""

    method: ClassVar[str] = "BADIT_O_LORA"

    orthogonality_weight: float = option(0.5, "Weight of the penalty, λ1; 0 leaves it out.", NOT_NEGATIVE)


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
