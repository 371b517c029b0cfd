"""Sequential learning with one LoRA branch per task: O-LoRA, SAPT, and what GainLoRA shares.

    y = W x + s · Σ_{i≤t} a_i(p0) B_i A_i x        branches i < t are frozen, branch t is trained

The branches form one pair of factors (:mod:`badit.tuner.layer`): the frozen ones, which are
buffers, then the trained one. The weights a_i are 1, or come from one gate for all layers: a hook
on the token embeddings computes them in each pass from p0, the mean of the embeddings over the
prompt.

* O-LoRA (Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning",
  arXiv 2310.14152): a_i = 1, and λ1 · Σ_{i<t} Σ |A_i A_tᵀ| is added to the loss. From the paper:
  the branches and λ1 = 0.5. The paper's equation squares the entries of A_i A_tᵀ; its authors' code
  sums their absolute values, as here. Omitted: the authors' second penalty, on the norms of A_t and
  B_t.
* SAPT's shared attention (Zhao et al. 2024, "SAPT: A Shared Attention Framework for
  Parameter-Efficient Continual Learning of Large Language Models", arXiv 2401.08295): a =
  softmax_i(q · k_i / √d), q = LayerNorm(SiLU(W2 W1 p0)). The keys of earlier tasks are frozen. W1,
  W2 and the layer norm are trained in every task, so a also changes on earlier tasks. A new key
  multiplies all other weights by 1 − a_t, so next_task() scales the adapter's output by this
  factor. From the paper: the attention, √d, hidden size 100. From its authors' code for LLaMA: the
  order of W1, W2, SiLU and layer norm, and the keys' initialisation, uniform in (−1, 1).
  Assumption: p0 is a mean; that code takes the maximum over the tokens. Omitted, so this is not the
  complete SAPT: the replay of generated pseudo-samples (the paper's attentive reflection), which
  keeps a unchanged on earlier tasks.

Shape suffixes: B = batch, T = positions, N = prompts, D = width of the token embeddings, K =
branches, I/O = in/out features, R = rank of a branch, P = (K − 1)·R, the rank of the frozen
branches together.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badit.baselines import baseline
from badit.method import prompt_mean
from badit.support.errors import BaditError
from badit.tuner.config import Count, CountOrZero, ExpertConfig, NotNegative, option
from badit.tuner.context import RoutingContext
from badit.tuner.layer import Buffers, ExpertLinear, Pair
from badit.tuner.model import ExpertModel


@dataclass
class BranchConfig(ExpertConfig):
    """One trained LoRA branch and the frozen branches of earlier tasks, each of rank ``r``."""

    needs_whole_weights: ClassVar[bool] = True  # next_task() joins tensors
    gate_cls: ClassVar["type[BranchGate] | None"] = None  # None: all branches have weight 1

    #: One branch is trained at a time; not an option.
    num_experts: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    past_branches: CountOrZero = option(
        0, "Number of frozen branches; next_task() increases it by 1."
    )

    @property
    def has_fixed_gates(self) -> bool:
        return self.gate_cls is None


@dataclass
class GatedBranchConfig(BranchConfig):
    """Branches weighted by a small network that reads the prompt."""

    gate_hidden_size: Count = option(100, "Hidden size of the gate's network.")


class BranchGate(nn.Module):
    """Computes the weights of one adapter's branches from p0.

    ``down`` (H, D) and ``up`` (D, H), a network of hidden size H, and the current task's ``key``
    (D) are trained. There are no submodules, because PEFT expects the adapter's name directly
    before the tensor's name. ``forward`` of a subclass returns the weights (B, K), with the current
    branch last.
    """

    #: The tensors of which every task has its own, and the buffers with those of the earlier tasks.
    of_each_task: ClassVar[dict[str, str]] = {"key": "past_keys"}

    def __init__(self, width: int, config: GatedBranchConfig, device: torch.device) -> None:
        super().__init__()
        hidden_size = config.gate_hidden_size
        self.key = nn.Parameter(torch.empty(width, device=device))
        self.down = nn.Parameter(torch.empty(hidden_size, width, device=device))
        self.up = nn.Parameter(torch.empty(width, hidden_size, device=device))
        # Zeros, to be loaded: a new adapter has no earlier tasks.
        for name, past in self.of_each_task.items():
            shape = (config.past_branches, *self.get_parameter(name).shape)
            self.register_buffer(past, torch.zeros(shape, device=device))
        for weight in (self.down, self.up):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def of_all_tasks(self, name: str) -> Tensor:
        """Returns a tensor named in ``of_each_task`` for all tasks, (K, …)."""
        return torch.cat([self.get_buffer(self.of_each_task[name]), self.get_parameter(name)[None]])

    def start_key(self) -> None:
        """Initialises the current task's key, uniformly in (−1, 1)."""
        nn.init.uniform_(self.key, -1, 1)

    def next_task(self) -> None:
        """Appends copies of the current task's tensors to the earlier ones; starts a new key."""
        for name, past in self.of_each_task.items():
            setattr(self, past, self.of_all_tasks(name).detach())
        self.start_key()


