"""Abilities before training: clusters of prompts for the whole model, and each layer's codes.

:meth:`BaditModel.start_task` calls :func:`find_abilities` for adapters with ``key="embedding"``.
The formulas are in :mod:`badit.method.abilities`. Gradients are those at step 0, with all gates 1.

Shape suffixes: T = positions of one example, E = features of an embedding, S = prompts, C =
clusters, K = experts, N = components, L = layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from badit.method.abilities import (
    centred_gram,
    cluster_cosines,
    grouped_codes,
    key_scores,
    labels_by_use,
    matched_codes,
    mean_overlap,
    permuted,
    prompt_keys,
    target_overlap,
    vocabulary_moments,
    with_norm_of,
)
from badit.method.grouping import group_components
from badit.method.routing import prompt_centroids, random_codes
from badit.method.sketches import SketchedSums
from badit.support.console import say
from badit.tuner.badit_layer import BaditLinear
from badit.tuner.distributed import gathered, sum_over_ranks
from badit.tuner.prompt import IGNORED_LABEL, Segments

#: Mean cosine of the halves of a cluster's gradient, below which codes are random.
LEAST_RELIABILITY = 0.1
_PER_HALF = 4  # examples whose gradients are averaged
_SKETCH_SIZE = 4096  # numbers per layer, cluster and half
_IDS_AT_A_TIME = 8192


class Example(NamedTuple):
    """A prompt with its answer, without padding."""

    input_ids_T: Tensor
    labels_T: Tensor
    prompt_T: Tensor
    is_packed: bool = False

    @property
    def prompt_ids(self) -> Tensor:
        return self.input_ids_T[self.prompt_T]

    @property
    def has_prompt(self) -> bool:
        """Whether some token is meant as prompt.

        No position predicts the first token, so it is always prompt. Its label shows whether it is
        meant to be; collators of packed rows remove this label.
        """
        is_answer = self.is_packed or bool((self.labels_T[self.prompt_T] != IGNORED_LABEL).any())
        return int(self.prompt_T.sum()) > 1 or not is_answer

    @property
    def has_answer(self) -> bool:
        # No position predicts the label of the first token.
        return bool((self.labels_T[1:] != IGNORED_LABEL).any())


def examples_in(
    batch: Mapping[str, Tensor], prompt_BT: Tensor, segments: Segments | None
) -> Iterator[Example]:
    """Yields the examples of a batch, also those of packed rows."""
    ids_BT = batch["input_ids"]
    labels_BT = batch.get("labels")
    if labels_BT is None:
        labels_BT = torch.full_like(ids_BT, IGNORED_LABEL)
    attended_BT = batch.get("attention_mask")
    if attended_BT is None or attended_BT.shape != ids_BT.shape:
        attended_BT = torch.ones_like(ids_BT)
    of_BT, number = segments or Segments.rows(ids_BT)
    for segment in range(number):
        is_own_BT = (of_BT == segment) & attended_BT.bool()
        if (prompt_BT & is_own_BT).any():  # not the padding of packed rows
            is_packed = segments is not None
            rows = (ids_BT[is_own_BT], labels_BT[is_own_BT], prompt_BT[is_own_BT])
            yield Example(*rows, is_packed)


def frozen_embedding(model: nn.Module) -> Any:
    """Returns the module of the model's input embeddings, without a copy that PEFT trains."""
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return getattr(embedding, "original_module", embedding)


@torch.no_grad()
def find_abilities(
    model: nn.Module, adapter: str, layers: Sequence[BaditLinear], examples: Sequence[Example]
) -> None:
    """Sets the key of an adapter, and the codes and experts of its layers.

    All ranks must call it; they get the same values.
    """
    config = layers[0].badit_config[adapter]
    cluster_S = _find_clusters(model, adapter, layers[0], examples)
    random_LCK = torch.stack(
        [random_codes(config.num_clusters, config.num_experts) for _ in layers]
    )
    random_LCK = gathered(random_LCK)[0]
    codes_LCK = random_LCK
    if config.codes != "random":
        members = [
            [example for example, number in zip(examples, cluster_S, strict=True) if number == c]
            for c in range(config.num_clusters)
        ]
        for layer in layers:
            layer.badit_codes[adapter].fill_(1.0)
        evidence = Evidence(model, adapter, layers)
        for cluster, of_cluster in enumerate(members):
            evidence.add(cluster, [example for example in of_cluster if example.has_answer])
        codes_LCK = _codes(evidence, random_LCK)

    for layer, codes_CK in zip(layers, codes_LCK, strict=True):
        layer.badit_codes[adapter].copy_(codes_CK)
        layer.badit_batches[adapter].fill_(1)


