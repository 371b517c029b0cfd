"""Extensions of a trained adapter: later tasks with their own clusters, expert and gates.

An adapted layer with extensions computes, for the rows whose prompts belong to extension e,

    y = W x + s · (B_e A_e x + Σ_k g_k Δ_k x)

Δ_k are at most a few earlier abilities: experts of the adapter (their change since step 0) or of
earlier extensions. They are frozen, their gates g_k are trained with A_e and B_e. All other rows
are computed as without this extension. A pass whose rows all belong to one extension multiplies the
whole batch by its factors, so its result does not depend on extensions that were added later.
Otherwise the rows of each extension are a batch of their own.

The extension of a prompt is that of the nearest centroid of the global key
(:mod:`badit.method.abilities`). Number 0 stands for the adapter without its extensions. With
``mixing``, a prompt may have two extensions: its gates are the sum of theirs, times their shares.

Shape suffixes: B = rows, T = positions, S = prompts (rows, or segments of packed rows), E =
features of an embedding, C = clusters, I/O = in/out features, R = rank of an extension, U = earlier
abilities that an extension uses, G = gates of experts and extensions, P = rank of all factors, X =
extensions of a prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badit.method.abilities import scores_of, whitened
from badit.method.extension import PRINCIPAL_COMPONENTS, mixing_shares
from badit.support.console import status
from badit.support.errors import BaditError
from badit.tuner.config import BaditConfig, Extension
from badit.tuner.context import ForwardPass, RoutingContext
from badit.tuner.keys import moments_of

#: Prefixes of the tensors that a cast of the model does not change.
_EXACT = ("used_", "directions_", "offsets_", "means_", "spread_", "counts_")


class Extensions(nn.Module):
    """The tensors of one layer and adapter, numbered by extension (0: the adapter itself).

    Trained: A_e (R, I), B_e (O, R) and gates_e (U). Buffers: used_e (U), the abilities that
    extension e uses, numbered from the experts of the adapter on. The layer that ``features`` are
    given for has the clusters of the whole model: directions_e (C, E) and offsets_e (C), which
    score a prompt's mean embedding, and of the training prompts' keys the mean (C, E), the
    principal components spread_e (C, 8, E) and the number counts_e (C, tasks).
    """

    def __init__(self, config: BaditConfig, features: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.features = features
        if features:
            self._add_clusters(0, config.num_clusters, max(1, len(config.tasks or ())))
        for number, extension in enumerate(config.extensions, start=1):
            self.add(number, extension, *shape)

    def add(self, number: int, extension: Extension, out_features: int, in_features: int) -> None:
        """Adds the tensors of an extension, without values."""
        rank = extension.rank
        self.register_parameter(f"A_{number}", nn.Parameter(torch.zeros(rank, in_features)))
        self.register_parameter(f"B_{number}", nn.Parameter(torch.zeros(out_features, rank)))
        self.register_parameter(f"gates_{number}", nn.Parameter(torch.zeros(extension.used)))
        self.register_buffer(f"used_{number}", torch.zeros(extension.used, dtype=torch.long))
        if self.features and extension.clusters:
            self._add_clusters(number, extension.clusters, len(extension.tasks))
            # Until its clusters are found, no prompt belongs to it.
            self.of("offsets", number).fill_(-torch.inf)

    def _add_clusters(self, number: int, clusters: int, tasks: int) -> None:
        self.register_buffer(f"directions_{number}", torch.zeros(clusters, self.features))
        self.register_buffer(f"offsets_{number}", torch.zeros(clusters))
        self.register_buffer(f"means_{number}", torch.zeros(clusters, self.features))
        components = (clusters, PRINCIPAL_COMPONENTS, self.features)
        self.register_buffer(f"spread_{number}", torch.zeros(components))
        self.register_buffer(f"counts_{number}", torch.zeros(clusters, tasks))

    def of(self, kind: str, number: int) -> Tensor:
        """Returns a tensor, such as A of extension 2."""
        return getattr(self, f"{kind}_{number}")

    def has_clusters(self, number: int) -> bool:
        """Returns whether an extension has clusters; on the meta device, none are found."""
        counts_CT = getattr(self, f"counts_{number}", None)
        return counts_CT is not None and (counts_CT.is_meta or bool(counts_CT.any()))

    def needs_clusters(self, number: int) -> bool:
        """Returns whether start_task has not yet found the clusters of an extension that has some.

        An extension without any is an expert that only later tasks still use.
        """
        return hasattr(self, f"counts_{number}") and not self.has_clusters(number)

    def train_only(self, numbers: Iterable[int]) -> None:
        """Makes the tensors of these extensions trainable, and freezes the others."""
        trained = {f"{kind}_{number}" for number in numbers for kind in ("A", "B", "gates")}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)

    # A cast of the model changes neither dtypes nor values of these buffers.
    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        before = {name: value for name, value in self.named_buffers() if name.startswith(_EXACT)}
        super()._apply(*args, **kwargs)
        for name, value in before.items():
            if not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self


class Part(NamedTuple):
    """The rows of a pass whose prompts have the same extensions."""

    numbers: Sequence[int]  # one extension, or two that are mixed
    rows_R: Tensor
    share_RX: Tensor  # of the extensions, for each row


class Parts(NamedTuple):
    """The division of a pass by extension."""

    parts: Sequence[Part]
    # Of packed rows, whose positions are divided instead of rows.
    segment_BT: Tensor | None = None
    # The extension of all rows; then there are no parts.
    whole: int | None = None

    def select(self, x: Tensor, rows: Tensor) -> Tensor:
        """Returns the rows (or positions of packed rows) of a part of x (B, …)."""
        if self.segment_BT is not None:
            x = x.flatten(0, 1)
        return x.index_select(0, rows.to(x.device))

    def without_extensions(self, x: Tensor) -> Tensor:
        """Returns x (B, …) with zeros in the rows of extensions: such a row has no prompt."""
        flat = x if self.segment_BT is None else x.flatten(0, 1)
        is_own = torch.zeros(len(flat), dtype=torch.bool, device=x.device)
        for numbers, rows_R, _ in self.parts:
            if 0 in numbers:
                is_own[rows_R.to(x.device)] = True
        return torch.where(is_own.view(-1, *[1] * (flat.ndim - 1)), flat, 0.0).view_as(x)


def parts_of(routing: RoutingContext, adapter: str) -> Parts:
    """Returns the division of the running pass by extension."""
    forward_pass = routing.forward_pass()
    if adapter not in forward_pass.parts:
        forward_pass.parts[adapter] = _find_parts(routing, adapter, forward_pass)
    return forward_pass.parts[adapter]


def _find_parts(routing: RoutingContext, adapter: str, forward_pass: ForwardPass) -> Parts:
    key, key_of_shares = f"extensions of {adapter}", f"shares of {adapter}"
    if forward_pass.held is not None:
        if key not in forward_pass.held:
            raise BaditError(
                "this cache was filled without the adapter's extensions; fill it again"
            )
        return _divided(forward_pass.held[key], forward_pass.held[key_of_shares], None)
    forced = routing.extension_in_training.get(adapter)
    if forced is not None and forward_pass.begun_with_gradients:
        holder = routing.extension_holders[adapter]
        # In evaluation mode only before start_task has found the extension's clusters.
        if holder.training or not holder.badit_extensions[adapter].has_clusters(forced):
            return Parts((), whole=forced)
    means_SE = forward_pass.mean_embeddings_SE
    if means_SE is None:
        raise BaditError(
            "an adapter with later tasks needs the prompt's embeddings; call the whole model with "
            "input_ids"
        )
    number_SX, share_SX = _extensions_of_prompts(routing, adapter, forward_pass, means_SE)
    _, segments = forward_pass.prompt
    # A segment of padding has no prompt, and must not divide the pass.
    has_prompt_S1 = means_SE.any(dim=1, keepdim=True)
    first = has_prompt_S1.int().argmax()
    number_SX = torch.where(has_prompt_S1, number_SX, number_SX[first]).cpu()
    share_SX = torch.where(has_prompt_S1, share_SX, share_SX[first]).cpu()
    if segments is None and forward_pass.fills_cache:
        forward_pass.fresh |= {key: number_SX, key_of_shares: share_SX}
    return _divided(number_SX, share_SX, None if segments is None else segments.of_BT)


def _extensions_of_prompts(
    routing: RoutingContext, adapter: str, forward_pass: ForwardPass, means_SE: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the extensions (S, X) of prompts and their shares (S, X), for X of 1 or 2."""
    holder = routing.extension_holders[adapter]
    config: BaditConfig = holder.badit_config[adapter]
    if not config.mixing or holder.training:
        number_S1 = nearest_extensions(holder, adapter, means_SE)[:, None]
        return number_S1, torch.ones_like(number_S1, dtype=torch.float32)
    if routing.key_moments is None:
        with status("reading the embeddings of the vocabulary, for extend.mixing", in_logs=True):
            routing.key_moments = moments_of(forward_pass.embedding)
    mean_E, whitening_EE = (moment.to(means_SE.device) for moment in routing.key_moments)
    norm_S1 = whitened(means_SE, mean_E, whitening_EE).norm(dim=1, keepdim=True)
    numbers, scores_SC, _ = _extension_scores(holder, adapter, means_SE)
    cosines_SC = scores_SC / norm_S1.clamp_min(torch.finfo(norm_S1.dtype).tiny)
    index_SX, share_SX = mixing_shares(cosines_SC, config.mixing)
    return torch.tensor(numbers, device=index_SX.device)[index_SX], share_SX


