"""Abilities before training: clusters of prompts for the whole model, and each layer's codes.

:meth:`BaditModel.start_task` calls :func:`find_abilities` for adapters with ``key="embedding"``.
The formulas are in :mod:`badit.method.abilities`. Gradients are those at step 0, with all gates 1.

Shape suffixes: T = positions of one example, E = features of an embedding, S = prompts, C =
clusters, K = experts, N = components, L = layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
from badit.method.grouping import group_components, in_order
from badit.method.routing import first_equal, prompt_centroids, random_codes
from badit.method.sketches import SketchedSums
from badit.support.console import say
from badit.support.errors import BaditError
from badit.tuner.answers import answer_logits, has_output_layer
from badit.tuner.badit_layer import BaditLinear
from badit.tuner.distributed import (
    gathered,
    gathered_weight,
    is_divided_by_zero3,
    objects_of_ranks,
    rank_and_size,
    sum_over_ranks,
)
from badit.tuner.prompt import IGNORED_LABEL, Segments

#: Mean cosine of the halves of a cluster's gradient, below which codes are random.
LEAST_RELIABILITY = 0.1
_PER_HALF = 4  # examples whose gradients are averaged
_LEAST_FILL = 0.8  # length of an example in a batch, relative to the longest one
_SKETCH_SIZE = 4096  # numbers per layer, cluster and half
_IDS_AT_A_TIME = 8192


class Example(NamedTuple):
    """A prompt with its answer, without padding."""

    input_ids_T: Tensor
    labels_T: Tensor
    prompt_T: Tensor
    is_packed: bool = False

    def on_cpu(self) -> Self:
        return self._replace(
            input_ids_T=self.input_ids_T.cpu(),
            labels_T=self.labels_T.cpu(),
            prompt_T=self.prompt_T.cpu(),
        )

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
    if labels_BT is None or labels_BT.shape != ids_BT.shape:  # as of classifiers
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


def examples_of_ranks(batches: list[list[Example]]) -> list[Example]:
    """Returns the examples of all ranks on the CPU, in the order of one process.

    Where ranks have different batches, rank r of R has every R-th one, from batch r on, as in
    accelerate's data loaders.
    """
    batches = [[example.on_cpu() for example in batch] for batch in batches]
    first, *others = objects_of_ranks(batches)
    if any(_contents(other) != _contents(first) for other in others):
        together = zip_longest(first, *others, fillvalue=[])
        batches = [batch for of_ranks in together for batch in of_ranks]
    return [example for batch in batches for example in batch]


def _contents(batches: list[list[Example]]) -> list[list[int]]:
    return [
        [*example.input_ids_T.tolist(), *example.labels_T.tolist(), *example.prompt_T.tolist()]
        for batch in batches
        for example in batch
    ]


def frozen_embedding(model: nn.Module) -> Any:
    """Returns the module of the model's input embeddings, without a copy that PEFT trains.

    BaditError if the model has none.
    """
    try:
        embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        embedding = None
    embedding = getattr(embedding, "original_module", embedding)
    if not isinstance(embedding, nn.Embedding):
        raise BaditError(
            f"key='embedding': {type(model).__name__} has no table of token embeddings; use "
            "key='layer'"
        )
    return embedding


@torch.no_grad()
def find_abilities(
    model: nn.Module, adapter: str, layers: Sequence[BaditLinear], examples: Sequence[Example]
) -> None:
    """Sets the key of an adapter, and the codes and experts of its layers.

    All ranks must call it, with the same examples; they get the same values.
    """
    config = layers[0].badit_config[adapter]
    key = _find_key(model, config.num_clusters, examples)
    random_LCK = torch.stack(
        [random_codes(config.num_clusters, config.num_experts) for _ in layers]
    )
    # Equal clusters, of fewer prompts than clusters, share a code: rounding must not choose it.
    distinct_D, number_C = key.first_equal_C.unique(return_inverse=True)
    codes_LDK = gathered(random_LCK)[0][:, distinct_D]
    if config.codes != "random" and is_divided_by_zero3(model):
        say(
            f"badit: codes={config.codes!r}: DeepSpeed has divided the weights, so there are no "
            "gradients before training, and the codes are random"
        )
    elif config.codes != "random":
        for layer in layers:
            layer.badit_codes[adapter].fill_(1.0)
        evidence = Evidence(model, adapter, layers, len(distinct_D))
        of_example_S = number_C[key.cluster_S].tolist()
        can_answer = has_output_layer(model)  # else labels are not of the next token
        for cluster in range(len(distinct_D)):
            of_cluster = [
                example
                for example, own in zip(examples, of_example_S, strict=True)
                if own == cluster and example.has_answer and can_answer
            ]
            evidence.add(cluster, of_cluster)
        codes_LDK = _codes(evidence, codes_LDK)

    layers[0].badit_key[adapter].copy_(key.directions_CE)
    layers[0].badit_key_offset[adapter].copy_(key.offsets_C)
    for layer, codes_DK in zip(layers, codes_LDK, strict=True):
        layer.badit_codes[adapter].copy_(codes_DK[number_C])
        layer.badit_batches[adapter].fill_(1)


class _Key(NamedTuple):
    """The clusters of prompts for the whole model."""

    directions_CE: Tensor
    offsets_C: Tensor
    cluster_S: Tensor  # of each example
    first_equal_C: Tensor  # of each cluster, the first one with an equal centroid


def _find_key(model: nn.Module, clusters: int, examples: Sequence[Example]) -> _Key:
    """Finds the clusters of the examples' prompts."""
    embedding = frozen_embedding(model)
    if embedding.weight.requires_grad:
        say(
            "badit: key='embedding': the token embeddings are trained, so prompts may change their "
            "cluster; freeze them, or train a copy of them by modules_to_save"
        )
    with gathered_weight(embedding.weight):
        moments = vocabulary_moments(_vocabulary(embedding))
        device = embedding.weight.device
        means_SE = torch.stack(
            [embedding(e.prompt_ids.to(device)).float().mean(dim=0) for e in examples]
        )
    keys_SE = prompt_keys(means_SE.cpu(), *moments)
    if not keys_SE.isfinite().all():
        raise BaditError(
            "key='embedding': the model's token embeddings hold NaN or infinite values; check its "
            "weights, or use key='layer'"
        )
    centroids_CE = gathered(prompt_centroids(keys_SE, clusters))[0].cpu()
    first_equal_C = first_equal(centroids_CE)
    prompts = {tuple(example.prompt_ids.tolist()) for example in examples}
    if clusters > 1 and len(prompts) > 1 and not first_equal_C.any():
        raise BaditError(
            f"start_task: {len(prompts)} different prompts have equal mean token embeddings, so "
            "they would get the same gates; check the model's weights, or use key='layer'"
        )
    cluster_S = gathered((keys_SE @ centroids_CE.T).argmax(dim=1))[0].cpu()
    return _Key(*key_scores(centroids_CE, *moments), cluster_S, first_equal_C)


