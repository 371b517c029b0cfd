"""How tasks interfere in a model: conflicts between their gradients, and the units that they share.

One pass over the data measures both: a forward pass of each instance gives its neurons' outputs, the backward pass its
gradients (:mod:`badit.analysis.gradients`). The measures are those of the interference literature (gradient conflict
and magnitude similarity: Yu et al. 2020, arXiv 2001.06782) and of the paper's Figures 1 and 2 (co-activation, arXiv
2605.05676). Assumption, where the paper averages squared gradients over blocks of parameters: a block is a row of a
weight matrix, what one output feature reads.

Co-activation: each task marks its strongest units, and for each unit the tasks are counted. Units are neurons, rows of
weight matrices, or experts. Among tasks that mark independently of one another, the number of tasks that mark a unit is
binomial with the marked share p (Poisson-binomial where the tasks' shares differ), and the sets of two tasks overlap,
as |A ∩ B| / |A ∪ B|, by p / (2 − p).

A neuron is an output of the MLP's gate projection, or of its first projection where there is no gate, before the
activation function: the paper's choice, and what BADIT adapts. Its score on a task is its mean over all attended
positions of all instances. Assumption, where the paper says "top 10 %": of each layer, since outputs and gradients
differ in scale between layers.

Shape suffixes: U = units of a layer, T = tasks, A = units of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from badit.analysis.gradients import TaskGradients, gradient_frames, layer_and_module
from badit.analysis.tables import COUNT, LAYER, SHARING, TASK, TASK_A, TASK_B, TEXT, Column, Table
from badit.baselines.neurons import top_neurons
from badit.errors import BaditError
from badit.trainer import answer_losses
from badit.tuner.model import TARGET_MODULES

Batches = Mapping[str, Sequence[Mapping[str, Any]]]
Marked = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]

_KIND = Column('"neurons", "parameters" (rows of weight matrices) or "experts"', TEXT)
COACTIVATION = Table(
    "coactivation",
    kind=_KIND,
    layer=LAYER,
    tasks=Column("by how many tasks a unit is marked", SHARING),
    share=Column("share of the layer's units that are marked by so many"),
    chance=Column("the same if the tasks marked independently: binomial with the marked share"),
)
COACTIVATION_TASKS = Table(
    "coactivation_tasks",
    kind=_KIND,
    task=TASK,
    layer=LAYER,
    marked=Column("units marked by the task", COUNT),
    exclusive=Column("units marked by this task alone", COUNT),
    universal=Column("units marked by every task", COUNT),
)
COACTIVATION_PAIRS = Table(
    "coactivation_pairs",
    kind=_KIND,
    task_a=TASK_A,
    task_b=TASK_B,
    overlap=Column("units of all layers that both have marked, as a share of those that either has (Jaccard)"),
    chance=Column("the same if the two marked independently: p / (2 − p) where both mark the share p"),
)
_FIRST_PROJECTIONS = sorted({name for names in TARGET_MODULES.values() for name in names})


def measure_interference(
    model: nn.Module,
    batches: Batches,
    *,
    sketch_size: int = 16384,
    share: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> list[pd.DataFrame]:
    """Measures tasks' gradients and the units that they have in common, and leaves the model as it was.

    Args:
        model: a causal language model, perhaps with a PEFT adapter.
        batches: by task, batches of ``input_ids``, ``attention_mask`` and ``labels`` (−100 on all but the answers),
            each (B, T), and perhaps ``tasks``, the rows' task names.
        sketch_size: numbers that each parameter's gradient is kept in; a cosine's standard error is its inverse root.
        share: of the units of a layer, how many a task marks.
        seed: of the sketches.
        progress: whether to show a bar.

    Returns:
        The tables gradient_pairs, gradient_overall, gradient_summary, gradient_tasks, coactivation, coactivation_tasks
        and coactivation_pairs; the last three with the kinds "neurons" and "parameters".

    Raises:
        BaditError: no tasks, an instance without a finite loss, or a model whose layers have no MLP of a known kind.
    """
    sizes = {task: sum(len(batch["input_ids"]) for batch in of_task) for task, of_task in batches.items()}
    if not sizes or not all(sizes.values()):
        raise BaditError("batches: give at least one task, and for every task at least one instance")
    gradients = TaskGradients(model, len(batches), sketch_size, seed)
    neurons = NeuronMeans(model, len(batches))
    with gradients.taking(), tqdm(total=sum(sizes.values()), desc="Gradients", disable=not progress) as bar:
        for number, (task, of_task) in enumerate(batches.items()):
            with neurons.counting(number):
                for index, instance in enumerate(_instances(of_task, next(model.parameters()).device)):
                    gradients.begin_instance(number)
                    _backward(model, instance, f"task {task}, instance {index}")
                    bar.update()
    marked = {
        kind: {task: strongest(scores(number), share) for number, task in enumerate(batches)}
        for kind, scores in (("neurons", neurons.of_task), ("parameters", gradients.row_scores))
    }
    few, many = min(sizes.values()), max(sizes.values())
    data = f"Measured on {len(sizes)} tasks with {few if few == many else f'{few} to {many}'} instances each."
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    about_gradients = (
        f"{data} A task's gradient is the mean over its instances of the gradient of the answer's mean "
        "cross-entropy (so that neither padding nor the make-up of batches matters), without dropout, with the weights "
        f"in {dtype}. Weights are those of the linear layers inside the transformer's layers, whether they are trained "
        "or not. Inner products are estimated without bias from random projections (count sketches) of each parameter "
        f"to {sketch_size} numbers, and a cosine has a standard error of at most {sketch_size**-0.5:.2g}; parameters "
        "of no more numbers are exact. Noise from the choice of instances comes on top: see reliability."
    )
    about_units = (
        f"{data} Each task marks the strongest {share:.3g} of the units of every layer, ranked within it. "
        "Neurons: outputs of the MLP's gate projection (or first projection), before the activation function, averaged "
        "over all tokens of prompts and answers. Parameters: rows of the layer's weight matrices, attention and MLP "
        "together, by their squared gradient, averaged over the row and over the instances."
    )
    return [*gradient_frames(list(batches), gradients, about_gradients), *coactivation(marked, about_units)]


def _instances(batches: Sequence[Mapping[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Each row as a batch of its own, without padding."""
    for batch in batches:
        for row, mask_T in enumerate(batch["attention_mask"].bool()):
            keys = ("input_ids", "attention_mask", "labels")
            tensors = {key: batch[key][row][mask_T][None].to(device) for key in keys}
            yield tensors | ({"tasks": [batch["tasks"][row]]} if "tasks" in batch else {})