def _divided(number_SX: Tensor, share_SX: Tensor, segment_BT: Tensor | None) -> Parts:
    # Two prompts between the same tasks are one part, whichever is nearer to each.
    number_SX, order_SX = number_SX.sort(dim=1)
    share_SX = share_SX.gather(1, order_SX)
    of_prompts = [
        tuple(number for number, share in zip(numbers, shares, strict=True) if share)
        for numbers, shares in zip(number_SX.tolist(), share_SX.tolist(), strict=True)
    ]
    different = sorted(set(of_prompts))
    if len(different) == 1 and len(different[0]) == 1:
        return Parts((), segment_BT, whole=different[0][0])
    of_S = torch.tensor([different.index(numbers) for numbers in of_prompts])
    if segment_BT is not None:
        segment_R = segment_BT.cpu().flatten()
        of_S, share_SX = of_S[segment_R], share_SX[segment_R]
    parts = []
    for index, numbers in enumerate(different):
        rows_R = (of_S == index).nonzero().flatten()
        share_RX = share_SX[rows_R] if len(numbers) > 1 else torch.ones(len(rows_R), 1)
        parts.append(Part(numbers, rows_R, share_RX))
    return Parts(parts, segment_BT)


def nearest_extensions(layer: Any, adapter: str, means_SE: Tensor) -> Tensor:
    """Returns the extension (S) of the nearest centroid, for mean embeddings (S, E) of prompts.

    ``layer`` has the clusters of the adapter. Of equally near ones, the earliest is returned.
    """
    number_S, _ = nearest_clusters(layer, adapter, means_SE)
    return number_S


