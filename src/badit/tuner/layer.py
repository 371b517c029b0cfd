"""The adapted layer:  y = W x + s · (B (g ∘ A x) − share · B0 A0 x),   g_i = gate[expert_of[i]].

If the gates scale the change since step 0 (``gates_change`` of the configuration):

    y = W x + s · (B (g ∘ A x) − B0 (g ∘ A0 x))
      = W x + s · ((B − B0) (g ∘ A x) + B0 (g ∘ (A − A0) x))

The last form is exactly W x at step 0 for all gates.

The experts form one LoRA of rank N = K·r, whose components are scaled by gates. A method defines
the initial factors (``initial_factors`` of its configuration) and the gates (``gates`` of its
layer). A0 and B0 are the frozen initial factors of methods whose experts are initialised as a part
of the base weight. Subtracting them in the forward pass equals the paper's residual Ŵ and does not
change W.

In training, dropout d acts on the experts' change, so that it adds no noise to the base model:

    y = W x + s · (B (g ∘ A d(x)) − B0 (g ∘ A0 d(x)) + B0 ((g − share) ∘ A0 x))

Without dropout (d(x) = x), and with B0 = 0, both forms are equal.

Shape suffixes: B = batch, T = positions, I/O = in/out features, K = experts, N = components, R =
rows of A (N, or r if the experts share one A), P = rows of A and A0 together (R, or 2N with the
initial factors); M = columns of B and B0 together (N, or 2N).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from badit.support.errors import BaditError
from badit.tuner.context import RoutingContext
from badit.tuner.gated_change import GatedChange
from badit.tuner.targets import FusedExpert, weight_as_used

Buffers = dict[str, Tensor]  # the type of a BufferDict: buffers by adapter
Pair = tuple[Tensor, Tensor]


class ExpertLinear(nn.Module, BaseTunerLayer):
    """LoRA experts on ``nn.Linear`` or transformers' ``Conv1D``; methods override :meth:`gates`.

    badit_A (R, I) and badit_B (O, N) are trained; badit_A0 (N, I) and badit_B0 (O, N), the initial
    factors, are saved buffers. A method with other tensors lists them below.
    PEFT saves only names with the ``badit_`` prefix.
    """

    adapter_layer_names: tuple[str, ...] = ("badit_A", "badit_B")
    other_param_names: tuple[str, ...] = ("badit_config", "badit_dropout", "badit_A0", "badit_B0")
    module_names: tuple[str, ...] = ("badit_dropout",)

    badit_A: nn.ParameterDict
    badit_B: nn.ParameterDict
    badit_A0: Buffers
    badit_B0: Buffers
    badit_dropout: nn.ModuleDict

    def __init__(
        self, base_layer: Any, name: str, routing: RoutingContext, adapter_name: str, config: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.routing = routing
        # The shape of the weight may differ, because quantised weights are packed.
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.badit_config: dict[str, Any] = {}
        # With an entry for each adapter; PEFT's delete_adapter removes it from all of them.
        for tensors in self.adapter_layer_names:
            setattr(self, tensors, nn.ParameterDict())
        for modules in self.module_names:
            setattr(self, modules, nn.ModuleDict())
        for tensors in self.other_param_names:
            # The configurations and modules exist already, and are no tensors.
            if not hasattr(self, tensors):
                setattr(self, tensors, BufferDict(persistent=True))
        # Read by PEFT's property active_adapters, which update_layer uses.
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Adds an adapter: creates its tensors and initialises them."""
        self.badit_config[adapter_name] = config
        components = config.num_components
        rows_of_A = config.r if config.shares_A else components
        self.badit_A[adapter_name] = nn.Parameter(torch.zeros(rows_of_A, self.in_features))
        self.badit_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, components))
        if config.subtracted_share:
            self.badit_A0[adapter_name] = torch.zeros(components, self.in_features)
            self.badit_B0[adapter_name] = torch.zeros(self.out_features, components)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.badit_dropout[adapter_name] = dropout
        # PEFT creates tensors on the meta device if it then loads them.
        will_be_loaded = self.badit_A[adapter_name].is_meta and not self.weight_OI.is_meta
        if not will_be_loaded:
            self.initialise(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # PEFT sets requires_grad of the new tensors: only those of active adapters are trained.
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def initialise(self, adapter_name: str) -> None:
        """Initialises an adapter's new tensors, which are zero."""
        config = self.badit_config[adapter_name]
        factors = None
        if not config.inference_mode:  # else the values will be loaded: no decomposition is needed
            try:
                factors = config.initial_factors(self.weight_OI)
            except BaditError as error:
                raise BaditError(f"{self.name}: {error}") from None
        if factors is None:
            # As in PEFT's LoRA: uniform within ±1/√I.
            nn.init.kaiming_uniform_(self.badit_A[adapter_name], a=math.sqrt(5))
            return
        a_NI, b_ON = factors
        self.badit_A[adapter_name].copy_(a_NI)
        self.badit_B[adapter_name].copy_(b_ON)
        if config.subtracted_share:
            self.badit_A0[adapter_name].copy_(a_NI)
            self.badit_B0[adapter_name].copy_(b_ON)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns y (…, O) = W x + s · (B (g ∘ A x) − share · B0 A0 x) for x (…, I)."""
        # The experts are one LoRA of rank N: gates scale its components, without a loop over
        # experts.
        y = self.base_layer(x, *args, **kwargs)
        for adapter in self.running_adapters:
            x_in = self._with_positions(self._cast_input_dtype(x, self.badit_A[adapter].dtype))
            # The input may have been reshaped by `_with_positions`.
            y = y + self.change(adapter, x_in).reshape(y.shape).to(y.dtype)
        return y

    def change(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns what an adapter adds to the output (…, O) for x (…, I)."""
        gates = self.component_gates(adapter_name, x)
        return self.change_by_gates(adapter_name, x, self._per_token(gates))

    def change_by_gates(self, adapter_name: str, x: Tensor, gates: Tensor) -> Tensor:
        """Returns the change of the output (…, O) for x (…, I) and the components' gates (…, N)."""
        config = self.badit_config[adapter_name]
        if config.gates_change and torch.is_grad_enabled():
            dropped = self.badit_dropout[adapter_name](x)
            factors = (*self.factors(adapter_name), *self.kept_factors(adapter_name))
            return GatedChange.apply(dropped, config.scaling * gates, *factors)
        return self.product(adapter_name, x, *self.gated_factors(adapter_name, gates))

    def product(
        self, adapter_name: str, x: Tensor, a_PI: Tensor, b_OM: Tensor, scale: Tensor | None
    ) -> Tensor:
        """Returns B (scale ∘ A x) (…, O) for x (…, I)."""
        # One dropout mask for A and A0: no noise while B A and B0 A0 cancel each other.
        hidden = self.hidden(adapter_name, self.badit_dropout[adapter_name](x), a_PI)
        if self.drops_change(adapter_name):
            hidden = self._change_and_kept(adapter_name, x, hidden, scale)
        elif scale is not None:
            # If the experts share A, each group of P columns of B takes all rows of A.
            scale = scale.to(hidden.dtype).unflatten(-1, (-1, hidden.shape[-1]))
            hidden = (hidden[..., None, :] * scale).flatten(-2)
        return F.linear(hidden, b_OM)

    def drops_change(self, adapter_name: str) -> bool:
        """Returns whether the next pass applies dropout to an adapter with initial factors.

        If the gates scale the change, the factors already are those of the change.
        """
        config = self.badit_config[adapter_name]
        if config.gates_change:
            return False
        has_dropout = bool(config.lora_dropout) and self.badit_dropout[adapter_name].training
        return has_dropout and bool(config.subtracted_share)

    def _change_and_kept(self, adapter_name: str, x: Tensor, dropped: Tensor, scale: Any) -> Tensor:
        """Returns the inputs (…, 2N) of B and B0, for [A; A0] d(x) (…, 2N) and their scale."""
        a0_NI, _ = self.kept_factors(adapter_name)
        gate, minus_share = scale.to(dropped.dtype).chunk(2, dim=-1)  # both times s
        change, change_0 = (dropped * torch.cat([gate, gate], dim=-1)).chunk(2, dim=-1)
        kept = F.linear(x, a0_NI) * (gate + minus_share)
        return torch.cat([change, kept - change_0], dim=-1)

    def gated_factors(self, adapter_name: str, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns A (P, I), B (O, M) and the scale (…, M) of their components for gates (…, N).

        The scale is s · g, and −s · share for the initial factors.
        """
        config = self.badit_config[adapter_name]
        a_RI, b_ON = self.factors(adapter_name)
        scale = config.scaling * gates
        if not config.subtracted_share:
            return a_RI, b_ON, scale
        # B0 A0 are N more components, so there are two products instead of four.
        a0_NI, b0_ON = self.kept_factors(adapter_name)
        if config.gates_change:
            a_PI = torch.cat([a_RI, a_RI - a0_NI])
            b_OM = torch.cat([b_ON - b0_ON, b0_ON], dim=1)
            return a_PI, b_OM, torch.cat([scale, scale], dim=-1)
        subtracted = torch.full_like(scale, -config.scaling * config.subtracted_share)
        a_PI = torch.cat([a_RI, a0_NI])
        b_OM = torch.cat([b_ON, b0_ON], dim=1)
        return a_PI, b_OM, torch.cat([scale, subtracted], dim=-1)

    def factors(self, adapter_name: str) -> Pair:
        """Returns A (R, I) and B (O, N); a method may add frozen factors to the trained ones."""
        return self.badit_A[adapter_name], self.badit_B[adapter_name]

    def kept_factors(self, adapter_name: str) -> Pair:
        """Returns the initial factors A0 (N, I) and B0 (O, N) of an adapter that subtracts them."""
        return self.badit_A0[adapter_name], self.badit_B0[adapter_name]

    def hidden(self, adapter_name: str, x: Tensor, a_PI: Tensor) -> Tensor:
        """Returns A x (…, P), before the gates are applied."""
        return F.linear(x, a_PI)

    def gates(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the experts' gates (…, K) for an input x (…, I)."""
        raise NotImplementedError

    def component_gates(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the gates (…, N) of the components: each has the gate of its expert."""
        config = self.badit_config[adapter_name]
        rank = config.num_components // config.num_experts
        return self.gates(adapter_name, x).repeat_interleave(rank, dim=-1)

    def _per_token(self, gates: Tensor) -> Tensor:
        """Returns gates (…, N) for the tokens that reach this layer, from those of the batch."""
        if self.tokens_P is None:
            return gates
        return gates.expand(*self.batch_shape(), -1).flatten(0, 1)[self.tokens_P]

    def expert_of(self, adapter_name: str) -> Tensor:
        """Returns the expert of each of the N components.

        The groups have equal sizes, and are in order unless they are regrouped.
        """
        config = self.badit_config[adapter_name]
        rank = config.num_components // config.num_experts
        return torch.arange(config.num_experts, device=self.device).repeat_interleave(rank)

    def num_gates(self, adapter_name: str) -> int:
        """Returns the number of gates of a prompt.

        A method with a branch for each task has one expert, and a gate for each branch.
        """
        return int(self.expert_of(adapter_name).max()) + 1

    def _with_positions(self, x: Tensor) -> Tensor:
        """Returns x as (B, T, I), also in a module whose input is (B·T, I), such as OPT's MLP."""
        if x.ndim != 2 or self.tokens_P is not None:
            return x
        # Gates are per row, so the rows must be separate again.
        shape = self.routing.forward_pass().shape
        if shape is None or len(x) != shape.numel():
            return x
        return x.unflatten(0, shape)

    @property
    def running_adapters(self) -> list[str]:
        """The adapters that the next forward pass applies."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.badit_A]

    @property
    def weight_OI(self) -> Tensor:
        """The base layer's weight as (out, in), dequantised if necessary."""
        return weight_as_used(self.get_base_layer())

    @property
    def device(self) -> torch.device:
        """The base layer's device."""
        weight: Any = self.get_base_layer().weight
        return weight.device

    @property
    def tokens_P(self) -> Tensor | None:
        """For a matrix of a fused weight, the indices of its tokens in the flattened batch."""
        base_layer = self.get_base_layer()
        if isinstance(base_layer, FusedExpert):
            return base_layer.experts.tokens_P
        return None

    def batch_shape(self) -> torch.Size:
        """Returns the shape (B, T) of the current batch; BaditError if it is not known."""
        shape = self.routing.forward_pass().shape
        if shape is None:
            raise BaditError(
                f"{self.name}: unknown batch shape; pass input_ids to the model or omit "
                "target_parameters"
            )
        return shape

    @torch.no_grad()
    def frozen_factors(self, adapter_name: str, gates_K: Tensor | None = None) -> Pair:
        """Returns the factors of the LoRA that equals the adapter at fixed gates (default: 1).

        A' = [A; A0] (P, I) and B' = s · [B diag(g), −share · B0] (O, P), in at least float32. If
        the experts share one A, their B's are summed, each multiplied by its gate.
        """
        dtype = torch.promote_types(self.badit_A[adapter_name].dtype, torch.float32)
        expert_N = self.expert_of(adapter_name)
        gates_N = torch.ones_like(expert_N, dtype=dtype)
        if gates_K is not None:
            gates_N = gates_K.to(gates_N)[expert_N]
        a_PI, b_OM, scale_M = self.gated_factors(adapter_name, gates_N)
        # With a shared A, each of its rows has a column in all K B's, and these add up.
        b_OP = (b_OM.to(dtype) * scale_M).unflatten(1, (-1, len(a_PI))).sum(dim=1)
        return a_PI.to(dtype), b_OP

    def get_delta_weight(self, adapter_name: str, gates_K: Tensor | None = None) -> Tensor:
        """Returns what the adapter adds to the base weight at fixed gates (default: all 1).

        It is in the layout of that weight.
        """
        a_PI, b_OP = self.frozen_factors(adapter_name, gates_K)
        delta_OI = b_OP @ a_PI
        return delta_OI.T if isinstance(self.get_base_layer(), Conv1D) else delta_OI

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns whether PEFT's ``convert_to_lora`` may use :meth:`get_delta_weight`."""
        is_fused = isinstance(self.get_base_layer(), FusedExpert)
        return self.badit_config[adapter_name].has_fixed_gates and not is_fused

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises BaditError."""
        raise BaditError(
            "an adapter whose gates depend on its input has no single weight to merge into; "
            "unload() returns the base model; or fix the gates: badit export RUN --task TASK "
            "(badit adopt ADAPTER makes the run), or get_delta_weight(adapter, gates)"
        )

    def unmerge(self) -> None:
        """Does nothing: no adapter is ever merged."""