def _vocabulary(embedding: nn.Embedding) -> Tensor:
    """Returns the vocabulary's embeddings (V, E) as the model uses them, on the CPU.

    They are outputs of the module, because some modules scale or dequantise their weight.
    """
    ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    return torch.cat([embedding(some).float().cpu() for some in ids.split(_IDS_AT_A_TIME)])


class Evidence:
    """What the gradients of clusters say about an adapter's components, summed by layer.

    The gradients are those of B, and of A if B is not zero. Those of a component are the row of A
    and the column of B.
    """

    def __init__(
        self, model: nn.Module, adapter: str, layers: Sequence[BaditLinear], clusters: int
    ) -> None:
        self.model = model
        self.layers = layers
        self.adapter = adapter
        self.clusters = clusters
        config = layers[0].badit_config[adapter]
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
        """Returns each layer's mean gradient (N, P) over the examples, shared among the ranks."""
        factors = [self._factors(layer) for layer in self.layers]
        flat = [factor for of_layer in factors for factor in of_layer]
        rank, ranks = rank_and_size()
        sums, number = self._sums_of_gradients(examples[rank::ranks], flat)
        count = sum_over_ranks(sums[0].new_tensor(float(number))).clamp_min(1)
        means = iter([sum_over_ranks(total) / count.to(total.device) for total in sums])
        of_layers = []
        for of_layer in factors:
            mean_ON, *mean_NI = [next(means).float() for _ in of_layer]
            of_layers.append(torch.cat([mean_ON.T, *mean_NI], dim=1))
        return of_layers

    def _sums_of_gradients(
        self, examples: Sequence[Example], factors: Sequence[nn.Parameter]
    ) -> tuple[list[Tensor], int]:
        """Returns the factors' gradients, summed over the examples, and the number of examples."""
        sums = [torch.zeros(factor.shape, device=factor.device) for factor in factors]
        count = 0
        batches = _of_similar_length(examples)
        while batches:
            batch = batches.pop()
            gradients = torch.autograd.grad(self._loss(batch), factors, allow_unused=True)
            if all(gradient is None or gradient.isfinite().all() for gradient in gradients):
                count += len(batch)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:  # no token reaches this expert of an MoE
                        total += gradient
            elif len(batch) > 1:
                # Only the examples without a finite gradient do not count.
                batches += [[example] for example in batch]
        return sums, count

    def _loss(self, examples: Sequence[Example]) -> Tensor:
        """Returns the mean cross-entropy of each example's answer, summed over the examples."""
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(example.input_ids_T) for example in examples])
        labels_BT = _padded([example.labels_T for example in examples], IGNORED_LABEL)
        batch = {
            "input_ids": _padded([example.input_ids_T for example in examples], 0).to(device),
            "attention_mask": (torch.arange(labels_BT.shape[1]) < lengths[:, None]).long(),
            "use_cache": False,
        }
        batch["attention_mask"] = batch["attention_mask"].to(device)
        with torch.enable_grad():
            answer = answer_logits(self.model, batch, labels_BT.to(device))
            losses_L = F.cross_entropy(answer.logits_LV.float(), answer.target_L, reduction="none")
            labels_B = torch.bincount(answer.row_L, minlength=len(examples))
            return (losses_L / labels_B[answer.row_L]).sum()

    def agreement(self) -> tuple[Tensor, float]:
        """Returns the corrected cosines (P, P) of the clusters with gradients, and reliability.

        The reliability is the mean over these clusters; 0 without any.
        """
        count = len(self.present)
        if not count:
            return torch.zeros(0, 0), 0.0
        rows = self.present + [self.clusters + cluster for cluster in self.present]
        gram_RR = sum(sketch.gram() for sketch in self.sketches)
        assert isinstance(gram_RR, Tensor)
        gram_2P2P = gram_RR[rows][:, rows].reshape(2, count, 2, count)
        cosines_PP, reliability_P = cluster_cosines(gram_2P2P)
        return cosines_PP.float(), float(reliability_P.mean())