def nearest_clusters(layer: Any, adapter: str, means_SE: Tensor) -> tuple[Tensor, Tensor]:
    """Returns like :func:`nearest_extensions`, and the numbers (S) of the clusters in them."""
    numbers, scores_SC, cluster_SC = _extension_scores(layer, adapter, means_SE)
    index_S = scores_SC.argmax(dim=1)
    number_S = torch.tensor(numbers, device=means_SE.device)[index_S]
    return number_S, cluster_SC.gather(1, index_S[:, None])[:, 0]


def _extension_scores(
    layer: Any, adapter: str, means_SE: Tensor
) -> tuple[list[int], Tensor, Tensor]:
    """Returns the extensions with clusters, their scores (S, C) and their nearest clusters (S, C).

    C are these extensions. A score is that of the nearest cluster.
    """
    extensions: Extensions = layer.badit_extensions[adapter]
    numbers, scores, clusters = [], [], []
    for number in with_clusters(layer, adapter):
        directions_CE = extensions.of("directions", number)
        scores_SC = scores_of(means_SE, directions_CE, extensions.of("offsets", number))
        score_S, cluster_S = scores_SC.max(dim=1)
        numbers.append(number)
        scores.append(score_S)
        clusters.append(cluster_S)
    return numbers, torch.stack(scores, dim=1), torch.stack(clusters, dim=1)