def _find_clusters(
    model: nn.Module, adapter: str, holder: BaditLinear, examples: Sequence[Example]
) -> list[int]:
    """Finds the clusters of keys, and returns the cluster of each example."""
    embedding = frozen_embedding(model)
    moments = vocabulary_moments(vocabulary(embedding))
    means_SE = torch.stack(
        [embedding(example.prompt_ids).float().mean(dim=0) for example in examples]
    )
    keys_SE = prompt_keys(means_SE.cpu(), *moments)
    clusters = holder.badit_config[adapter].num_clusters
    centroids_CE = gathered(prompt_centroids(keys_SE, clusters))[0].cpu()
    directions_CE, offsets_C = key_scores(centroids_CE, *moments)
    holder.badit_key[adapter].copy_(directions_CE)
    holder.badit_key_offset[adapter].copy_(offsets_C)
    return (keys_SE @ centroids_CE.T).argmax(dim=1).tolist()


def vocabulary(embedding: Any) -> Tensor:
    """Returns the vocabulary's embeddings (V, E) as the model uses them, on the CPU.

    They are outputs of the module, because some modules scale or dequantise their weight.
    """
    device = embedding.weight.device
    ids = torch.arange(embedding.num_embeddings, device=device)
    return torch.cat([embedding(some).float().cpu() for some in ids.split(_IDS_AT_A_TIME)])


class Evidence:
    """What the gradients of clusters say about an adapter's components, summed by layer.

    The gradients are those of B, and of A if B is not zero. Those of a component are the row of A
    and the column of B.
    """

    def __init__(self, model: nn.Module, adapter: str, layers: Sequence[BaditLinear]) -> None:
        self.model = model
        self.layers = layers
        self.adapter = adapter
        config = layers[0].badit_config[adapter]
        self.clusters = config.num_clusters
        shape = (len(layers), self.clusters, config.num_components)
        self.energy_LCN = torch.zeros(shape)
        self.products: list[Any] = [0.0] * len(layers)  # Σ_c ⟨g_ci, g_cj⟩ (N, N)
        self.sums: list[Any] = [0.0] * len(layers)  # Σ_c g_c (N, P)
        self.present: list[int] = []  # clusters with gradients
        generator = torch.Generator().manual_seed(0)
        self.sketches = [
            SketchedSums(
                sum(factor.numel() for factor in self._factors(layer)),
                2 * self.clusters,
                _SKETCH_SIZE,
                generator,
                layer.device,
            )
            for layer in layers
        ]

    def _factors(self, layer: BaditLinear) -> list[nn.Parameter]:
        factors = [layer.badit_B[self.adapter]]
        if factors[0].any():  # else the gradient of A is zero
            factors.append(layer.badit_A[self.adapter])
        return factors

    def add(self, cluster: int, examples: Sequence[Example]) -> None:
        """Adds the gradients of a cluster: the means over up to four examples in each half."""
        halves = [self._mean_gradients(examples[half : 2 * _PER_HALF : 2]) for half in range(2)]
        # With gradients in one half only, nothing is known about the noise.
        if not all(any(mean_NP.any() for mean_NP in half) for half in halves):
            return
        self.present.append(cluster)
        for index in range(len(self.layers)):
            for half in range(2):
                row = half * self.clusters + cluster
                self.sketches[index].add(row, halves[half][index].flatten())
            mean_NP = (halves[0][index] + halves[1][index]) / 2
            self.energy_LCN[index, cluster] = mean_NP.square().sum(dim=1).cpu()
            self.products[index] = self.products[index] + mean_NP @ mean_NP.T
            self.sums[index] = self.sums[index] + mean_NP

    def _mean_gradients(self, examples: Sequence[Example]) -> list[Tensor]:
        """Returns each layer's mean gradient (N, P) over the examples of all ranks."""
        factors = [self._factors(layer) for layer in self.layers]
        flat = [factor for of_layer in factors for factor in of_layer]
        sums = [torch.zeros(factor.shape, device=factor.device) for factor in flat]
        count = sums[0].new_zeros(())
        for example in examples:
            gradients = torch.autograd.grad(self._loss(example), flat, allow_unused=True)
            # An example without a finite gradient does not count.
            if all(gradient is None or gradient.isfinite().all() for gradient in gradients):
                count += 1
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:  # no token reaches this expert of an MoE
                        total += gradient
        count = sum_over_ranks(count).clamp_min(1)
        means = iter([sum_over_ranks(total) / count.to(total.device) for total in sums])
        of_layers = []
        for of_layer in factors:
            mean_ON, *mean_NI = [next(means).float() for _ in of_layer]
            of_layers.append(torch.cat([mean_ON.T, *mean_NI], dim=1))
        return of_layers

    def _loss(self, example: Example) -> Tensor:
        """Returns the mean cross-entropy of an example's answer."""
        with torch.enable_grad():
            output = self.model(
                input_ids=example.input_ids_T[None], labels=example.labels_T[None], use_cache=False
            )
        return output.loss

    def agreement(self) -> tuple[Tensor, float]:
        """Returns the corrected cosines (C, C) of the clusters and their mean reliability.

        Clusters without gradients have cosines of 0.
        """
        cosines_CC = torch.zeros(self.clusters, self.clusters)
        if not self.present:
            return cosines_CC, 0.0
        rows = self.present + [self.clusters + cluster for cluster in self.present]
        gram_RR = sum(sketch.gram() for sketch in self.sketches)
        assert isinstance(gram_RR, Tensor)
        count = len(self.present)
        gram_2P2P = gram_RR[rows][:, rows].reshape(2, count, 2, count)
        cosines_PP, reliability_P = cluster_cosines(gram_2P2P)
        present_P = torch.tensor(self.present)
        cosines_CC[present_P[:, None], present_P] = cosines_PP.float()
        return cosines_CC, float(reliability_P.mean())