def _backward(model: nn.Module, instance: Mapping[str, Any], where: str) -> None:
    losses_L, _, _ = answer_losses(model, instance, model)
    loss = losses_L.mean()
    if not torch.isfinite(loss):
        reason = "it may overflow in its type; use float32" if len(losses_L) else "it has no answer tokens"
        raise BaditError(f"{where}: has no finite loss; {reason}")
    loss.backward()


def coactivation(marked: Mapping[str, Marked], about: str) -> list[pd.DataFrame]:
    """Counts, for every unit, the tasks that have marked it.

    Args:
        marked: by the kind of the units and by task, which units it marks: booleans (layers, U), or one (U,) per layer
            where widths differ.
        about: how the units were marked.

    Returns:
        The tables coactivation, coactivation_tasks and coactivation_pairs.
    """
    counts, by_task, pairs = [], [], []
    for kind, masks in marked.items():
        tasks = list(masks)
        layers_TU = [torch.stack([mask.cpu() for mask in layer]).numpy() for layer in zip(*masks.values(), strict=True)]
        for layer, marked_TU in enumerate(layers_TU):
            tasks_U, sizes_T = marked_TU.sum(axis=0), marked_TU.sum(axis=1)
            shares = np.bincount(tasks_U, minlength=len(tasks) + 1) / len(tasks_U)
            chances = _independent(sizes_T / len(tasks_U))
            counts += [(kind, layer, number, *row) for number, row in enumerate(zip(shares, chances, strict=True))]
            exclusive_T, universal = (marked_TU & (tasks_U == 1)).sum(axis=1), (tasks_U == len(tasks)).sum()
            of_tasks = zip(tasks, sizes_T, exclusive_T, strict=True)
            by_task += [(kind, task, layer, size, exclusive, universal) for task, size, exclusive in of_tasks]
        for (a, b), overlap, chance in _overlaps(layers_TU, sorted(range(len(tasks)), key=tasks.__getitem__)):
            pairs.append((kind, tasks[a], tasks[b], overlap, chance))
    return [
        COACTIVATION.frame(counts, about),
        COACTIVATION_TASKS.frame(by_task, about),
        COACTIVATION_PAIRS.frame(pairs, about),
    ]