def with_clusters(layer: Any, adapter: str) -> Iterator[int]:
    """Yields the numbers of the extensions that prompts can belong to."""
    config: BaditConfig = layer.badit_config[adapter]
    yield 0
    for number, extension in enumerate(config.extensions, start=1):
        if extension.clusters:
            yield number


def extension_gates(layer: Any, adapter: str, x: Tensor, parts: Parts) -> Tensor:
    """Returns the gates (S, 1, G) of experts and extensions, or (B, T, G) for packed rows."""
    config: BaditConfig = layer.badit_config[adapter]
    later = len(config.extensions)
    if parts.whole == 0:
        return F.pad(layer.gates_of_experts(adapter, x), (0, later))
    if parts.whole is not None:
        rows = len(x)
        code_G = extension_code(layer, adapter, parts.whole)
        return code_G.expand(rows, 1, -1) if x.ndim == 3 else code_G.expand(rows, -1)
    if layer.training:
        # A router's moments, and the mean gates, are those of the prompts of the joint training.
        x = parts.without_extensions(x)
    gates = F.pad(layer.gates_of_experts(adapter, x), (0, later))
    flat = gates.flatten(0, 1) if parts.segment_BT is not None else gates
    for part in parts.parts:
        if part.numbers == (0,):
            continue
        rows_R = part.rows_R.to(flat.device)
        of_rows = _gates_of_part(layer, adapter, part, flat.index_select(0, rows_R))
        flat = flat.index_copy(0, rows_R, of_rows)
    return flat.view_as(gates)


def _gates_of_part(layer: Any, adapter: str, part: Part, of_experts: Tensor) -> Tensor:
    """Returns the gates (R, …, G) of the rows of a part, for those of the adapter's own experts."""
    total = torch.zeros_like(of_experts)
    for number, share_R in zip(part.numbers, part.share_RX.T, strict=True):
        of_number = extension_code(layer, adapter, number) if number else of_experts
        share = share_R.to(of_experts).view(-1, *[1] * (of_experts.ndim - 1))
        total = total + share * of_number.to(of_experts.dtype)
    return total


def extension_code(layer: Any, adapter: str, number: int) -> Tensor:
    """Returns the gates (G) of an extension: 1 of its own expert, and those of the used ones."""
    config: BaditConfig = layer.badit_config[adapter]
    extensions: Extensions = layer.badit_extensions[adapter]
    gates_U = extensions.of("gates", number)
    code_G = gates_U.new_zeros(config.num_gates)
    code_G = code_G.index_copy(0, extensions.of("used", number), gates_U)
    own = torch.tensor(config.num_experts + number - 1, device=gates_U.device)
    return code_G.index_fill(0, own, 1.0)


def extended_change(layer: Any, adapter: str, x: Tensor, parts: Parts) -> Tensor:
    """Returns what an adapter with extensions adds to a layer's output for x (B, T, I) or (B, I).

    At least one row belongs to an extension.
    """
    gates = layer.gates(adapter, x)
    if parts.whole is not None:
        return _change_of(layer, adapter, (parts.whole,), x, gates)
    total = x.new_zeros(*x.shape[:-1], layer.out_features)
    flat = total.flatten(0, 1) if parts.segment_BT is not None else total
    for numbers, rows_R, _ in parts.parts:
        change = _change_of(
            layer, adapter, numbers, parts.select(x, rows_R), parts.select(gates, rows_R)
        )
        flat = flat.index_copy(0, rows_R.to(flat.device), change.to(flat.dtype))
    return flat.view_as(total)