def _of_similar_length(examples: Sequence[Example]) -> list[list[Example]]:
    """Returns batches of the examples with little padding."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids_T)):
        if batches and len(example.input_ids_T) > _LEAST_FILL * len(batches[-1][0].input_ids_T):
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _codes(evidence: Evidence, random_LCK: Tensor) -> Tensor:
    """Returns the codes (L, C, K) of the layers, and assigns their components to experts.

    Codes of clusters without gradients are random. If the gradients agree too little between the
    halves of a cluster, all are.
    """
    config = evidence.layers[0].badit_config[evidence.adapter]
    cosines_PP, reliability = evidence.agreement()
    if reliability < LEAST_RELIABILITY:
        say(
            f"badit: codes={config.codes!r}: the gradients of the prompts' clusters are not "
            f"reliable ({reliability:.2f}, at least {LEAST_RELIABILITY}), so the codes are random"
        )
        return random_LCK
    missing = evidence.clusters - len(evidence.present)
    if missing:
        say(
            f"badit: codes={config.codes!r}: {missing} of {evidence.clusters} clusters have no "
            "gradients, as without answers, so their codes are random"
        )

    present = evidence.present
    target_PP = target_overlap(cosines_PP).float()
    # The logits need as many random numbers on every rank.
    starts_LCK = gathered(torch.randn(random_LCK.shape))[0].cpu()
    matched_LPK = None
    if config.codes == "matched":
        matched_LPK = matched_codes(target_PP, starts_LCK[:, present])
    codes_LCK = random_LCK.clone()
    for index, layer in enumerate(evidence.layers):
        energy_PN = evidence.energy_LCN[index, present]
        if matched_LPK is not None:
            codes_PK = matched_LPK[index]
            labels_N = labels_by_use(codes_PK, energy_PN)
        else:
            labels_N = _groups(evidence, index)
            codes_PK = grouped_codes(energy_PN, labels_N, float(mean_overlap(target_PP)))
        layer.expert_of(evidence.adapter).copy_(gathered(labels_N)[0])
        codes_PK = with_norm_of(codes_PK, random_LCK[index].cpu())
        if config.permute_codes:
            codes_PK = permuted(codes_PK)
        codes_LCK[index, present] = gathered(codes_PK)[0].to(codes_LCK)
    return codes_LCK


def _groups(evidence: Evidence, index: int) -> Tensor:
    """Returns the experts (N) of a layer's components, grouped by their centred gradients."""
    layer = evidence.layers[index]
    sums_NP = evidence.sums[index]
    gram_NN = centred_gram(evidence.products[index], sums_NP @ sums_NP.T, len(evidence.present))
    current_N = layer.expert_of(evidence.adapter).cpu().numpy().copy()
    labels_N = group_components(gram_NN.cpu().numpy(), current_N, seed=[0, 0, index])
    return torch.from_numpy(in_order(labels_N))
