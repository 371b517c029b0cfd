"""Abilities before training: clusters of prompts for the whole model, and each layer's codes.

:meth:`BaditModel.start_task` calls :func:`find_abilities` for adapters with ``key="embedding"``,
and :func:`find_layer_codes` for others whose codes are not random.
The formulas are in :mod:`badit.method.abilities`. Gradients are those at step 0, with all gates 1.

Shape suffixes: T = positions of one example, E = features of an embedding, S = prompts, C =
clusters, K = experts, N = components, L = layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from statistics import fmean
from typing import Any, NamedTuple

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
    target_overlap,
    with_norm_of,
)
from badit.method.grouping import group_components, in_order
from badit.method.routing import first_equal, prompt_centroids, random_codes
from badit.method.sketches import SketchedSums
from badit.support.console import say_once, waiting
from badit.support.errors import BaditError
from badit.tuner.answers import answer_logits, predicts_next_token
from badit.tuner.badit_layer import BaditLinear
from badit.tuner.config import BaditConfig
from badit.tuner.context import RoutingContext
from badit.tuner.distributed import gathered, is_divided_by_zero3, rank_and_size, sum_over_ranks
from badit.tuner.examples import Example
from badit.tuner.keys import Keys
from badit.tuner.prompt import IGNORED_LABEL

#: Mean cosine of the halves of a cluster's gradient, below which codes are random.
LEAST_RELIABILITY = 0.1
_WITHOUT_GRADIENTS = "codes are random, and components are grouped by singular value"
_PER_HALF = 4  # examples whose gradients are averaged
_LEAST_FILL = 0.8  # length of an example in a batch, relative to the longest one
_SKETCH_SIZE = 4096  # numbers per layer, cluster and half


@torch.no_grad()
def find_abilities(
    model: nn.Module,
    adapter: str,
    layers: Sequence[BaditLinear],
    examples: Sequence[Example],
    keys: Keys,
) -> None:
    """Sets the key of an adapter, and the codes and experts of its layers.

    All ranks must call it, with the same examples; they get the same values.
    """
    config = layers[0].badit_config[adapter]
    key = _find_key(keys, config.num_clusters, examples)
    random_LCK = torch.stack(
        [random_codes(config.num_clusters, config.num_experts) for _ in layers]
    )
    # Equal clusters, of fewer prompts than clusters, share a code: rounding must not choose it.
    distinct_D, number_C = key.first_equal_C.unique(return_inverse=True)
    codes_LDK = gathered(random_LCK)[0][:, distinct_D]
    if config.codes != "random" and is_divided_by_zero3(model):
        say_once(
            f"badit: codes={config.codes!r}: DeepSpeed has divided the weights, so there are no "
            f"gradients before training; {_WITHOUT_GRADIENTS}"
        )
    elif _compares_clusters(model, config):
        for layer in layers:
            layer.badit_codes[adapter].fill_(1.0)
        examples_of_clusters: list[list[Example]] = [[] for _ in distinct_D]
        has_answers = _have_answers(config, examples)
        clusters = number_C[key.cluster_S].tolist()
        for example, cluster, has_answer in zip(examples, clusters, has_answers, strict=True):
            if has_answer:
                examples_of_clusters[cluster].append(example)
        evidence = evidence_of_key(Gradients(model, adapter, layers), examples_of_clusters)
        codes_LDK = _codes(adapter, layers, evidence, codes_LDK)

    holder = RoutingContext.of(model).key_holders[adapter]
    holder.badit_key[adapter].copy_(key.directions_CE)
    holder.badit_key_offset[adapter].copy_(key.offsets_C)
    for layer, codes_DK in zip(layers, codes_LDK, strict=True):
        layer.badit_codes[adapter].copy_(codes_DK[number_C])
        layer.badit_batches[adapter].fill_(1)


@torch.no_grad()
def find_layer_codes(
    model: nn.Module, adapter: str, layers: Sequence[BaditLinear], examples: Sequence[Example]
) -> None:
    """Sets the codes and experts of layers with their own clusters, in place of random codes.

    All ranks must call it, with the same examples; they get the same values.
    """
    config = layers[0].badit_config[adapter]
    if not _compares_clusters(model, config):
        return
    clusters = config.num_clusters
    random_LCK = torch.stack([layer.badit_codes[adapter].cpu() for layer in layers])
    for layer in layers:
        layer.badit_codes[adapter].fill_(1.0)
    has_answers = _have_answers(config, examples)
    with_answers = [*compress(examples, has_answers)]
    chosen = _spread(with_answers, 2 * _PER_HALF * clusters)
    evidence = evidence_of_layers(Gradients(model, adapter, layers), chosen, clusters)
    codes_LCK = _codes(adapter, layers, evidence, random_LCK)
    for layer, codes_CK in zip(layers, codes_LCK, strict=True):
        # Equal clusters, of fewer prompts than clusters, share a code.
        first_equal_C = first_equal(layer.badit_centroids[adapter])
        layer.badit_codes[adapter].copy_(codes_CK[first_equal_C])


def _compares_clusters(model: nn.Module, config: BaditConfig) -> bool:
    """Returns whether the codes of an adapter come from gradients; a line says if they cannot."""
    if config.codes == "random":
        return False
    if not predicts_next_token(model):
        say_once(
            f"badit: codes={config.codes!r}: {type(model).__name__} does not predict the next "
            f"token, so there are no answers to compute gradients of; {_WITHOUT_GRADIENTS}"
        )
        return False
    if config.num_clusters == 1:
        say_once(
            f"badit: codes={config.codes!r}: there is one cluster of prompts and no other to "
            f"compare it with; {_WITHOUT_GRADIENTS}"
        )
        return False
    return True


def _have_answers(config: BaditConfig, examples: Sequence[Example]) -> list[bool]:
    """Returns which examples have answers to compute gradients of.

    A line says if only some have.
    """
    has_answers = [example.has_answer for example in examples]
    without = has_answers.count(False)
    # If none has an answer, another line says that the codes are random.
    if 0 < without < len(examples):
        say_once(
            f"badit: codes={config.codes!r}: {without} of {len(examples)} prompts have no answer; "
            "components are grouped by the gradients of the others"
        )
    return has_answers


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Returns at most ``count`` of the examples, evenly spaced: the tasks follow one another."""
    count = min(count, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


class _Key(NamedTuple):
    """The clusters of prompts for the whole model."""

    directions_CE: Tensor
    offsets_C: Tensor
    cluster_S: Tensor  # of each example
    first_equal_C: Tensor  # of each cluster, the first one with an equal centroid


def _find_key(keys: Keys, clusters: int, examples: Sequence[Example]) -> _Key:
    """Finds the clusters of the examples' prompts."""
    if keys.embedding.weight.requires_grad:
        say_once(
            "badit: key='embedding': the token embeddings are trained, so prompts may change their "
            "cluster; freeze them, or train a copy of them by modules_to_save"
        )
    keys_SE = keys.of(examples)
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
    return _Key(*key_scores(centroids_CE, *keys.moments), cluster_S, first_equal_C)


class Evidence(NamedTuple):
    """What the gradients of clusters say about one layer's components, at step 0.

    P of the clusters have gradients.
    """

    present: list[int]  # these clusters
    missing: int  # different clusters without gradients
    energy_PN: Tensor  # the squared norms of the components' gradients
    cosines_NN: Tensor  # of the components' centred gradients
    cosines_PP: Tensor  # of the clusters, corrected for noise
    reliability: float  # mean over clusters; 0 without any


class Gradients:
    """Gradients of the answers' loss with respect to the components of an adapter's layers.

    They are those of B, and of A if B is not zero. Those of a component, P numbers, are the row of
    A and the column of B.
    """

    def __init__(self, model: nn.Module, adapter: str, layers: Sequence[BaditLinear]) -> None:
        self.model = model
        self.layers = layers
        self.adapter = adapter
        self.factors = [self._factors(layer) for layer in layers]

    def _factors(self, layer: BaditLinear) -> list[nn.Parameter]:
        factors = [layer.badit_B[self.adapter]]
        if factors[0].any():  # else the gradient of A is zero
            factors.append(layer.badit_A[self.adapter])
        return factors

    def numbers(self) -> list[tuple[int, int]]:
        """Returns N and P of every layer."""
        components = [factors[0].shape[1] for factors in self.factors]  # the columns of B
        return [
            (count, sum(factor.numel() for factor in factors) // count)
            for count, factors in zip(components, self.factors, strict=True)
        ]

    def sketches(self, sums: int) -> list[SketchedSums]:
        """Returns an empty sketch of this number of gradients for every layer."""
        generator = torch.Generator().manual_seed(0)
        return [
            SketchedSums(components * size, sums, _SKETCH_SIZE, generator, layer.device)
            for (components, size), layer in zip(self.numbers(), self.layers, strict=True)
        ]

    def mean(self, examples: Sequence[Example]) -> list[Tensor]:
        """Returns each layer's mean gradient (N, P) over the examples, shared among the ranks."""
        flat = [factor for of_layer in self.factors for factor in of_layer]
        rank, ranks = rank_and_size()
        sums, number = self._sums(examples[rank::ranks], flat)
        count = sum_over_ranks(sums[0].new_tensor(float(number))).clamp_min(1)
        return self._by_component(
            [sum_over_ranks(total) / count.to(total.device) for total in sums]
        )

    def of_one(self, example: Example) -> list[Tensor] | None:
        """Returns each layer's gradient (N, P) of one example; None if it is not finite."""
        flat = [factor for of_layer in self.factors for factor in of_layer]
        sums, number = self._sums([example], flat)
        return self._by_component(sums) if number else None

    def with_clusters_of(self, example: Example) -> tuple[list[Tensor], Tensor]:
        """Returns each layer's gradient of one example, and its cluster (L) in each layer.

        Without a finite gradient there are none, and the cluster is −1. It also is in a layer that
        no token reaches, such as an expert of an MoE.
        """
        cluster_L = torch.full((len(self.layers),), -1)
        # The passes that give the gradients also show what the layers read.
        with self.layers[0].routing.collecting_means() as means:
            of_layers = self.of_one(example)
        if of_layers is None:
            return [], cluster_L
        for index, layer in enumerate(self.layers):
            mean_1I = means.get(f"{layer.name}.{self.adapter}")
            if mean_1I and of_layers[index].any():
                cluster_L[index] = layer.clusters_of(self.adapter, mean_1I[0])
        return of_layers, cluster_L

    def _by_component(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        remaining = iter(gradients)
        of_layers = []
        for of_layer in self.factors:
            of_B_ON, *of_A_NI = [next(remaining).float() for _ in of_layer]
            of_layers.append(torch.cat([of_B_ON.T, *of_A_NI], dim=1))
        return of_layers

    def _sums(
        self, examples: Sequence[Example], factors: Sequence[nn.Parameter]
    ) -> tuple[list[Tensor], int]:
        """Returns the factors' gradients, summed over the examples, and the number of examples."""
        sums = [torch.zeros(factor.shape, device=factor.device) for factor in factors]
        count = 0
        batches = _of_similar_length(examples)
        while batches:
            batch = batches.pop()
            with _requiring_gradients(factors):
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
        attended_BT = (torch.arange(labels_BT.shape[1]) < lengths[:, None]).long()
        batch = {
            "input_ids": _padded([example.input_ids_T for example in examples], 0).to(device),
            "attention_mask": attended_BT.to(device),
            # The model gets no labels to find the prompt by.
            "prompt_mask": _padded([example.prompt_T for example in examples], 0).to(device),
            "use_cache": False,
        }
        with torch.enable_grad():
            answer = answer_logits(self.model, batch, labels_BT.to(device))
            losses_L = F.cross_entropy(answer.logits_LV.float(), answer.target_L, reduction="none")
            labels_B = torch.bincount(answer.row_L, minlength=len(examples))
            return (losses_L / labels_B[answer.row_L]).sum()


@contextmanager
def _requiring_gradients(factors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets frozen factors have gradients, such as those of an adapter that is trained later."""
    frozen = [factor for factor in factors if not factor.requires_grad]
    for factor in frozen:
        factor.requires_grad_(True)
    try:
        yield
    finally:
        for factor in frozen:
            factor.requires_grad_(False)


def evidence_of_key(
    gradients: Gradients, examples_of_clusters: Sequence[Sequence[Example]]
) -> list[Evidence]:
    """Returns the evidence of each layer, for clusters that are the same in all layers.

    The gradients of a cluster are means over up to four examples in each half.
    """
    clusters = len(examples_of_clusters)
    sketches = gradients.sketches(2 * clusters)
    energies: list[list[Tensor]] = [[] for _ in sketches]
    products: list[Any] = [0.0] * len(sketches)  # Σ_c ⟨g_ci, g_cj⟩ (N, N)
    sums: list[Any] = [0.0] * len(sketches)  # Σ_c g_c (N, P)
    present = []
    numbered = [*enumerate(examples_of_clusters)]
    for cluster, examples in waiting(numbered, "Gradients for the codes", "cluster"):
        chosen = _spread(examples, 2 * _PER_HALF)
        halves = [gradients.mean(chosen[half::2]) for half in range(2)]
        # With gradients in one half only, nothing is known about the noise.
        if not all(any(mean_NP.any() for mean_NP in half) for half in halves):
            continue
        present.append(cluster)
        for index, sketch in enumerate(sketches):
            for half in range(2):
                sketch.add(half * clusters + cluster, halves[half][index].flatten())
            mean_NP = (halves[0][index] + halves[1][index]) / 2
            energies[index].append(mean_NP.square().sum(dim=1).cpu())
            products[index] = products[index] + mean_NP @ mean_NP.T
            sums[index] = sums[index] + mean_NP

    if not present:
        return []
    gram_RR = sum(sketch.gram() for sketch in sketches)  # over the whole model
    assert isinstance(gram_RR, Tensor)
    agreement = _agreement(gram_RR, present)
    cosines = [
        centred_gram(product_NN, sum_NP @ sum_NP.T, len(present))
        for product_NN, sum_NP in zip(products, sums, strict=True)
    ]
    return [
        Evidence(present, clusters - len(present), torch.stack(energy), cosines_NN, *agreement)
        for energy, cosines_NN in zip(energies, cosines, strict=True)
    ]


def evidence_of_layers(
    gradients: Gradients, examples: Sequence[Example], clusters: int
) -> list[Evidence]:
    """Returns the evidence of each layer, for clusters that differ between layers.

    Each layer has its own agreement of clusters. The sums of gradients take C·N·P numbers per
    layer. The ranks share the examples, and count them as one process would.
    """
    layers = gradients.layers
    sketches = gradients.sketches(2 * clusters)
    sums = [
        torch.zeros(clusters, *numbers, device=layer.device)
        for numbers, layer in zip(gradients.numbers(), layers, strict=True)
    ]
    counts_L2C = torch.zeros(len(layers), 2, clusters)
    # Equal clusters, of fewer prompts than clusters, count as one.
    centroids = [layer.badit_centroids[gradients.adapter] for layer in layers]
    first_equal_LC = torch.stack([first_equal(centroids_CI).cpu() for centroids_CI in centroids])
    rank, ranks = rank_and_size()
    steps = range(0, len(examples), ranks)
    for first in waiting(steps, "Gradients for the codes", "example"):
        of_example: list[Tensor] = []
        cluster_L = torch.full((len(layers),), -1)
        if first + rank < len(examples):  # not on all ranks in the last step
            of_example, cluster_L = gradients.with_clusters_of(examples[first + rank])
        places = [
            [*_counted(counts_L2C, first_equal_LC, cluster_of_rank_L)]
            for cluster_of_rank_L in gathered(cluster_L).cpu()
        ]
        for index, half, cluster in places[rank]:
            sketches[index].add(half * clusters + cluster, of_example[index].flatten())
            sums[index][cluster] += of_example[index]

    evidence = []
    for index, (sketch, sum_CNP) in enumerate(zip(sketches, sums, strict=True)):
        sketch.sums_RM = sum_over_ranks(sketch.sums_RM)
        counts_2C = counts_L2C[index]
        count_C11 = counts_2C.sum(dim=0).clamp_min(1)[:, None, None]
        means_CNP = sum_over_ranks(sum_CNP) / count_C11.to(sum_CNP)
        different = len(first_equal_LC[index].unique())
        evidence.append(_evidence_of_layer(sketch, means_CNP, counts_2C, different))
    return evidence


def _counted(
    counts_L2C: Tensor, first_equal_LC: Tensor, cluster_L: Tensor
) -> Iterator[tuple[int, int, int]]:
    """Counts an example in the layers where it has a cluster.

    Yields the number of each of these layers, the half that the example belongs to there, and the
    first cluster that is equal to its own.
    """
    for index, found in enumerate(cluster_L.tolist()):
        if found < 0:
            continue
        cluster = int(first_equal_LC[index, found])
        # The examples of a cluster belong to the halves in turn.
        half = int(counts_L2C[index, 0, cluster] > counts_L2C[index, 1, cluster])
        counts_L2C[index, half, cluster] += 1
        yield index, half, cluster


def _evidence_of_layer(
    sketch: SketchedSums, means_CNP: Tensor, counts_2C: Tensor, different: int
) -> Evidence:
    """Returns a layer's evidence from its sums of gradients, and the means over both halves.

    ``different`` is the number of different clusters.
    """
    # With gradients in one half only, nothing is known about the noise.
    present = counts_2C.min(dim=0).values.nonzero().flatten().tolist()
    means_PNP = means_CNP[present]
    counts_R = counts_2C.flatten().clamp_min(1).double()
    gram_RR = sketch.gram() / counts_R[:, None] / counts_R
    sum_NP = means_PNP.sum(dim=0)
    product_NN = torch.einsum("cnp,cmp->nm", means_PNP, means_PNP)
    return Evidence(
        present,
        different - len(present),
        means_PNP.square().sum(dim=2).cpu(),
        centred_gram(product_NN, sum_NP @ sum_NP.T, max(1, len(present))),
        *_agreement(gram_RR, present),
    )


def _agreement(gram_RR: Tensor, present: Sequence[int]) -> tuple[Tensor, float]:
    """Returns the corrected cosines (P, P) of the clusters with gradients, and the reliability."""
    count = len(present)
    if count == 0:
        return torch.zeros(0, 0), 0.0
    clusters = len(gram_RR) // 2
    rows = [*present, *(clusters + cluster for cluster in present)]
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


def _reliable_layers(config: BaditConfig, evidence: Sequence[Evidence]) -> list[bool]:
    """Returns whether each layer's gradients agree between the halves of a cluster.

    A line says which codes are random.
    """
    of_option = f"badit: codes={config.codes!r}"
    is_reliable = [of_layer.reliability >= LEAST_RELIABILITY for of_layer in evidence]
    if not any(is_reliable):
        reliability = fmean([of_layer.reliability for of_layer in evidence] or [0.0])
        say_once(
            f"{of_option}: the gradients of the prompts' clusters are not reliable "
            f"({reliability:.2f}, at least {LEAST_RELIABILITY}); {_WITHOUT_GRADIENTS}"
        )
        return is_reliable
    unreliable = is_reliable.count(False)
    if unreliable:
        say_once(
            f"{of_option}: the gradients of the prompts' clusters are not reliable (below "
            f"{LEAST_RELIABILITY}) in {unreliable} of {len(evidence)} layers; there, "
            f"{_WITHOUT_GRADIENTS}"
        )
    missing = max(of_layer.missing for of_layer in evidence)
    if missing and config.codes != "grouped-random":
        say_once(
            f"{of_option}: up to {missing} of {config.num_clusters} clusters have no gradients, as "
            "without answers, so their codes are random"
        )
    return is_reliable


def _codes(
    adapter: str, layers: Sequence[BaditLinear], evidence: Sequence[Evidence], random_LCK: Tensor
) -> Tensor:
    """Returns the codes (L, C, K) of the layers, and assigns their components to experts.

    Codes of clusters without gradients are random. Those of a layer are, if its gradients agree too
    little between the halves of a cluster.
    """
    config = layers[0].badit_config[adapter]
    is_reliable = _reliable_layers(config, evidence)
    if not any(is_reliable):
        return random_LCK
    # The logits need as many random numbers on every rank.
    starts_LCK = gathered(torch.randn(random_LCK.shape))[0].cpu()
    matched_LPK = None
    if config.codes == "matched":
        target_PP = target_overlap(evidence[0].cosines_PP).float()
        matched_LPK = matched_codes(target_PP, starts_LCK[:, evidence[0].present])
    codes_LCK = random_LCK.clone()
    pairs = [*enumerate(zip(layers, evidence, strict=True))]
    for index, (layer, of_layer) in waiting(pairs, "Codes", "layer"):
        if not is_reliable[index]:
            continue
        if matched_LPK is not None:
            codes_PK = matched_LPK[index]
            labels_N = labels_by_use(codes_PK, of_layer.energy_PN)
        else:
            codes_PK, labels_N = _grouped(config, of_layer, layer.expert_of(adapter), index)
        layer.expert_of(adapter).copy_(gathered(labels_N)[0])
        if codes_PK is None:
            continue
        codes_PK = with_norm_of(codes_PK, random_LCK[index].cpu())
        if config.permute_codes:
            codes_PK = permuted(codes_PK)
        codes_LCK[index, of_layer.present] = gathered(codes_PK)[0].to(codes_LCK)
    return codes_LCK


def _grouped(
    config: BaditConfig, evidence: Evidence, current_N: Tensor, index: int
) -> tuple[Tensor | None, Tensor]:
    """Returns the codes (P, K) of a layer, None for random ones, and the experts (N) of its groups.

    The layer's index is the seed of the clustering.
    """
    cosines_NN = evidence.cosines_NN.cpu().numpy()
    groups_N = group_components(cosines_NN, current_N.cpu().numpy().copy(), seed=[0, 0, index])
    labels_N = torch.from_numpy(in_order(groups_N))
    if config.codes == "grouped-random":
        return None, labels_N
    overlap = mean_overlap(target_overlap(evidence.cosines_PP).float())
    return grouped_codes(evidence.energy_PN, labels_N, float(overlap)), labels_N