def _codes(evidence: Evidence, random_LCK: Tensor) -> Tensor:
    """Returns the codes (L, C, K) of the layers, and assigns their components to experts.

    If the gradients agree too little between the halves of a cluster, the codes are random.
    """
    config = evidence.layers[0].badit_config[evidence.adapter]
    cosines_CC, reliability = evidence.agreement()
    if reliability < LEAST_RELIABILITY:
        say(
            f"badit: codes={config.codes!r}: the gradients of the prompts' clusters are not "
            f"reliable ({reliability:.2f}, at least {LEAST_RELIABILITY}), so the codes are random"
        )
        return random_LCK

    target_CC = target_overlap(cosines_CC).float()
    # The logits need as many random numbers on every rank.
    starts_LCK = gathered(torch.randn(random_LCK.shape))[0].cpu()
    matched_LCK = matched_codes(target_CC, starts_LCK) if config.codes == "matched" else None
    codes = []
    for index, layer in enumerate(evidence.layers):
        energy_CN = evidence.energy_LCN[index]
        labels = layer.expert_of(evidence.adapter)
        if matched_LCK is not None:
            codes_CK = matched_LCK[index]
            labels_N = labels_by_use(codes_CK, energy_CN)
        else:
            labels_N = _groups(evidence, index)
            codes_CK = grouped_codes(energy_CN, labels_N, float(mean_overlap(target_CC)))
        labels.copy_(gathered(labels_N)[0])
        codes_CK = with_norm_of(codes_CK, random_LCK[index].cpu())
        if config.permute_codes:
            codes_CK = permuted(codes_CK)
        codes.append(gathered(codes_CK)[0])
    return torch.stack(codes)


def _groups(evidence: Evidence, index: int) -> Tensor:
    """Returns the experts (N) of a layer's components, grouped by their centred gradients."""
    layer = evidence.layers[index]
    sums_NP = evidence.sums[index]
    gram_NN = centred_gram(evidence.products[index], sums_NP @ sums_NP.T, len(evidence.present))
    current_N = layer.expert_of(evidence.adapter).cpu().numpy().copy()
    labels_N = group_components(gram_NN.cpu().numpy(), current_N, seed=[0, 0, index])
    return torch.from_numpy(labels_N)