class BranchLinear(ExpertLinear):
    """Trains badit_A (R, I) and badit_B (O, R).

    badit_A_past (P, I) and badit_B_past (O, P) are saved buffers.
    """

    other_param_names = (*ExpertLinear.other_param_names, "badit_A_past", "badit_B_past")

    badit_A_past: Buffers
    badit_B_past: Buffers

    def update_layer(self, adapter_name: str, config: BranchConfig) -> None:
        """Adds an adapter: zeros for frozen branches, to be loaded, and a new current branch."""
        past_rank = config.past_branches * config.r
        self.badit_A_past[adapter_name] = torch.zeros(past_rank, self.in_features)
        self.badit_B_past[adapter_name] = torch.zeros(self.out_features, past_rank)
        super().update_layer(adapter_name, config)

    def factors(self, adapter_name: str) -> Pair:
        a_RI, b_OR = super().factors(adapter_name)
        past_A_PI = self.badit_A_past[adapter_name]
        past_B_OP = self.badit_B_past[adapter_name]
        return torch.cat([past_A_PI, a_RI]), torch.cat([past_B_OP, b_OR], dim=1)

    def expert_of(self, adapter_name: str) -> Tensor:
        """Returns the branch of each component, the frozen branches first."""
        config: BranchConfig = self.badit_config[adapter_name]
        branches = torch.arange(config.past_branches + 1, device=self.device)
        return branches.repeat_interleave(config.r)

    @torch.no_grad()
    def next_task(self, adapter_name: str) -> None:
        """Appends a copy of the current branch to the frozen ones and initialises it again."""
        past_A_PI, past_B_OP = self.factors(adapter_name)
        self.badit_A_past[adapter_name] = past_A_PI
        self.badit_B_past[adapter_name] = past_B_OP
        # `initialise` leaves B as it is: zero in a new adapter.
        self.badit_B[adapter_name].zero_()
        self.initialise(adapter_name)

    def gates(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns a (B, 1, K) of this pass or on its cache; ones (K) without a gate."""
        config: BranchConfig = self.badit_config[adapter_name]
        if config.gate_cls is None:
            return torch.ones(config.past_branches + 1, device=x.device)
        forward_pass = self.routing.forward_pass()
        held = forward_pass.held
        weights_BK = (forward_pass.fresh if held is None else held).get(adapter_name)
        if weights_BK is None or x.ndim != 3 or len(x) != len(weights_BK):
            raise BaditError(
                f"{self.name}: there are no gates for an input of shape {tuple(x.shape)}, since "
                "they are computed from the prompt's tokens; call the whole model with input_ids "
                "(not inputs_embeds), decode from a cache filled with the same rows and adapter, "
                "or leave the layer out of target_modules"
            )
        # Reentrant checkpointing first runs a layer without gradients.
        if held is None and weights_BK.requires_grad and not torch.is_grad_enabled():
            raise BaditError(
                "gradient checkpointing: the gates would have no gradient; set use_reentrant=False"
            )
        return weights_BK.to(x.device)[:, None]


class BranchModel(ExpertModel):
    """A base model with LoRA branches in its target modules, and the gates of its adapters."""

    tuner_layer_cls = BranchLinear
    routes_prompts = True

    badit_gate: Any  # a ModuleDict with the BranchGate of each adapter

    # Not in __init__: PEFT's constructor already adds the first adapter, after this hook.
    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.badit_gate = nn.ModuleDict()
        self._embedding_hook: Any = None

    def _refuse_unsuitable(self, config: BranchConfig) -> None:
        if config.gate_cls is None:
            return
        if self._is_encoder_decoder() or not hasattr(self.model, "get_input_embeddings"):
            raise BaditError(
                f"{config.method} is for decoder-only language models; its gates need a prompt"
            )
        embeddings = self.model.get_input_embeddings()
        saved = tuple(config.modules_to_save or ())
        # As PEFT finds them: by the ends of names.
        names = [name for name, module in self.model.named_modules() if module is embeddings]
        if any(name.endswith(saved) for name in names):
            raise BaditError(
                "modules_to_save: remove the embeddings, which the gates of this method read"
            )

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        # PEFT calls this for each layer; the first call creates the gate.
        if peft_config.gate_cls is not None and adapter_name not in self.badit_gate:
            embeddings = self.model.get_input_embeddings()
            width, device = embeddings.weight.shape[1], embeddings.weight.device
            self.badit_gate[adapter_name] = peft_config.gate_cls(width, peft_config, device)
            if self._embedding_hook is None:
                self._embedding_hook = embeddings.register_forward_hook(self._compute_gates)
                # unload() removes these.
                RoutingContext.of(self.model).hooks.append(self._embedding_hook)
        super()._create_and_replace(peft_config, adapter_name, *args, **kwargs)

    def _compute_gates(self, embeddings: nn.Module, args: tuple, output: Tensor) -> None:
        """Computes the weights of a pass.

        Outside of the layers, because gradient checkpointing would recompute them there.
        """
        forward_pass = RoutingContext.of(self.model).forward_pass()
        if forward_pass.held is not None:
            return
        running = {name for layer in self.expert_layers() for name in layer.running_adapters}
        for adapter_name in running:
            mask_BT = forward_pass.prompt_mask_BT
            if mask_BT is not None:  # else the layers raise BaditError
                gate = self.badit_gate[adapter_name]
                prompt_BD = mean_embedding(output, mask_BT).to(gate.key.dtype)
                forward_pass.fresh[adapter_name] = gate(prompt_BD)

    def _active_gates(self) -> list[Any]:
        return [self.badit_gate[name] for name in self.active_adapters if name in self.badit_gate]

    @torch.no_grad()
    def next_task(self) -> None:
        """Freezes copies of the active adapters' branches and gate keys.

        New ones start in the same parameters.
        """
        # Values change and parameters stay, so an optimizer remains valid.
        for gate in self._active_gates():
            gate.next_task()
        for adapter_name in self.active_adapters:
            # A copy, because other models may be started with the caller's object.
            config = copy.copy(self.peft_config[adapter_name])
            config.past_branches += 1
            for layer in self.expert_layers():
                if adapter_name in layer.badit_A:
                    layer.next_task(adapter_name)
                    layer.badit_config[adapter_name] = config
            self.peft_config[adapter_name] = config

    # PEFT sets requires_grad of the layers; the gates follow them.

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._train_gates_with_layers()

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
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
        factors = [item for layer in self.expert_layers() for item in layer.badit_A.items()]
        trained = {name for name, a_RI in factors if a_RI.requires_grad}
        for name, gate in self.badit_gate.items():
            gate.requires_grad_(name in trained)


def mean_embedding(embeddings_BTD: Tensor, prompt_mask_BT: Tensor) -> Tensor:
    """Returns p0 (B, D) in at least float32.

    It is detached: the gate is trained, the embeddings are not.
    """
    dtype = torch.promote_types(embeddings_BTD.dtype, torch.float32)
    return prompt_mean(embeddings_BTD.detach().to(dtype), prompt_mask_BT.to(embeddings_BTD.device))


class OLoraModel(BranchModel):
    """Branches with a penalty on the overlap of the current branch with the earlier ones."""

    def extra_loss(self, attention_mask: Tensor) -> Tensor | None:
        """Returns λ1 · Σ_{i<t} Σ |A_i A_tᵀ|, summed over layers; None without earlier branches."""
        penalties = []
        for layer in self.expert_layers():
            for name in layer.running_adapters:
                config = self.peft_config[name]
                if config.past_branches and config.orthogonality_weight:
                    # One product for all i < t: A_past has the rows of all earlier branches.
                    overlap = (layer.badit_A_past[name] @ layer.badit_A[name].T).abs().sum()
                    penalty = config.orthogonality_weight * overlap
                    # Layers of a model with a device map are on several devices.
                    penalties.append(penalty.to(attention_mask.device))
        return torch.stack(penalties).sum() if penalties else None


@baseline("o-lora", OLoraModel)
@dataclass
class OLoraConfig(BranchConfig):
    """O-LoRA (arXiv 2310.14152): one LoRA branch per task, orthogonal to the earlier ones."""

    method: ClassVar[str] = "BADIT_O_LORA"

    orthogonality_weight: NotNegative = option(
        0.5, "Weight λ1 of the orthogonality penalty; 0 disables it."
    )


class SaptGate(BranchGate):
    """Attention of the prompt's query to the keys.

    ``norm_weight`` (D) and ``norm_bias`` (D) are also trained.
    """

    def __init__(self, width: int, config: GatedBranchConfig, device: torch.device) -> None:
        super().__init__(width, config, device)
        self.norm_weight = nn.Parameter(torch.ones(width, device=device))
        self.norm_bias = nn.Parameter(torch.zeros(width, device=device))
        self.start_key()

    def forward(self, prompt_BD: Tensor) -> Tensor:
        # q = LayerNorm(SiLU(W2 W1 p0)), a = softmax_i(q · k_i / √d).
        silu_BD = F.silu(prompt_BD @ self.down.T @ self.up.T)
        query_BD = F.layer_norm(silu_BD, self.key.shape, self.norm_weight, self.norm_bias)
        scores_BK = query_BD @ self.of_all_tasks("key").T / math.sqrt(len(self.key))
        return scores_BK.softmax(dim=-1)


@baseline("sapt", BranchModel)
@dataclass
class SaptConfig(GatedBranchConfig):
    """SAPT (arXiv 2401.08295) without its replay: one LoRA branch per task.

    The branches are weighted by attention over their keys.
    """

    method: ClassVar[str] = "BADIT_SAPT"
    gate_cls: ClassVar[Any] = SaptGate