def _change_of(
    layer: Any, adapter: str, numbers: Sequence[int], x: Tensor, gates: Tensor
) -> Tensor:
    """Returns the change of rows that have these extensions, for all their gates."""
    config: BaditConfig = layer.badit_config[adapter]
    abilities: dict[int, None] = {}  # in order, and each once: mixed extensions may use the same
    for number in numbers:
        if number:
            used = layer.badit_extensions[adapter].of("used", number).tolist()
            abilities |= dict.fromkeys([config.num_experts + number - 1, *used])
    if 0 not in numbers:
        return _change_of_abilities(layer, adapter, [*abilities], x, gates)
    of_components = gates[..., layer.expert_of(adapter)]
    change = layer.change_by_gates(adapter, x, of_components)
    of_extensions = [ability for ability in abilities if ability >= config.num_experts]
    if of_extensions:
        change = change + _change_of_abilities(layer, adapter, of_extensions, x, gates)
    return change


def _change_of_abilities(
    layer: Any, adapter: str, abilities: Sequence[int], x: Tensor, gates: Tensor
) -> Tensor:
    """Returns s · Σ_k g_k Δ_k x, where Δ_k is B_e A_e of an extension."""
    config: BaditConfig = layer.badit_config[adapter]
    pairs = [ability_factors(layer, adapter, ability) for ability in abilities]
    a_PI = torch.cat([a_RI for a_RI, _ in pairs])
    b_OP = torch.cat([b_OR for _, b_OR in pairs], dim=1)
    index_P = [k for k, (a_RI, _) in zip(abilities, pairs, strict=True) for _ in range(len(a_RI))]
    hidden = F.linear(layer.badit_dropout[adapter](x), a_PI)
    scale = config.scaling * gates[..., index_P]
    return F.linear(hidden * scale.to(hidden.dtype), b_OP)


def ability_factors(layer: Any, adapter: str, ability: int) -> tuple[Tensor, Tensor]:
    """Returns A (R, I) and B (O, R) of an ability, whose product is its change since step 0."""
    config: BaditConfig = layer.badit_config[adapter]
    if ability >= config.num_experts:
        extensions: Extensions = layer.badit_extensions[adapter]
        number = ability - config.num_experts + 1
        return extensions.of("A", number), extensions.of("B", number)
    # A sort, because looking for the expert's components would wait for the device.
    order_N = layer.expert_of(adapter).argsort(stable=True)
    own_R = order_N[ability * config.r : (ability + 1) * config.r]
    a_RI, b_OR = (layer.badit_A[adapter][own_R], layer.badit_B[adapter][:, own_R])
    if not config.subtracted_share:
        return a_RI, b_OR
    a0_RI, b0_OR = (layer.badit_A0[adapter][own_R], layer.badit_B0[adapter][:, own_R])
    return torch.cat([a_RI, a_RI - a0_RI]), torch.cat([b_OR - b0_OR, b0_OR], dim=1)


@torch.no_grad()
def frozen_factors(layer: Any, adapter: str, gates_G: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A (P, I) and B (O, P), with the scaling, of the experts with gates other than 0."""
    config: BaditConfig = layer.badit_config[adapter]
    a_rows, b_columns = [], []
    for ability, gate in enumerate(gates_G.tolist()):
        if gate:
            a_RI, b_OR = ability_factors(layer, adapter, ability)
            a_rows.append(a_RI.float())
            b_columns.append(config.scaling * gate * b_OR.float())
    return torch.cat(a_rows), torch.cat(b_columns, dim=1)


@torch.no_grad()
def ability_gram(layer: Any, adapter: str) -> Tensor:
    """Returns the inner products (G, G) of the products B A of all experts and extensions."""
    config: BaditConfig = layer.badit_config[adapter]
    pairs = [ability_factors(layer, adapter, ability) for ability in range(config.num_gates)]
    a_PI = torch.cat([a_RI.float() for a_RI, _ in pairs])
    b_OP = torch.cat([b_OR.float() for _, b_OR in pairs], dim=1)
    of_P = [ability for ability, (a_RI, _) in enumerate(pairs) for _ in range(len(a_RI))]
    of_ability_PG = F.one_hot(torch.tensor(of_P), config.num_gates).to(a_PI)
    gram_PP = (b_OP.T @ b_OP) * (a_PI @ a_PI.T)
    return of_ability_PG.T @ gram_PP @ of_ability_PG
