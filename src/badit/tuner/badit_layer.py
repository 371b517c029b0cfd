"""BADIT's layer: gates from the prompt or the position, and labels of experts that DOG changes.

Shape suffixes: B = batch, T = positions, S = segments of packed rows or prompts, I = in features,
K = experts, N = components, C = clusters, P = the tokens that a matrix of a fused weight receives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badit.method import (
    batch_moments,
    expert_gates,
    prompt_mean,
    segment_means,
    standardised,
    updated_moments,
)
from badit.method.routing import (
    cluster_gates,
    first_equal,
    nearest_clusters,
    prompt_centroids,
    random_codes,
)
from badit.support.errors import BaditError
from badit.tuner.config import BaditConfig
from badit.tuner.context import ForwardPass
from badit.tuner.distributed import gathered, sum_over_ranks
from badit.tuner.extension import (
    Extensions,
    extended_change,
    extension_gates,
    frozen_factors,
    parts_of,
)
from badit.tuner.layer import Buffers, ExpertLinear, Pair
from badit.tuner.prompt import Segments


class BaditLinear(ExpertLinear):
    """An adapted layer of BADIT.

    It also trains badit_router (K, I), and saves the labels badit_expert_of (N integers) and, if x̄
    is standardised, badit_moments (2, I), its mean and variance, and badit_batches, the number of
    batches in them. With clusters of prompts it has no router, but badit_centroids (C, I) and
    badit_codes (C, K), their gates; the moments are then those of :meth:`cluster`.
    """

    adapter_layer_names = (*ExpertLinear.adapter_layer_names, "badit_router")
    exact_buffers = (
        "badit_expert_of",
        "badit_moments",
        "badit_batches",
        "badit_centroids",
        "badit_codes",
        "badit_key",
        "badit_key_offset",
    )
    other_param_names = (
        *ExpertLinear.other_param_names,
        *exact_buffers,
        "badit_extensions",
        "trained_extensions",
        "gate_sums",
    )
    module_names = (*ExpertLinear.module_names, "badit_extensions")

    badit_router: nn.ParameterDict
    badit_expert_of: Buffers
    badit_moments: Buffers
    badit_batches: Buffers
    badit_centroids: Buffers
    badit_codes: Buffers
    badit_key: Buffers
    badit_key_offset: Buffers
    badit_extensions: nn.ModuleDict

    def __init__(self, *args: Any) -> None:
        # By adapter, for regrouping: the sums of its K gates in training and, as last entry, the
        # number of summands.
        self.gate_sums: dict[str, Tensor] = {}
        # By adapter with extensions, those that are trained (0: the adapter itself).
        self.trained_extensions: dict[str, frozenset[int]] = {}
        super().__init__(*args)
        self.routing.mask_readers.append(self)
        self.register_load_state_dict_post_hook(_refuse_broken_labels)

    def update_layer(self, adapter_name: str, config: BaditConfig) -> None:
        self.gate_sums.pop(adapter_name, None)  # of an earlier adapter of this name
        experts = torch.arange(config.num_experts)
        self.badit_expert_of[adapter_name] = experts.repeat_interleave(config.r)
        if config.router_input == "standardised":
            self.badit_batches[adapter_name] = torch.zeros(())
        if config.router_input == "standardised" and config.key == "layer":
            self.badit_moments[adapter_name] = torch.zeros(2, self.in_features)
        if config.gates == "clusters":
            self.routing.unclustered.append((self, adapter_name))
            codes_CK = torch.ones(config.num_clusters, config.num_experts) / config.num_experts
            self.badit_codes[adapter_name] = codes_CK
            self._add_centroids(adapter_name, config)
        else:
            router_KI = torch.zeros(config.num_experts, self.in_features)
            self.badit_router[adapter_name] = nn.Parameter(router_KI)
        self._add_extensions(adapter_name, config)
        super().update_layer(adapter_name, config)

    def _add_extensions(self, adapter_name: str, config: BaditConfig) -> None:
        self.trained_extensions[adapter_name] = frozenset({len(config.extensions)})
        features = 0
        stores = config.stores_clusters and config.routing == "prompt"
        if stores and self.routing.holds_extensions(self, adapter_name):
            features = self.routing.embedding_features
        if features or config.extensions:
            shape = (self.out_features, self.in_features)
            self.badit_extensions[adapter_name] = Extensions(config, features, shape)
        if config.extensions:
            self.routing.unstarted.add(adapter_name)
        if config.extensions or config.key == "embedding":
            self.routing.keyed.add(adapter_name)

    def extend(self, adapter_name: str, config: BaditConfig) -> None:
        """Adds the tensors of the last extension of a configuration, and trains only these."""
        self.badit_config[adapter_name] = config
        a_NI = self.badit_A[adapter_name]
        shape = (self.out_features, self.in_features)
        if adapter_name not in self.badit_extensions:
            self.badit_extensions[adapter_name] = Extensions(config, 0, shape)
        else:
            extensions: Any = self.badit_extensions[adapter_name]
            extensions.add(len(config.extensions), config.extensions[-1], *shape)
        self.badit_extensions[adapter_name].to(self.device, dtype=a_NI.dtype)
        self.routing.keyed.add(adapter_name)
        self.routing.unstarted.add(adapter_name)
        self.trained_extensions[adapter_name] = frozenset({len(config.extensions)})

    def trains_only_extensions(self, adapter_name: str) -> bool:
        """Returns whether the adapter's own experts stay frozen while extensions are trained."""
        trained = self.trained_extensions[adapter_name]
        return bool(self.badit_config[adapter_name].extensions) and 0 not in trained

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._freeze_earlier()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._freeze_earlier()

    def _freeze_earlier(self) -> None:
        """Trains only some extensions, after PEFT has made a whole adapter trainable or not."""
        self.routing.may_train_others = True
        extensions: Any
        for adapter_name, extensions in self.badit_extensions.items():
            if not self.badit_config[adapter_name].extensions:
                continue
            trained = self.trained_extensions[adapter_name]
            is_trained = self.badit_A[adapter_name].requires_grad
            extensions.train_only(trained if is_trained else ())
            for name in self.adapter_layer_names:
                if adapter_name in getattr(self, name):
                    getattr(self, name)[adapter_name].requires_grad_(is_trained and 0 in trained)

    def _add_centroids(self, adapter_name: str, config: BaditConfig) -> None:
        if config.key == "layer":
            self.badit_centroids[adapter_name] = torch.zeros(config.num_clusters, self.in_features)
        elif self.routing.holds_key(self, adapter_name):
            features = self.routing.embedding_features
            self.badit_key[adapter_name] = torch.zeros(config.num_clusters, features)
            self.badit_key_offset[adapter_name] = torch.zeros(config.num_clusters)

    # A cast of the model, or PEFT's to the base layer's dtype, changes neither dtypes nor values of
    # the exact buffers.
    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with self._exact():
            return super()._apply(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        with self._exact():
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        all_buffers = [getattr(self, name) for name in self.exact_buffers]
        before = [dict(buffers) for buffers in all_buffers]
        yield
        for buffers, values in zip(all_buffers, before, strict=True):
            for adapter, value in values.items():
                if not value.is_meta:
                    buffers[adapter] = value.to(buffers[adapter].device)

    def expert_of(self, adapter_name: str) -> Tensor:
        return self.badit_expert_of[adapter_name]

    def num_gates(self, adapter_name: str) -> int:
        return self.badit_config[adapter_name].num_gates

    def component_gates(self, adapter_name: str, x: Tensor) -> Tensor:
        return self.gates(adapter_name, x)[..., self.expert_of(adapter_name)]

    def change(self, adapter_name: str, x: Tensor) -> Tensor:
        if self.badit_config[adapter_name].extensions:
            parts = parts_of(self.routing, adapter_name)
            if parts.whole != 0:
                return extended_change(self, adapter_name, x, parts)
        factors = self._stored_factors(adapter_name, x)
        if factors is not None:
            return self.product(adapter_name, x, *factors)
        return super().change(adapter_name, x)

    def _stored_factors(
        self, adapter_name: str, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Returns A, B and the scale of their components during a ``generate`` routed by prompt.

        They stay the same from the first new token on.
        """
        by_token = self.badit_config[adapter_name].routing == "token" or self.tokens_P is not None
        if by_token or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        stored = self.routing.forward_pass().stored
        if stored is None:
            return None
        key = self._key(adapter_name)
        if key not in stored:
            gates = self.component_gates(adapter_name, x)
            a_PI, b_OM, scale = self.gated_factors(adapter_name, gates)
            # One row, or the same gates in all rows.
            if not self.drops_change(adapter_name) and len(scale) == 1:
                b_OM = b_OM * scale.flatten().to(b_OM.dtype)
                scale = None
            stored[key] = (a_PI, b_OM, scale)
        return stored[key]

    def gates(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the gates for x (B, T, I), of experts and then of extensions."""
        if self.badit_config[adapter_name].extensions:
            parts = parts_of(self.routing, adapter_name)
            return extension_gates(self, adapter_name, x, parts)
        return self.gates_of_experts(adapter_name, x)

    def gates_of_experts(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the gates of the experts for x (B, T, I).

        Their shape is (B, 1, K) for routing by prompt, (B, T, K) for routing by token and for
        packed rows. For x (B, I), as in models without positions, it is (B, K).
        """
        if self.badit_config[adapter_name].routing == "token":
            return self._route(adapter_name, x)
        forward_pass = self.routing.forward_pass()
        if forward_pass.held is not None:
            return self._held_gates(adapter_name, x, forward_pass.held)
        if self.badit_config[adapter_name].key == "embedding":
            return self._gates_by_key(adapter_name, x, forward_pass)
        mask_BT, segments = forward_pass.prompt
        if mask_BT is None:  # the whole input is the prompt
            mask_BT = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            prompts = prompt_mean(x, mask_BT)[:, None] if x.ndim == 3 else x
            return self._route_prompts(adapter_name, prompts)

        # The same in training, with labels, and in generation, before the first new token.
        means_SI = self._prompt_means(x, mask_BT, segments)
        if segments is not None:  # each position of packed rows has the gates of its segment
            return self._route_prompts(adapter_name, means_SI)[segments.of_BT.to(x.device)]
        gates = self._route_prompts(adapter_name, means_SI[:, None])
        self._keep_for_decoding(adapter_name, gates, forward_pass)
        return gates

    def _keep_for_decoding(
        self, adapter_name: str, gates: Tensor, forward_pass: ForwardPass
    ) -> None:
        """Keeps the gates of a pass that fills a cache."""
        if forward_pass.fills_cache:
            # Only then: a layer's name in compiled code makes torch.compile compile every layer
            # separately.
            key = self._key(adapter_name)
            if key in forward_pass.fresh and self.badit_config[adapter_name].key == "layer":
                forward_pass.repeated.add(key)
            forward_pass.fresh[key] = gates.detach()

    def _gates_by_key(self, adapter_name: str, x: Tensor, forward_pass: ForwardPass) -> Tensor:
        """Returns the gates of the clusters of a pass, which are those of all layers."""
        cluster_S = self.routing.clusters(adapter_name)
        gates_SK = self.badit_codes[adapter_name].float()[cluster_S.to(x.device)]
        if self.training and torch.is_grad_enabled():
            means_SE: Any = forward_pass.mean_embeddings_SE  # not None: it has given the clusters
            self._add_to_gate_sums(adapter_name, means_SE.to(x.device), gates_SK)
        _, segments = forward_pass.prompt
        batch_shape = (len(gates_SK), x.shape[1]) if segments is None else segments.of_BT.shape
        has_positions = self.tokens_P is None and x.ndim == 3
        if has_positions and x.shape[:2] != batch_shape:
            # Such as the output layer of a loss that reads only the answers' positions.
            self._refuse_shape(x, batch_shape)
        if segments is not None:
            return gates_SK[segments.of_BT.to(x.device)]
        gates = gates_SK[:, None]
        if x.ndim == 2 and self.tokens_P is None:
            gates = gates_SK
        self._keep_for_decoding(adapter_name, gates, forward_pass)
        return gates

    def _held_gates(self, adapter_name: str, x: Tensor, held: dict[str, Tensor]) -> Tensor:
        """Returns the gates on the pass's cache."""
        gates = held.get(self._key(adapter_name))
        if gates is None:
            raise BaditError(
                f"{self.name}: this cache has no gates for its prompt, because it was filled "
                "without the adapter or the module runs several times in a pass; fill it with the "
                "adapter active, or use routing='token'"
            )
        rows = len(x) if self.tokens_P is None else self.batch_shape()[0]
        if len(gates) != rows:
            raise BaditError(
                f"this cache was filled with a batch of {len(gates)} rows, but the batch now has "
                f"{rows}"
            )
        return gates.to(x.device)

    def _prompt_means(self, x: Tensor, mask_BT: Tensor, segments: Segments | None) -> Tensor:
        """Returns x̄ (S, I) of each row or, in packed rows, each segment."""
        tokens_P = self.tokens_P
        if tokens_P is None and (x.ndim != 3 or x.shape[:2] != mask_BT.shape):
            self._refuse_shape(x, mask_BT.shape)
        mask_BT = mask_BT.to(x.device)
        if tokens_P is None and segments is None:
            return prompt_mean(x, mask_BT)
        of_BT, number = segments or Segments.rows(mask_BT)
        of_BT = of_BT.to(x.device)
        if tokens_P is None:
            return segment_means(x, mask_BT, of_BT, number)
        # The mean over the prompt's tokens that reach the matrix.
        mask_P = mask_BT.flatten()[tokens_P]
        return segment_means(x[None], mask_P[None], of_BT.flatten()[tokens_P][None], number)

    def _refuse_shape(self, x: Tensor, batch_shape: Sequence[int]) -> NoReturn:
        raise BaditError(
            f"{self.name}: the input has shape {tuple(x.shape)}, but the batch has "
            f"{tuple(batch_shape)}; leave it out of target_modules, or use routing='token'"
        )

    def _route_prompts(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the gates (…, K) of prompts, for their x̄ (…, I)."""
        if self.badit_config[adapter_name].router_input == "mean":
            return self._route(adapter_name, x)
        if self.routing.prompt_means is not None:  # start_task() collects them
            means_SI = x.flatten(0, -2).float().cpu()
            self.routing.prompt_means[self._key(adapter_name)].append(means_SI)
        moments_2I = self._moments(adapter_name, x)
        return self._route(adapter_name, standardised(x, moments_2I.float()))

    def _moments(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the moments (2, I) for x̄ (…, I), which a training pass with a router updates."""
        moments_2I = self.badit_moments[adapter_name]
        forward_pass = self.routing.forward_pass()
        if self.routing.runs_again():
            # Gradient checkpointing: the prompts are already counted, and later passes may have
            # changed the moments.
            return forward_pass.moments.get(self._key(adapter_name), moments_2I)
        router = self.badit_router.get(adapter_name)
        in_training = self.training and forward_pass.begun_with_gradients
        if not in_training or router is None or not router.requires_grad:
            return moments_2I
        with torch.no_grad():
            new_2I = batch_moments(x.detach().flatten(0, -2), sum_over_ranks)
            usable = new_2I.isfinite().all()  # otherwise an overflow would remain in the moments
            batches = self.badit_batches[adapter_name]
            batches += usable
            last_2I = moments_2I.float()
            updated_2I = updated_moments(last_2I, batches.float().clamp_min(1), new_2I)
            moments_2I.copy_(torch.where(usable, updated_2I, last_2I))
        if not torch.compiler.is_compiling():  # see `gates` for the layer's name
            forward_pass.moments[self._key(adapter_name)] = moments_2I.clone()
        return moments_2I

    def _route(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the gates (…, K) for the input of the gates, x (…, I)."""
        config = self.badit_config[adapter_name]
        if config.gates == "clusters":
            centroids_CI = self.badit_centroids[adapter_name]
            gates = cluster_gates(x, centroids_CI, self.badit_codes[adapter_name])
        else:
            logits = F.linear(x, self.badit_router[adapter_name]).float()
            gates = expert_gates(logits, kind=config.gates, top_k=config.top_k)
        if self.training and torch.is_grad_enabled():
            self._add_to_gate_sums(adapter_name, x, gates)
        return gates

    def _add_to_gate_sums(self, adapter_name: str, x: Tensor, gates: Tensor) -> None:
        counts = torch.ones_like(gates[..., :1])
        if self.badit_config[adapter_name].routing == "prompt":
            # The padding of packed rows has no prompt: its input is zero.
            counts = x.detach().any(dim=-1, keepdim=True).to(gates)
        sums = torch.cat([gates.detach() * counts, counts], dim=-1).flatten(0, -2).sum(dim=0)
        earlier = self.gate_sums.get(adapter_name, torch.zeros_like(sums))
        # The sums are not a buffer: moving the model does not move them.
        self.gate_sums[adapter_name] = sums + earlier.to(sums.device)

    def frozen_factors(self, adapter_name: str, gates_K: Tensor | None = None) -> Pair:
        config = self.badit_config[adapter_name]
        if not config.extensions or gates_K is None:
            return super().frozen_factors(adapter_name, gates_K)
        # Prompts of the adapter's own tasks use no extension.
        if not gates_K[config.num_experts :].any():
            return super().frozen_factors(adapter_name, gates_K[: config.num_experts])
        return frozen_factors(self, adapter_name, gates_K)

    def is_clustered(self, adapter_name: str) -> bool:
        """Returns whether an adapter has clusters of prompts; on the meta device, it needs none."""
        batches = self.badit_batches[adapter_name]
        return batches.is_meta or bool(batches)

    @torch.no_grad()
    def cluster(self, adapter_name: str, means_SI: Tensor) -> int:
        """Sets moments, centroids and random codes from x̄ (S, I) of training prompts.

        All ranks get those of rank 0. Returns the number of distinct centroids on this rank. The
        caller sets ``badit_batches`` to 1 once the adapter can be trained.
        """
        codes_CK = self.badit_codes[adapter_name]
        # NaN in one prompt would reach the moments of all features.
        means_SI = means_SI.nan_to_num(0.0, 0.0, 0.0)
        # NaN without any prompt, as for some experts of an MoE.
        moments_2I = batch_moments(means_SI).nan_to_num(0.0)
        # Equal prompts differ by rounding.
        moments_2I[1] *= moments_2I[1].sum() > 1e-10 * moments_2I[0].square().sum()
        centroids_CI = prompt_centroids(standardised(means_SI, moments_2I), len(codes_CK))
        # Fewer prompts than clusters give equal centroids; rounding must not choose between their
        # codes.
        first_equal_C = first_equal(centroids_CI)
        codes_CK.copy_(gathered(random_codes(*codes_CK.shape)[first_equal_C])[0])
        self.badit_moments[adapter_name].copy_(gathered(moments_2I)[0])
        self.badit_centroids[adapter_name].copy_(gathered(centroids_CI)[0])
        return len(first_equal_C.unique())

    def clusters_of(self, adapter_name: str, means_SI: Tensor) -> Tensor:
        """Returns the clusters (S) of prompts with the means x̄ (S, I)."""
        moments_2I = self.badit_moments[adapter_name]
        standardised_SI = standardised(means_SI.to(moments_2I.device), moments_2I.float())
        return nearest_clusters(standardised_SI, self.badit_centroids[adapter_name])

    def reads_prompt(self) -> bool:
        configs = [self.badit_config[adapter] for adapter in self.running_adapters]
        return any(config.routing == "prompt" for config in configs)

    def _key(self, adapter_name: str) -> str:
        """Returns the layer's key in the dicts of a ForwardPass."""
        return f"{self.name}.{adapter_name}"


Place = tuple[BaditLinear, str]  # a layer and the name of one of its adapters


def _refuse_broken_labels(layer: BaditLinear, _: Any) -> None:
    for adapter_name, labels_N in layer.badit_expert_of.items():
        config = layer.badit_config[adapter_name]
        expected = sorted(list(range(config.num_experts)) * config.r)
        if not labels_N.is_meta and sorted(labels_N.tolist()) != expected:
            raise BaditError(
                f"{layer.name}: badit_expert_of of {adapter_name!r} does not give each of the "
                f"{config.num_experts} experts {config.r} components; the file is damaged"
            )
    for adapter_name, extensions in layer.badit_extensions.items():
        config = layer.badit_config[adapter_name]
        for number in range(1, len(config.extensions) + 1):
            used_U = getattr(extensions, f"used_{number}")
            earlier = config.num_experts + number - 1
            if not used_U.is_meta and not all(0 <= used < earlier for used in used_U.tolist()):
                raise BaditError(
                    f"{layer.name}: used_{number} of {adapter_name!r} names an expert that is not "
                    "an earlier one; the file is damaged"
                )
