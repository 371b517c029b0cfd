"""One layer adapted by BADIT:  y = W x + s · (B (g ∘ A x) − B0 A0 x),   g_i = gate[expert_of[i]].

The product is :mod:`badit.tuner.base_layer`'s; here is what makes it BADIT: the experts start as singular triples
(BAD), the gates follow the prompt, and regrouping (DOG) changes the N integers of ``expert_of`` and nothing else.

A0 and B0 are the frozen initial factors. Subtracting them in the forward pass equals the paper's residual Ŵ while the
base weight W stays as it was ("delta"); "folded" writes Ŵ = W − s·B0 A0 into the base layer instead.

Shape suffixes: B = batch, T = positions, I/O = in/out features, N = components, K = experts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from badit.errors import BaditError
from badit.method import (
    batch_moments,
    expert_directions,
    expert_factors,
    expert_gates,
    prompt_mean,
    standardised,
    top_singular_triples,
    updated_moments,
)
from badit.tuner.base_layer import ExpertLayer, WideProduct
from badit.tuner.config import BaditConfig
from badit.tuner.prompt import ForwardPass, RoutingContext
from badit.tuner.quantised import shape_of


class BaditLayer(ExpertLayer):
    """State of the adapters on one base layer: that of any experts; and, saved too, badit_expert_of (N integers) and,
    for a standardised router input, badit_moments (2, I) and badit_batches, the number of batches in them.
    """

    other_param_names = (*ExpertLayer.other_param_names, "badit_expert_of", "badit_moments", "badit_batches")

    def __init__(self, base_layer: nn.Module, name: str, routing: RoutingContext) -> None:
        super().__init__(base_layer, name)
        self.routing = routing
        routing.preparations.append(self._prepare)
        self.badit_expert_of = BufferDict(persistent=True)
        self.badit_moments = BufferDict(persistent=True)
        self.badit_batches = BufferDict(persistent=True)
        self.gate_sums: dict[str, torch.Tensor] = {}
        self._weight_before_folding: torch.Tensor | None = None

    def expert_of(self, adapter_name: str) -> torch.Tensor:
        """The N labels that name every component's expert."""
        return cast(torch.Tensor, self.badit_expert_of[adapter_name])

    def update_layer(self, adapter_name: str, config: BaditConfig, inference_mode: bool = False) -> None:
        """Adds an adapter: makes its tensors, then fills them by BAD (or as ``config.init_weights`` says)."""
        self.unfold()
        self.badit_expert_of[adapter_name] = torch.arange(config.num_experts).repeat_interleave(config.r)
        if config.router_input == "standardised":
            self.badit_moments[adapter_name] = torch.zeros(2, shape_of(self.get_base_layer())[1])
            self.badit_batches[adapter_name] = torch.zeros(())
        super().update_layer(adapter_name, config, inference_mode)
        if self._is_reference(adapter_name, config):
            self._copy_default(adapter_name)

    def _is_reference(self, adapter_name: str, config: BaditConfig) -> bool:
        """Whether TRL adds the copy of the adapter that a preference loss is about to train, as the loss's reference.

        It adds an adapter of this name by the other's own configuration and then copies parameters whose names have
        ``.default.`` within, as those of LoRA's modules. BADIT's end in it, and its grouping is no parameter.
        """
        return adapter_name == "ref" and self.badit_config.get("default") is config

    def _copy_default(self, adapter_name: str) -> None:
        """Makes an adapter the same as the one named default, in its data types too."""
        for parameters in (self.badit_A, self.badit_B, self.badit_router):
            parameters[adapter_name].data = parameters["default"].data.clone()
        for buffers in (self.badit_A0, self.badit_B0, *self._exact_buffers):
            if "default" in buffers:
                buffers[adapter_name] = cast(torch.Tensor, buffers["default"]).clone()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT casts them to the base layer's dtype, integers too before 0.21; these are neither weights nor rounded.
        kept = [buffers for buffers in self._exact_buffers if adapter_name in buffers]
        before = [cast(torch.Tensor, buffers[adapter_name]) for buffers in kept]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for buffers, value in zip(kept, before, strict=True):
            buffers[adapter_name] = value.to(cast(torch.Tensor, buffers[adapter_name]).device)

    @property
    def _exact_buffers(self) -> tuple[BufferDict, ...]:
        return self.badit_expert_of, self.badit_moments, self.badit_batches

    @torch.no_grad()
    def _initialise(self, adapter_name: str, config: BaditConfig) -> None:
        if self._is_reference(adapter_name, config):
            return
        super()._initialise(adapter_name, config)
        if config.init_weights is False:
            nn.init.normal_(self.badit_B[adapter_name], std=0.02)
            nn.init.normal_(self.badit_router[adapter_name], std=0.02)

    def _decompose(self, config: BaditConfig) -> tuple[torch.Tensor, torch.Tensor]:
        triples = top_singular_triples(
            self.weight_OI,
            config.num_components,
            method=config.svd_method,  # pyright: ignore[reportArgumentType] (validated by the config)
            tolerance=config.svd_tolerance,
        )
        if config.init_weights == "directions":
            return expert_directions(triples)
        return expert_factors(triples, config.scaling)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self.unfold()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.unfold()

    def delete_adapter(self, adapter_name: str) -> None:
        self.unfold()
        self.gate_sums.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise BaditError(
            "a BADIT adapter mixes its experts anew for every prompt and so has no single weight to merge into; "
            "keep it as an adapter (unload() gives the base model back), "
            "or export one fixed mixture as a plain LoRA or a merged model: badit export RUN, "
            "layer.get_delta_weight(adapter, gates)"
        )

    @torch.no_grad()
    def _fold(self, adapter_name: str) -> None:
        if self._weight_before_folding is not None:
            return
        initial_A, initial_B = self.initial_factors(adapter_name)
        initial_OI = self.badit_config[adapter_name].scaling * (initial_B.float() @ initial_A.float())
        self._weight_before_folding = self.weight_OI.detach().clone()
        self.weight_OI.copy_(self.weight_OI.float() - initial_OI)

    @torch.no_grad()
    def unfold(self) -> None:
        """Puts the base weight back, to the bit. A folded adapter folds again at its next forward pass."""
        if self._weight_before_folding is not None:
            self.weight_OI.copy_(self._weight_before_folding)
            self._weight_before_folding = None

    def _prepare(self) -> bool:
        """Folds what is to be folded; whether the coming pass will ask for the prompt's mask."""
        configs = {adapter_name: self.badit_config[adapter_name] for adapter_name in self._running_adapters}
        for adapter_name, config in configs.items():
            if config.base_weight == "folded":
                self._fold(adapter_name)
        return any(config.routing == "prompt" for config in configs.values())

    def _wide_product(self, adapter_name: str, x: torch.Tensor) -> WideProduct:
        """While one ``generate`` decodes, the product stays as it is for its first new token: only x changes."""
        forward_pass = self.routing.forward_pass()
        settled = None if forward_pass is None else forward_pass.settled
        if (
            settled is None
            or self.badit_config[adapter_name].routing == "token"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return super()._wide_product(adapter_name, x)
        key = self._key(adapter_name)
        if key not in settled:
            a_PI, b_ON, scale = super()._wide_product(adapter_name, x)
            if scale is not None and len(scale) == 1:  # one row, or all rows alike
                b_ON, scale = b_ON * scale.flatten().to(b_ON.dtype), None
            settled[key] = WideProduct(a_PI, b_ON, scale)
        return settled[key]

    def _component_gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        return self.gates(adapter_name, x)[..., self.expert_of(adapter_name)]

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The gates for an input x (B, T, I): (B, 1, K) for routing by prompt, (B, T, K) by token.

        For x (B, I), as in models without positions, (B, K); for x (B·T, I) (B·T, K).
        """
        config = self.badit_config[adapter_name]
        if config.routing == "token":
            return self._route(adapter_name, x)
        forward_pass = self.routing.forward_pass()
        shape = None if forward_pass is None else forward_pass.shape
        if x.ndim == 2 and shape is not None and len(x) == shape.numel():  # OPT's MLP sees the rows as one
            return (
                self._prompt_gates(adapter_name, x.unflatten(0, shape), forward_pass).expand(*shape, -1).flatten(0, 1)
            )
        return self._prompt_gates(adapter_name, x, forward_pass)

    def _prompt_gates(self, adapter_name: str, x: torch.Tensor, forward_pass: ForwardPass | None) -> torch.Tensor:
        if forward_pass is not None and forward_pass.held is not None:
            return self._held(forward_pass.held, self._key(adapter_name), x)
        mask_BT = None if forward_pass is None else forward_pass.prompt_mask_BT
        if forward_pass is None or mask_BT is None:
            mask_BT = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            return self._route_prompts(adapter_name, prompt_mean(x, mask_BT)[:, None] if x.ndim == 3 else x)
        if x.ndim != 3 or x.shape[:2] != mask_BT.shape:
            raise BaditError(
                f"{self.name} sees an input of shape {tuple(x.shape)}, the batch has {tuple(mask_BT.shape)} positions: "
                "leave it out of target_modules, or use routing='token'"
            )
        gates = self._route_prompts(adapter_name, prompt_mean(x, mask_BT.to(x.device))[:, None])
        if forward_pass.fills_cache:
            # A layer's name is a constant of compiled code, so that each layer would be compiled for itself.
            forward_pass.fresh[self._key(adapter_name)] = gates.detach()
        return gates

    def _key(self, adapter_name: str) -> str:
        """What a cache and a generation keep of this layer, they keep under this name."""
        return f"{self.name}.{adapter_name}"

    def _held(self, held: dict[str, torch.Tensor], key: str, x: torch.Tensor) -> torch.Tensor:
        gates = held.get(key)
        if gates is None:
            raise BaditError(
                "this cache was filled without the adapter, so it holds no routing of its prompt; "
                "fill it with the adapter active, or use routing='token'"
            )
        if gates.shape[0] != x.shape[0]:
            raise BaditError(
                f"this cache was filled with a batch of {gates.shape[0]}, the present batch has {x.shape[0]} rows"
            )
        return gates.to(x.device)

    def _route_prompts(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        if self.badit_config[adapter_name].router_input == "mean":
            return self._route(adapter_name, x)
        # Gradient checkpointing runs the layer again in the backward pass, on prompts that have been counted; and where
        # it is re-entrant, the first pass has no gradients.
        if self.training and not self.routing.runs_again():
            self._count_prompts(adapter_name, x.detach().flatten(0, -2))
        return self._route(adapter_name, standardised(x, cast(torch.Tensor, self.badit_moments[adapter_name])))

    @torch.no_grad()
    def _count_prompts(self, adapter_name: str, x_BI: torch.Tensor) -> None:
        moments_2I = cast(torch.Tensor, self.badit_moments[adapter_name])
        batches = cast(torch.Tensor, self.badit_batches[adapter_name])
        batches += 1
        moments_2I.copy_(updated_moments(moments_2I, batches, batch_moments(x_BI, _sum_over_ranks)))

    def _route(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        config = self.badit_config[adapter_name]
        logits = F.linear(x, self.badit_router[adapter_name]).float()
        gates = expert_gates(logits, kind=config.gates, top_k=config.top_k)  # pyright: ignore[reportArgumentType]
        if self.training and torch.is_grad_enabled():
            self._count_gates(adapter_name, gates.detach())
        return gates

    def _count_gates(self, adapter_name: str, gates: torch.Tensor) -> None:
        """Adds to the running sum of gates (K) and their number (last entry), which regrouping reads."""
        flat = gates.reshape(-1, gates.shape[-1])
        sums = torch.cat([flat.sum(dim=0), flat.new_full((1,), len(flat))])
        self.gate_sums[adapter_name] = sums + self.gate_sums.get(adapter_name, torch.zeros_like(sums))


def _sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


def _refuse_broken_labels(layer: BaditLayer, _: Any) -> None:
    """Labels come from a file like all other tensors, but a wrong one is an index out of range, or a lost component."""
    for adapter_name, labels_N in layer.badit_expert_of.items():
        config = layer.badit_config[adapter_name]
        labels_N = cast(torch.Tensor, labels_N)
        if labels_N.is_meta:
            continue
        expected_N = torch.arange(config.num_experts, device=labels_N.device).repeat_interleave(config.r)
        if not torch.equal(labels_N.sort().values, expected_N):
            raise BaditError(
                f"{layer.name}: badit_expert_of of adapter {adapter_name!r} does not give each of the "
                f"{config.num_experts} experts {config.r} components: the file is damaged"
            )


class BaditLinear(nn.Module, BaditLayer):
    """BADIT on ``nn.Linear`` or transformers' ``Conv1D``."""

    def __init__(
        self, base_layer: nn.Module, name: str, routing: RoutingContext, adapter_name: str, config: BaditConfig
    ) -> None:
        super().__init__()
        BaditLayer.__init__(self, base_layer, name, routing)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
        self.register_load_state_dict_post_hook(_refuse_broken_labels)

    # These two stand here and not in BaditLayer, which nn.Module precedes in the order of inheritance.
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A residual saved as the base weight would be folded a second time after loading.
        self.unfold()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Loading may replace A0, B0 or the base weight itself: a residual made of the old ones would be wrong.
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._weight_before_folding is None:
            self._prepare()
        return self._adapted(x, *args, **kwargs)

    def __repr__(self) -> str:
        return "badit." + super().__repr__()