def _independent(shares: np.ndarray) -> np.ndarray:
    """The chances of 0, 1, …, T marks when task t marks with the probability ``shares[t]``, independently."""
    chances = np.ones(1)
    for share in shares:
        chances = np.convolve(chances, [1 - share, share])
    return chances


def _overlaps(layers_TU: Sequence[np.ndarray], order: Sequence[int]) -> Iterator[tuple[tuple[int, int], float, float]]:
    """By pair of tasks, |A ∩ B| / |A ∪ B| as observed and as expected; NaN where neither marks a unit."""
    marked_TA = np.concatenate(layers_TU, axis=1).astype(np.float64)
    sizes_T = marked_TA.sum(axis=1)
    # Each layer has marked shares of its own, so the expected numbers are added up over the layers.
    expected_TT = sum(np.outer(m.sum(axis=1), m.sum(axis=1)) / m.shape[1] for m in layers_TU)
    with np.errstate(invalid="ignore"):
        overlap_TT, chance_TT = (
            both_TT / (sizes_T[:, None] + sizes_T - both_TT) for both_TT in (marked_TA @ marked_TA.T, expected_TT)
        )
    for pair in combinations(order, 2):
        yield pair, overlap_TT[pair], chance_TT[pair]


def strongest(scores: Sequence[torch.Tensor], share: float) -> list[torch.Tensor]:
    """For each layer's scores (U,), masks that are true for the ``share`` of them that is highest, at least one."""
    return [top_neurons({"layer": scores_U}, share)["layer"] for scores_U in scores]


class NeuronMeans:
    """The mean output of every neuron over the positions of a task's instances.

    Raises:
        BaditError: a model whose layers have no single MLP with a first projection of a known name.
    """

    def __init__(self, model: nn.Module, tasks: int) -> None:
        self._projections = _first_projections(model)
        self._sums: list[dict[int, torch.Tensor]] = [{} for _ in range(tasks)]
        self._positions = [0] * tasks

    @contextmanager
    def counting(self, task: int) -> Iterator[None]:
        """Within, forward passes without padding count for the task, numbered from 0."""
        with ExitStack() as hooks:
            for layer, projection in enumerate(self._projections):
                hooks.callback(projection.register_forward_hook(partial(self._add, task, layer)).remove)
            yield

    def of_task(self, task: int) -> list[torch.Tensor]:
        """The means (U,) of each layer, on the CPU."""
        return [self._sums[task][layer].cpu() / self._positions[task] for layer in range(len(self._projections))]

    def _add(self, task: int, layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        outputs = output.detach().flatten(0, -2)
        self._sums[task][layer] = outputs.sum(dim=0, dtype=torch.float32) + self._sums[task].get(layer, 0)
        if layer == 0:
            self._positions[task] += len(outputs)


def _first_projections(model: nn.Module) -> list[nn.Module]:
    """In the order of the layers; where an adapter wraps one, the wrapper, whose output has the adapter's part."""
    found: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if layer >= 0 and below.rpartition(".")[2] in _FIRST_PROJECTIONS and not name.endswith(".base_layer"):
            found.setdefault(layer, []).append(module)
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", 0)
    if not found or list(found) != list(range(layers)) or any(len(modules) > 1 for modules in found.values()):
        raise BaditError(
            f"co-activation does not go with a model of type {getattr(config, 'model_type', type(model).__name__)}: "
            f"every layer needs one MLP, with a projection named {' or '.join(_FIRST_PROJECTIONS)}"
        )
    return [modules[0] for modules in found.values()]
