"""The adapted layer:  y = W x + s · (B (g ∘ A x) − share · B0 A0 x),   g_i = gate[expert_of[i]].

The experts form one LoRA of rank N = K·r, whose components are scaled by gates. A method defines the initial factors
(``initial_factors`` of its configuration) and the gates (``gates`` of its layer). A0 and B0 are the frozen initial
factors of methods whose experts are initialised as a part of the base weight. Subtracting them in the forward pass
equals the paper's residual Ŵ and does not change W.

Shape suffixes: B = batch, T = positions, I/O = in/out features, K = experts, N = components, R = rows of A (N, or r
if the experts share one A), P = rows of A and A0 together (R, or 2N with the initial factors).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.method import (
    batch_moments,
    expert_gates,
    prompt_mean,
    segment_means,
    standardised,
    updated_moments,
)
from badit.method.routing import cluster_gates, prompt_centroids, random_codes
from badit.support.errors import BaditError
from badit.tuner.config import BaditConfig
from badit.tuner.distributed import gathered
from badit.tuner.prompt import RoutingContext
from badit.tuner.targets import FusedExpert, weight_as_used

Buffers = dict[str, torch.Tensor]  # the type of a BufferDict: buffers by adapter
Pair = tuple[torch.Tensor, torch.Tensor]


class ExpertLinear(nn.Module, BaseTunerLayer):
    """LoRA experts on ``nn.Linear`` or transformers' ``Conv1D``. Methods override ``gates`` or ``component_gates``.

    badit_A (R, I), badit_B (O, N) and badit_router (K, I) are trained; badit_A0 and badit_B0 (the initial factors) are
    saved buffers. A method with other tensors lists them below. PEFT saves only names with the ``badit_`` prefix.
    """

    adapter_layer_names: tuple[str, ...] = ("badit_A", "badit_B", "badit_router")
    other_param_names: tuple[str, ...] = ("badit_config", "badit_dropout", "badit_A0", "badit_B0")

    badit_A: nn.ParameterDict
    badit_B: nn.ParameterDict
    badit_router: nn.ParameterDict
    badit_A0: Buffers
    badit_B0: Buffers

    def __init__(
        self, base_layer: Any, name: str, routing: RoutingContext, adapter_name: str, config: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.routing = routing
        names = ("nf", "nx") if isinstance(base_layer, Conv1D) else ("out_features", "in_features")
        self.out_features, self.in_features = (
            getattr(base_layer, name) for name in names
        )  # the weight may be packed
        self.badit_config: dict[str, Any] = {}
        self.badit_dropout = nn.ModuleDict()
        for parameters in self.adapter_layer_names:
            setattr(self, parameters, nn.ParameterDict())
        for buffers in self.other_param_names:
            if not hasattr(self, buffers):
                setattr(self, buffers, BufferDict(persistent=True))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Adds an adapter: creates its tensors and initialises them."""
        self.badit_config[adapter_name] = config
        rows_of_A = config.r if config.shares_A else config.num_components
        self.badit_A[adapter_name] = nn.Parameter(torch.zeros(rows_of_A, self.in_features))
        self.badit_B[adapter_name] = nn.Parameter(
            torch.zeros(self.out_features, config.num_components)
        )
        if config.gates != "clusters" and "badit_router" in self.adapter_layer_names:
            self.badit_router[adapter_name] = nn.Parameter(
                torch.zeros(config.num_experts, self.in_features)
            )
        if config.subtracted_share:
            self.badit_A0[adapter_name] = torch.zeros(config.num_components, self.in_features)
            self.badit_B0[adapter_name] = torch.zeros(self.out_features, config.num_components)
        self.badit_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        # TRL adds "ref", the reference of a preference loss, but copies only some of default's tensors to it.
        is_reference = adapter_name == "ref" and self.badit_config.get("default") is config
        if not is_reference and (
            not self.badit_A[adapter_name].is_meta or self.weight_OI.is_meta
        ):  # else to be loaded
            self.initialise(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)
        if is_reference:  # a copy of the default adapter, with its dtypes
            tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
            for name in (name for name in tensors if name.endswith(".ref")):
                tensors[name].data = tensors[name.removesuffix("ref") + "default"].data.clone()

    @torch.no_grad()
    def initialise(self, adapter_name: str) -> None:
        """Initialises an adapter's new tensors, which are zero."""
        config = self.badit_config[adapter_name]
        try:
            # In inference mode the values will be loaded, so no decomposition is needed.
            factors = None if config.inference_mode else config.initial_factors(self.weight_OI)
        except BaditError as error:
            raise BaditError(f"{self.name}: {error}") from None
        if factors is None:
            nn.init.kaiming_uniform_(self.badit_A[adapter_name], a=math.sqrt(5))
            return
        self.badit_A[adapter_name].copy_(factors[0])
        self.badit_B[adapter_name].copy_(factors[1])
        if config.subtracted_share:
            for kept, factor in zip(self.kept_factors(adapter_name), factors, strict=True):
                kept.copy_(factor)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns y (…, O) for x (…, I): W x plus s · (B (g ∘ A x) − share · B0 A0 x) of each active adapter."""
        y = self.base_layer(x, *args, **kwargs)
        for adapter in self.running_adapters:
            config = self.badit_config[adapter]
            x_in = self._with_positions(self._cast_input_dtype(x, self.badit_A[adapter].dtype))
            stored = self._stored(adapter)
            if stored is not None and self._key(adapter) in stored:
                a_PI, b_ON, scale = stored[self._key(adapter)]
            else:
                a_PI, b_ON = self.factors(adapter)
                scale = config.scaling * self.component_gates(adapter, x_in)
                if (tokens_P := self.tokens_P) is not None:
                    scale = scale.expand(*self.batch_shape(), -1).flatten(0, 1)[tokens_P]
                if config.subtracted_share:
                    # B0 A0 are N more components with a negative gate: two products instead of four.
                    a0_NI, b0_ON = self.kept_factors(adapter)
                    a_PI, b_ON = torch.cat([a_PI, a0_NI]), torch.cat([b_ON, b0_ON], dim=1)
                    subtracted = torch.full_like(scale, -config.scaling * config.subtracted_share)
                    scale = torch.cat([scale, subtracted], dim=-1)
                if stored is not None:
                    if len(scale) == 1:  # one row, or the same gates in all rows
                        b_ON, scale = b_ON * scale.flatten().to(b_ON.dtype), None
                    stored[self._key(adapter)] = a_PI, b_ON, scale
            hidden = self.hidden(adapter, self.badit_dropout[adapter](x_in), a_PI)
            if scale is not None:
                # If the experts share A, each group of P columns of B takes all rows of A.
                scale = scale.to(hidden.dtype).unflatten(-1, (-1, hidden.shape[-1]))
                hidden = (hidden[..., None, :] * scale).flatten(-2)
            y = y + F.linear(hidden, b_ON).reshape(y.shape).to(y.dtype)
        return y

    def _with_positions(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x as (B, T, I), also in a module whose input is (B·T, I), such as OPT's MLP."""
        shape = self.routing.forward_pass().shape if x.ndim == 2 and self.tokens_P is None else None
        return x if shape is None or len(x) != shape.numel() else x.unflatten(0, shape)

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the experts' gates (…, K) for an input x (…, I)."""
        raise NotImplementedError

    def component_gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the gates (…, N) of the components: each has the gate of its expert."""
        config = self.badit_config[adapter_name]
        return self.gates(adapter_name, x).repeat_interleave(
            config.num_components // config.num_experts, dim=-1
        )

    def factors(self, adapter_name: str) -> Pair:
        """Returns A (R, I) and B (O, N); a method may add frozen factors to the trained ones."""
        return self.badit_A[adapter_name], self.badit_B[adapter_name]

    def kept_factors(self, adapter_name: str) -> Pair:
        """Returns A0 (N, I) and B0 (O, N) of an adapter whose experts were initialised as a part of the base weight."""
        return self.badit_A0[adapter_name], self.badit_B0[adapter_name]

    def hidden(self, adapter_name: str, x: torch.Tensor, a_PI: torch.Tensor) -> torch.Tensor:
        """Returns A x (…, P), before the gates are applied."""
        return F.linear(x, a_PI)

    def expert_of(self, adapter_name: str) -> torch.Tensor:
        """Returns the expert of each of the N components: groups of equal size, in order unless they are regrouped."""
        config = self.badit_config[adapter_name]
        rank = config.num_components // config.num_experts
        return torch.arange(config.num_experts, device=self.device).repeat_interleave(rank)

    def _stored(self, adapter_name: str) -> dict[str, Any] | None:
        """Returns the dict that stores factors and gates for the next token of a generation; None: not stored."""
        return None

    def _key(self, adapter_name: str) -> str:  # the layer's key in the dicts of a ForwardPass
        return f"{self.name}.{adapter_name}"

    @property
    def running_adapters(self) -> list[str]:
        """The adapters that the next forward pass applies."""
        return (
            []
            if self.disable_adapters
            else [name for name in self.active_adapters if name in self.badit_A]
        )

    @property
    def weight_OI(self) -> torch.Tensor:
        """The base layer's weight as (out, in), dequantised if necessary."""
        return weight_as_used(self.get_base_layer())

    @property
    def tokens_P(self) -> torch.Tensor | None:
        """For a matrix of a fused weight, the indices of its input's tokens in the flattened batch; else None."""
        base_layer = self.get_base_layer()
        return base_layer.experts.tokens_P if isinstance(base_layer, FusedExpert) else None

    def batch_shape(self) -> torch.Size:
        """Returns the shape (B, T) of the current batch; BaditError if it is not known."""
        if (shape := self.routing.forward_pass().shape) is None:
            raise BaditError(
                f"{self.name}: unknown batch shape; pass input_ids to the model or omit target_parameters"
            )
        return shape

    @property
    def device(self) -> torch.device:
        """The base layer's device."""
        weight: Any = self.get_base_layer().weight
        return weight.device

    @torch.no_grad()
    def frozen_factors(self, adapter_name: str, gates_K: torch.Tensor | None = None) -> Pair:
        """Returns the factors of the LoRA that equals the adapter at fixed gates (default: 1), in at least float32.

        A' = [A; A0] (P, I) and B' = s · [B diag(g), −share · B0] (O, P). If the experts share one A, their B's are
        summed, each multiplied by its gate.
        """
        config = self.badit_config[adapter_name]
        dtype = torch.promote_types(self.badit_A[adapter_name].dtype, torch.float32)
        a_RI, b_ON = (factor.to(dtype) for factor in self.factors(adapter_name))
        scale_N = b_ON.new_full((b_ON.shape[1],), config.scaling)
        if gates_K is not None:
            scale_N = scale_N * gates_K.to(scale_N)[self.expert_of(adapter_name)]
        b_OR = (b_ON * scale_N).unflatten(1, (-1, len(a_RI))).sum(dim=1)
        if not config.subtracted_share:
            return a_RI, b_OR
        a0_NI, b0_ON = (factor.to(dtype) for factor in self.kept_factors(adapter_name))
        return torch.cat([a_RI, a0_NI]), torch.cat(
            [b_OR, -config.scaling * config.subtracted_share * b0_ON], dim=1
        )

    def get_delta_weight(
        self, adapter_name: str, gates_K: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns what the adapter adds to the base weight at fixed gates (default: all 1), in that weight's layout."""
        a_PI, b_OP = self.frozen_factors(adapter_name, gates_K)
        delta_OI = b_OP @ a_PI
        return delta_OI.T if isinstance(self.get_base_layer(), Conv1D) else delta_OI

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns whether PEFT's ``convert_to_lora`` may use :meth:`get_delta_weight`."""
        return self.badit_config[adapter_name].has_fixed_gates and not isinstance(
            self.get_base_layer(), FusedExpert
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises BaditError."""
        raise BaditError(
            "an adapter whose gates depend on its input has no single weight to merge into; unload() returns the base "
            "model; or fix the gates: badit export RUN --task TASK, or get_delta_weight(adapter, gates)"
        )

    def unmerge(self) -> None:
        """Does nothing: no adapter is ever merged."""


class BaditLinear(ExpertLinear):
    """BADIT's layer: gates from the prompt or the position, and expert labels that regrouping (DOG) changes.

    It also saves the labels badit_expert_of (N integers) and, if x̄ is standardised, badit_moments (2, I), its mean and
    variance, and badit_batches, the number of batches in them. With clusters of prompts it has no router, but
    badit_centroids (C, I) and badit_codes (C, K), their gates; the moments are then those of :meth:`cluster`.
    """

    exact_buffers = (
        "badit_expert_of",
        "badit_moments",
        "badit_batches",
        "badit_centroids",
        "badit_codes",
    )
    other_param_names = (*ExpertLinear.other_param_names, *exact_buffers)

    badit_expert_of: Buffers
    badit_moments: Buffers
    badit_batches: Buffers
    badit_centroids: Buffers
    badit_codes: Buffers

    def __init__(self, *args: Any) -> None:
        # By adapter, for regrouping: the sums of its K gates in training and, as last entry, the number of summands.
        self.gate_sums: dict[str, torch.Tensor] = {}
        super().__init__(*args)
        self.routing.mask_readers.append(self._reads_prompt)
        self.register_load_state_dict_post_hook(_refuse_broken_labels)

    def update_layer(self, adapter_name: str, config: BaditConfig) -> None:
        self.gate_sums.pop(adapter_name, None)  # of an earlier adapter of this name
        self.badit_expert_of[adapter_name] = torch.arange(config.num_experts).repeat_interleave(
            config.r
        )
        if config.router_input == "standardised":
            self.badit_moments[adapter_name] = torch.zeros(2, self.in_features)
            self.badit_batches[adapter_name] = torch.zeros(())
        if config.gates == "clusters":
            self.routing.unclustered.append((self, adapter_name))
            self.badit_centroids[adapter_name] = torch.zeros(config.num_clusters, self.in_features)
            self.badit_codes[adapter_name] = (
                torch.ones(config.num_clusters, config.num_experts) / config.num_experts
            )
        super().update_layer(adapter_name, config)

    # A cast of the model, or PEFT's to the base layer's dtype, changes neither dtypes nor values of the exact buffers.
    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with self._exact():
            return super()._apply(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        with self._exact():
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        before = [
            (buffers, dict(buffers))
            for buffers in (getattr(self, name) for name in self.exact_buffers)
        ]
        yield
        for buffers, values in before:
            buffers.update(
                {name: v.to(buffers[name].device) for name, v in values.items() if not v.is_meta}
            )

    def expert_of(self, adapter_name: str) -> torch.Tensor:
        return self.badit_expert_of[adapter_name]

    def component_gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        return self.gates(adapter_name, x)[..., self.expert_of(adapter_name)]

    def _reads_prompt(self) -> bool:
        return any(
            self.badit_config[adapter].routing == "prompt" for adapter in self.running_adapters
        )

    def _stored(self, adapter_name: str) -> dict[str, Any] | None:
        """During a ``generate`` routed by prompt, factors and gates stay the same from the first new token on."""
        by_token = self.badit_config[adapter_name].routing == "token" or self.tokens_P is not None
        if by_token or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self.routing.forward_pass().stored

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the gates for x (B, T, I): (B, 1, K) for routing by prompt, (B, T, K) by token and for packed rows.

        For x (B, I), as in models without positions, the shape is (B, K).
        """
        if self.badit_config[adapter_name].routing == "token":
            return self._route(adapter_name, x)
        forward_pass = self.routing.forward_pass()
        if forward_pass.held is not None:
            gates = forward_pass.held.get(self._key(adapter_name))
            if gates is None:
                fix = "fill it with the adapter active, or use routing='token'"
                raise BaditError(
                    f"this cache was filled without the adapter, so it has no gates for its prompt; {fix}"
                )
            if (rows := len(gates)) != (
                present := len(x) if self.tokens_P is None else self.batch_shape()[0]
            ):
                raise BaditError(
                    f"this cache was filled with a batch of {rows} rows, but the batch now has {present}"
                )
            return gates.to(x.device)
        mask_BT, segments = forward_pass.prompt
        if mask_BT is None:  # the whole input is the prompt
            mask_BT = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            return self._route_prompts(
                adapter_name, prompt_mean(x, mask_BT)[:, None] if x.ndim == 3 else x
            )
        if self.tokens_P is None and (x.ndim != 3 or x.shape[:2] != mask_BT.shape):
            shapes = (
                f"the input has shape {tuple(x.shape)}, but the batch has {tuple(mask_BT.shape)}"
            )
            raise BaditError(
                f"{self.name}: {shapes}; leave it out of target_modules, or use routing='token'"
            )
        mask_BT = mask_BT.to(x.device)
        of_BT = None if segments is None else segments.of_BT.to(x.device)
        number = len(mask_BT) if segments is None else segments.number
        if (
            tokens_P := self.tokens_P
        ) is not None:  # the mean over the prompt's tokens that reach the matrix
            of_P = tokens_P // mask_BT.shape[1] if of_BT is None else of_BT.flatten()[tokens_P]
            means_SI = segment_means(x[None], mask_BT.flatten()[tokens_P][None], of_P[None], number)
        elif of_BT is not None:
            means_SI = segment_means(x, mask_BT, of_BT, number)
        else:
            means_SI = prompt_mean(x, mask_BT)
        if of_BT is not None:  # packed rows: gates for each segment
            return self._route_prompts(adapter_name, means_SI)[of_BT]
        gates = self._route_prompts(adapter_name, means_SI[:, None])
        if forward_pass.fills_cache:
            # Only then: a layer's name in compiled code makes torch.compile compile every layer separately.
            forward_pass.fresh[self._key(adapter_name)] = gates.detach()
        return gates

    @torch.no_grad()
    def cluster(self, adapter_name: str, means_SI: torch.Tensor) -> None:
        """Sets moments, centroids and codes from x̄ (S, I) of training prompts; on all ranks, those of rank 0."""
        config, codes_CK = self.badit_config[adapter_name], self.badit_codes[adapter_name]
        means_SI = means_SI.nan_to_num(
            0.0, 0.0, 0.0
        )  # NaN in one prompt would reach the moments of all features
        moments_2I = batch_moments(means_SI).nan_to_num(
            0.0
        )  # without any prompt, as for some experts of an MoE
        moments_2I[1] *= (
            moments_2I[1].sum() > 1e-10 * moments_2I[0].square().sum()
        )  # equal prompts differ by rounding
        centroids_CI = prompt_centroids(standardised(means_SI, moments_2I), len(codes_CK))
        # Fewer prompts than clusters give equal centroids; rounding must not choose between their codes.
        first_equal_C = (centroids_CI @ centroids_CI.T > 1 - 1e-5).int().argmax(dim=1)
        codes_CK = random_codes(*codes_CK.shape)[first_equal_C]
        found = {
            "moments": gathered(moments_2I),
            "centroids": gathered(centroids_CI),
            "codes": gathered(codes_CK),
        }
        for name in [
            adapter_name,
            *(["ref"] if self.badit_config.get("ref") is config else []),
        ]:  # TRL's, a copy
            self.badit_batches[name].fill_(1)
            for part, of_ranks in found.items():
                getattr(self, f"badit_{part}")[name].copy_(of_ranks[0])

    def _route_prompts(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        if self.badit_config[adapter_name].router_input == "mean":
            return self._route(adapter_name, x)
        if self.routing.prompt_means is not None:
            self.routing.prompt_means[self._key(adapter_name)].append(
                x.flatten(0, -2).float().cpu()
            )
        moments_2I, batches = self.badit_moments[adapter_name], self.badit_batches[adapter_name]
        router = self.badit_router.get(adapter_name)
        forward_pass = self.routing.forward_pass()
        if self.routing.runs_again():
            # Gradient checkpointing: the prompts are already counted, and later passes may have changed the moments.
            moments_2I = forward_pass.moments.get(self._key(adapter_name), moments_2I)
        elif (
            self.training
            and forward_pass.begun_with_gradients
            and router is not None
            and router.requires_grad
        ):
            with torch.no_grad():
                new_2I = batch_moments(x.detach().flatten(0, -2), _sum_over_ranks)
                usable = (
                    new_2I.isfinite().all()
                )  # otherwise an overflow would remain in the moments
                batches += usable
                known_2I = moments_2I.float()
                updated_2I = updated_moments(known_2I, batches.float().clamp_min(1), new_2I)
                moments_2I.copy_(torch.where(usable, updated_2I, known_2I))
            if (
                not torch.compiler.is_compiling()
            ):  # the layer's name would make every layer compile separately
                forward_pass.moments[self._key(adapter_name)] = moments_2I.clone()
        return self._route(adapter_name, standardised(x, moments_2I.float()))

    def _route(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        config = self.badit_config[adapter_name]
        if config.gates == "clusters":
            gates = cluster_gates(
                x, self.badit_centroids[adapter_name], self.badit_codes[adapter_name]
            )
        else:
            logits = F.linear(x, self.badit_router[adapter_name]).float()
            gates = expert_gates(logits, kind=config.gates, top_k=config.top_k)
        if self.training and torch.is_grad_enabled():
            by_prompt = (
                config.routing == "prompt"
            )  # padding of packed rows has no prompt: its input is zero
            counts = (
                x.detach().any(dim=-1, keepdim=True).to(gates)
                if by_prompt
                else torch.ones_like(gates[..., :1])
            )
            sums = torch.cat([gates.detach() * counts, counts], dim=-1).flatten(0, -2).sum(dim=0)
            self.gate_sums[adapter_name] = sums + self.gate_sums.get(
                adapter_name, torch.zeros_like(sums)
            )
        return gates


def _sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


def _refuse_broken_labels(layer: BaditLinear, _: Any) -> None:
    for adapter_name, labels_N in layer.badit_expert_of.items():
        config = layer.badit_config[adapter_name]
        expected = sorted(list(range(config.num_experts)) * config.r)
        if not labels_N.is_meta and sorted(labels_N.tolist()) != expected:
            each = f"does not give each of the {config.num_experts} experts {config.r} components"
            raise BaditError(
                f"{layer.name}: badit_expert_of of {adapter_name!r} {each}; the file is damaged"
            )
