"""Adds tasks to a trained adapter: the clusters, directions and gates of a new extension.

:class:`badit.tuner.model.BaditModel` calls these functions. The formulas are in
:mod:`badit.method.extension`, and the layers in :mod:`badit.tuner.extension`.

Shape suffixes: S = prompts, E = features of an embedding, C = clusters, T = tasks, O/I = in/out
features, R = rank, U = used abilities, G = gates of experts and extensions.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Len
from pydantic import Strict
from torch import Tensor

from badit.method.abilities import key_scores
from badit.method.extension import (
    Likeness,
    add_to_image,
    add_to_sketch,
    complement_basis,
    confused_shares,
    frozen_basis,
    is_covered,
    key_spread,
    likeness,
    sketch_rows,
    top_directions,
)
from badit.method.routing import prompt_centroids
from badit.support.console import say_once
from badit.support.errors import BaditError, check
from badit.tuner.config import BaditConfig, Count, Extension, NotNegative
from badit.tuner.distributed import gathered, sum_over_ranks
from badit.tuner.examples import Example
from badit.tuner.experts import AdaptedLayer, changed_gates
from badit.tuner.extension import Extensions, nearest_clusters, with_clusters
from badit.tuner.keys import Keys
from badit.tuner.targets import FusedExpert

#: Starts β of the gates of earlier abilities; that with the lowest loss is taken.
STARTS = (0.0, 0.5, 1.0)
GRADIENT_ROWS = 32  # training rows whose loss chooses the start, and whose gradient the directions
_COVERED_SHARE = 0.8  # of the prompts that must be close to existing clusters

ExamplesByTask = Mapping[str, Sequence[Example]]
# Yields the losses of some training batches, with gradients or without.
Losses = Callable[[bool], Iterator[Tensor]]


# --- clusters ---
def store_clusters(holder: Any, adapter: str, keys: Keys, examples: ExamplesByTask) -> None:
    """Stores the clusters of an adapter's own tasks, for tasks that are added later."""
    config: BaditConfig = holder.badit_config[adapter]
    keys_by_task = {task: keys.of(of_task) for task, of_task in examples.items() if of_task}
    if not keys_by_task:
        return
    keys_SE = torch.cat(list(keys_by_task.values()))
    centroids_CE = prompt_centroids(keys_SE, config.num_clusters)
    task_S = _task_indices(config.tasks or (), keys_by_task)
    _set_clusters(holder.badit_extensions[adapter], 0, keys, centroids_CE, keys_SE, task_S)


def _task_indices(names: Sequence[str], keys_by_task: Mapping[str, Tensor]) -> list[int]:
    """Returns the task of every key; batches that are not divided by task count for the first."""
    indices = []
    for task, keys_SE in keys_by_task.items():
        index = names.index(task) if task in names else 0
        indices += [index] * len(keys_SE)
    return indices


def _set_clusters(
    extensions: Extensions,
    number: int,
    keys: Keys,
    centroids_CE: Tensor,
    keys_SE: Tensor,
    task_S: Sequence[int],
) -> None:
    """Sets the clusters of an extension; all ranks get those of rank 0."""
    cluster_S = (keys_SE @ centroids_CE.T).argmax(dim=1)
    means_CE, spread_CKE = key_spread(keys_SE, cluster_S, len(centroids_CE))
    counts_CT = extensions.of("counts", number).new_zeros(extensions.of("counts", number).shape)
    of_task_S = torch.tensor(task_S)
    ones_S = torch.ones(len(task_S))
    counts_CT = counts_CT.cpu().index_put((cluster_S, of_task_S), ones_S, accumulate=True)
    directions_CE, offsets_C = key_scores(centroids_CE, *keys.moments)
    values = {
        "directions": directions_CE,
        "offsets": offsets_C,
        "means": means_CE,
        "spread": spread_CKE,
        "counts": counts_CT,
    }
    for kind, value in values.items():
        extensions.of(kind, number).copy_(gathered(value)[0])


def set_clusters(holder: Any, adapter: str, keys: Keys, examples: ExamplesByTask) -> None:
    """Sets the clusters of the last extension of an adapter."""
    extension: Extension = holder.badit_config[adapter].extensions[-1]
    number = len(holder.badit_config[adapter].extensions)
    keys_by_task = {task: keys.of(of_task) for task, of_task in examples.items()}
    task_S = _task_indices(extension.tasks, keys_by_task)
    centroids_CE = new_centroids(keys_by_task, extension.clusters)
    keys_SE = torch.cat(list(keys_by_task.values()))
    _set_clusters(holder.badit_extensions[adapter], number, keys, centroids_CE, keys_SE, task_S)


def new_centroids(keys_by_task: Mapping[str, Tensor], clusters: int) -> Tensor:
    """Returns the centroids of new tasks, the same number of each."""
    each = clusters // len(keys_by_task)
    return torch.cat([prompt_centroids(keys_SE, each) for keys_SE in keys_by_task.values()])


# --- what a new task would change ---
class Survey(NamedTuple):
    """How new tasks relate to the tasks of an adapter, by the keys of their prompts."""

    #: The new tasks whose prompts the existing clusters cover.
    covered: Sequence[str]
    #: By new task, the share of its prompts nearest to the clusters of other tasks, by these tasks.
    confused: Mapping[str, Mapping[str, float]]
    #: By earlier task, the estimated share of its prompts that would belong to the new tasks.
    taken: Mapping[str, float]
    #: The same of all earlier prompts.
    taken_in_all: float
    #: By new task, the earlier tasks of the clusters that its prompts are nearest to.
    nearest: Mapping[str, Mapping[str, float]]


def survey(
    holder: Any, adapter: str, keys: Keys, examples: ExamplesByTask, threshold: float, each: int
) -> Survey:
    """Compares the prompts of new tasks with the clusters of an adapter."""
    earlier = _Earlier(holder, adapter, keys)
    covered, confused, nearest = [], {}, {}
    keys_by_task = {task: keys.of(of_task) for task, of_task in examples.items()}
    centroids_DE = new_centroids(keys_by_task, each * len(keys_by_task)).double()
    for task, keys_SE in keys_by_task.items():
        cosines_SC = keys_SE.double() @ earlier.centroids_CE.T
        if is_covered(cosines_SC, threshold, _COVERED_SHARE):
            covered.append(task)
        best_S, cluster_S = cosines_SC.max(dim=1)
        nearest[task] = earlier.shares(cluster_S, torch.ones_like(best_S))
        best_new_S, new_S = (keys_SE.double() @ centroids_DE.T).max(dim=1)
        is_kept_S = best_S >= best_new_S
        confused[task] = earlier.shares(cluster_S, is_kept_S.double())
        for number, other in enumerate(keys_by_task):
            is_of_other_S = (new_S // each == number) & ~is_kept_S
            if other != task and is_of_other_S.any():
                confused[task][other] = float(is_of_other_S.double().mean())
    shares_CD = confused_shares(
        earlier.all("means"), earlier.all("spread"), earlier.centroids_CE, centroids_DE
    )
    share_C = shares_CD.amax(dim=1)
    taken_in_all = float(F.normalize(earlier.counts_CT.sum(dim=1), p=1, dim=0) @ share_C)
    return Survey(covered, confused, earlier.by_task(share_C), taken_in_all, nearest)


def likeness_by_task(
    holder: Any, adapter: str, keys: Keys, examples: ExamplesByTask
) -> dict[str, Likeness]:
    """Compares the prompts of tasks with those of an adapter's training."""
    earlier = _Earlier(holder, adapter, keys)
    clusters = (earlier.all("means"), earlier.all("spread"), earlier.centroids_CE)
    return {task: likeness(keys.of(of_task), *clusters) for task, of_task in examples.items()}


class _Earlier:
    """The clusters of an adapter and its extensions, and their tasks."""

    def __init__(self, holder: Any, adapter: str, keys: Keys) -> None:
        config: BaditConfig = holder.badit_config[adapter]
        self.extensions: Extensions = holder.badit_extensions[adapter]
        self.numbers = [
            number
            for number in with_clusters(holder, adapter)
            if self.extensions.has_clusters(number)
        ]
        self.centroids_CE = keys.centroids(self.all("directions"))
        names = _tasks_by_extension(config)
        of_columns = [task for number in self.numbers for task in names[number]]
        # The prompts of a merged task may be in the clusters of several extensions.
        self.tasks = list(dict.fromkeys(of_columns))
        counts = [self.extensions.of("counts", number) for number in self.numbers]
        self.counts_CT = torch.zeros(sum(map(len, counts)), len(self.tasks), dtype=torch.float64)
        columns = torch.tensor([self.tasks.index(task) for task in of_columns])
        self.counts_CT.index_add_(1, columns, torch.block_diag(*counts).double().cpu())

    def all(self, kind: str) -> Tensor:
        """Returns a tensor of all clusters."""
        values = [self.extensions.of(kind, number) for number in self.numbers]
        return torch.cat(values).double().cpu()

    def shares(self, cluster_S: Tensor, weight_S: Tensor) -> dict[str, float]:
        """Returns the share of prompts by the tasks of their clusters, the largest first."""
        of_cluster_CT = F.normalize(self.counts_CT, p=1, dim=1)
        share_T = (weight_S[:, None] * of_cluster_CT[cluster_S]).mean(dim=0)
        order = share_T.argsort(descending=True).tolist()
        return {self.tasks[index]: float(share_T[index]) for index in order if share_T[index] > 0}

    def by_task(self, share_C: Tensor) -> dict[str, float]:
        """Returns the mean of the clusters' shares over the prompts of each task."""
        of_task_TC = F.normalize(self.counts_CT.T, p=1, dim=1)
        means = (of_task_TC @ share_C).tolist()
        return {
            task: mean
            for task, mean, counts in zip(self.tasks, means, of_task_TC, strict=True)
            if counts.any()
        }


def _tasks_by_extension(config: BaditConfig) -> list[Sequence[str]]:
    """Returns the tasks of the joint training, and those of each extension."""
    joint = config.tasks or ["the run's tasks"]
    return [joint, *(extension.tasks for extension in config.extensions)]


def changed_tasks(layers: Sequence[Any], adapter: str, numbers: Collection[int]) -> list[str]:
    """Returns the tasks whose answers change if extensions (0: the adapter's own) are trained.

    These are the extensions' own tasks, and those of later extensions that use their experts.
    """
    config: BaditConfig = layers[0].badit_config[adapter]
    changed = set(numbers)
    is_of_all_passes = 0 in numbers and (config.modules_to_save or config.bias != "none")
    if is_of_all_passes or config.mixing:  # any prompt may mix a trained expert
        changed.update(range(len(config.extensions) + 1))
    for layer in layers:
        for number in range(1, len(config.extensions) + 1):
            used = layer.badit_extensions[adapter].of("used", number).tolist()
            # The experts of the joint training have the first numbers.
            if any(max(0, ability - config.num_experts + 1) in numbers for ability in used):
                changed.add(number)
    tasks = _tasks_by_extension(config)
    return [task for number in sorted(changed) for task in tasks[number]]


def record_merged(holder: Any, adapter: str, task: str, means_SE: Tensor) -> BaditConfig:
    """Records prompts of a task in the clusters that they are nearest to.

    Returns a copy of the configuration, in which their extensions have the task too.
    """
    config: BaditConfig = copy.copy(holder.badit_config[adapter])
    config.extensions = list(config.extensions)
    extensions: Extensions = holder.badit_extensions[adapter]
    number_S, cluster_S = nearest_clusters(holder, adapter, means_SE)
    for number in number_S.unique().tolist():
        tasks = list(_tasks_by_extension(config)[number])
        counts_CT = extensions.of("counts", number)
        if task not in tasks:
            tasks.append(task)
            counts_CT = F.pad(counts_CT, (0, 1))
        clusters = cluster_S[number_S == number].to(counts_CT.device)
        counts_CT[:, tasks.index(task)] += clusters.bincount(minlength=len(counts_CT))
        setattr(extensions, f"counts_{number}", counts_CT)
        if number:
            extension = replace(config.extensions[number - 1], tasks=tasks)
            config.extensions[number - 1] = extension
        else:
            config.tasks = tasks
    return config


# --- the tensors of an extension ---
def refuse_unextendable(adapter: str, layers: Sequence[Any]) -> None:
    """Raises BaditError if no task can be added to an adapter."""
    config: BaditConfig = layers[0].badit_config[adapter]
    if config.routing == "token":
        raise BaditError(
            "routing: 'token' has no clusters of prompts to add a task to; train with "
            "routing='prompt'"
        )
    if config.is_released_form:
        raise BaditError(
            "the released form cannot be extended, because its gates change the base model at step "
            "0; train with the default gates, or with gated='change'"
        )
    has_clusters = any(
        adapter in layer.badit_extensions and layer.badit_extensions[adapter].has_clusters(0)
        for layer in layers
    )
    if not has_clusters:
        raise BaditError(
            "the adapter has no clusters for later tasks, since an earlier version or a loop "
            "without start_task trained it; train it again with badit train, or call "
            "badit.prepare(trainer) before the training"
        )
    if any(isinstance(layer.get_base_layer(), FusedExpert) for layer in layers):
        raise BaditError(
            "target_parameters: experts of fused weights cannot be extended; train with "
            "target_modules"
        )


def refuse_new_expert(
    config: BaditConfig, layers: Sequence[Any], rank: int, mixing: float | None
) -> None:
    """Raises BaditError if a layer has fewer features than the rank, or experts cannot be mixed."""
    check("mixing", mixing, NotNegative | None)
    if mixing and config.subtracted_share and not config.gates_change:
        raise BaditError(
            "extend.mixing: with gated='factors', gates do not scale the change of the experts, so "
            "experts cannot be mixed; train the run with gated='change', or leave it out"
        )
    for layer in layers:
        largest = min(layer.in_features, layer.out_features)
        if rank > largest:
            raise BaditError(
                f"rank: {layer.name} maps {layer.in_features} features to {layer.out_features}, so "
                f"a new expert has at most rank {largest}, not {rank}; set extend.rank={largest}"
            )


def refuse_new_tasks(tasks: Any, clusters: Any) -> None:
    """Raises BaditError unless tasks are different names, with a number of clusters each."""
    if isinstance(tasks, str):
        raise BaditError(f"add_tasks: tasks must be a list of names, such as [{tasks!r}]")
    check("tasks", [*tasks], Annotated[list[Annotated[str, Strict()]], Len(1)])
    if len(set(tasks)) < len(tasks):
        raise BaditError(f"add_tasks: tasks {', '.join(tasks)}: a name is given twice")
    check("clusters", clusters, Count)


def refuse_other_batches(extension: Extension, names: Collection[str]) -> None:
    """Raises BaditError unless batches are those of an extension's tasks, or not divided by task.

    The same number of clusters belongs to each, and batches of other tasks would move them.
    """
    if set(names) not in ({"all"}, set(extension.tasks)):
        raise BaditError(
            f"start_task: has batches of {', '.join(names)}, but the tasks to start are "
            f"{', '.join(extension.tasks)}; pass the batches of each of them"
        )


def extended_config(config: BaditConfig, extension: Extension, mixing: float | None) -> BaditConfig:
    """Returns a copy of a configuration with another extension; BaditError for a known task."""
    for task in extension.tasks:
        if task in config.all_tasks:
            raise BaditError(f"task {task}: the run has a task of this name; rename the new one")
    config = copy.copy(config)
    config.extensions = [*config.extensions, extension]
    if mixing is not None:
        config.mixing = mixing
    return config


def start_extension(layers: Sequence[Any], adapter: str, losses: Losses, start: Any) -> None:
    """Sets what the last extension uses, its first gates and its directions.

    ``start`` is the start β of the gates of earlier abilities; None chooses it by the loss.
    """
    extensions = layers[0].badit_config[adapter].extensions
    if extensions[-1].used:
        _start_gates(layers, adapter, losses, start)
    _find_directions(layers, adapter, len(extensions), losses)


def _start_gates(layers: Sequence[Any], adapter: str, losses: Losses, start: Any) -> None:
    """Sets which earlier abilities the last extension uses, and the first gates of these."""
    code = _natural_gates(layers, adapter, losses)
    number = len(layers[0].badit_config[adapter].extensions)
    first_gates = []
    for layer in layers:
        extensions: Extensions = layer.badit_extensions[adapter]
        used_U = extensions.of("used", number)
        gates_G = gathered(code[layer].float().cpu())[0][:-1]  # without its own
        order_G = gates_G.argsort(descending=True, stable=True)
        used_U.copy_(order_G[: len(used_U)])
        first_gates.append((extensions.of("gates", number), gates_G[order_G[: len(used_U)]]))
    _choose_start(first_gates, losses, STARTS if start is None else (start,))


def _natural_gates(layers: Sequence[Any], adapter: str, losses: Losses) -> dict[Any, Tensor]:
    """Returns, by layer, the mean gates (G) of the prompts without the new extension."""
    sums: dict[Any, list[Tensor]] = defaultdict(list)

    def record(adapted: AdaptedLayer, gates: Tensor) -> Tensor:
        # With a count, so that the mean does not depend on the division into batches.
        counted = F.pad(gates.detach().flatten(0, -2), (0, 1), value=1.0)
        sums[adapted.layer].append(counted.sum(dim=0))
        return gates

    with changed_gates([AdaptedLayer(layer, adapter) for layer in layers], record):
        for _ in losses(False):
            pass
    num_gates = layers[0].badit_config[adapter].num_gates
    # No token may reach a layer, as an expert of an MoE.
    nothing = [torch.zeros(num_gates + 1)]
    totals = {layer: torch.stack(sums.get(layer, nothing)).sum(dim=0) for layer in layers}
    return {layer: total[:-1] / total[-1].clamp_min(1) for layer, total in totals.items()}


def _choose_start(
    first_gates: Sequence[tuple[Tensor, Tensor]], losses: Losses, starts: Sequence[float]
) -> None:
    def set_gates(start: float) -> None:
        with torch.no_grad():
            for gates_U, first_U in first_gates:
                gates_U.copy_(start * first_U)

    totals = []
    if len(starts) > 1:
        for start in starts:
            set_gates(start)
            # With gradients, because such passes belong to the extension in training.
            total = torch.stack([loss.detach() for loss in losses(True)]).sum()
            totals.append(float(sum_over_ranks(total)))
    best = 0
    if totals:
        finite = [total if math.isfinite(total) else math.inf for total in totals]
        best = finite.index(min(finite))
    set_gates(starts[best])


def _find_directions(layers: Sequence[Any], adapter: str, number: int, losses: Losses) -> None:
    """Sets A to directions of the gradient that no frozen A reads."""
    rank = layers[0].badit_config[adapter].extensions[number - 1].rank
    probes = {}
    generator = torch.Generator().manual_seed(number)
    for layer in layers:
        rows = sketch_rows(rank, layer.out_features, layer.in_features)
        probe_MO = torch.randn(rows, layer.out_features, generator=generator)
        probes[layer] = probe_MO.to(layer.device)
    sketches = {
        layer: torch.zeros(len(probe_MO), layer.in_features, device=layer.device)
        for layer, probe_MO in probes.items()
    }
    additions = {layer: partial(add_to_sketch, sketches[layer], probes[layer]) for layer in layers}
    _accumulate(adapter, number, losses, additions)
    bases, crowded = {}, 0
    for layer in layers:
        sketch_MI = gathered(sum_over_ranks(sketches[layer]))[0]
        frozen_FI = frozen_basis(_frozen_rows(layer, adapter, number))
        basis_MI = complement_basis(sketch_MI, frozen_FI, rank)
        if basis_MI is None:
            crowded += 1
            basis_MI = complement_basis(sketch_MI, frozen_FI[:0], rank)
        assert basis_MI is not None
        bases[layer] = basis_MI.to(layer.device, torch.float32)
    if crowded:
        say_once(
            f"badit: {crowded} of {len(layers)} layers have no directions left that no earlier "
            "expert uses; the new expert shares theirs"
        )
    images = {
        layer: torch.zeros(layer.out_features, len(basis_MI), device=layer.device)
        for layer, basis_MI in bases.items()
    }
    additions = {layer: partial(add_to_image, images[layer], bases[layer]) for layer in layers}
    _accumulate(adapter, number, losses, additions)
    with torch.no_grad():
        for layer in layers:
            image_OM = gathered(sum_over_ranks(images[layer]))[0]
            a_RI = top_directions(image_OM, bases[layer], rank)
            # The norm of a row of LoRA's random A.
            a_RI = gathered((a_RI / math.sqrt(3)).float())[0]
            layer.badit_extensions[adapter].of("A", number).copy_(a_RI)


def _frozen_rows(layer: Any, adapter: str, number: int) -> Tensor:
    """Returns the rows of all A's of a layer that are frozen while an extension is trained."""
    extensions: Extensions = layer.badit_extensions[adapter]
    rows = [layer.badit_A[adapter]]
    if layer.badit_config[adapter].subtracted_share:  # its initial A is read too
        rows.append(layer.badit_A0[adapter])
    rows += [extensions.of("A", earlier) for earlier in range(1, number)]
    return torch.cat([row.detach().float() for row in rows])


def _accumulate(
    adapter: str,
    number: int,
    losses: Losses,
    additions: Mapping[Any, Callable[[Tensor, Tensor], None]],
) -> None:
    """Calls each layer's function with the input and the gradient of the output of every batch."""

    def hook(layer: Any, args: tuple, output: Tensor) -> None:
        x_PI = args[0].detach().flatten(0, -2).float()

        def read(gradient: Tensor) -> None:
            gradient_PO = gradient.detach().flatten(0, -2).float()
            if gradient_PO.isfinite().all():
                additions[layer](x_PI, gradient_PO)

        if output.requires_grad:
            output.register_hook(read)

    # The gradient of B passes through the output of every layer.
    factors = [layer.badit_extensions[adapter].of("B", number) for layer in additions]
    handles = [layer.register_forward_hook(hook) for layer in additions]
    try:
        for loss in losses(True):
            torch.autograd.grad(loss, factors, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
