"""Co-activation: the units that tasks mark as their strongest, and how many tasks share them.

It follows Figures 1 and 2 of the paper, arXiv 2605.05676. Each task marks its strongest units, and
the tasks that mark each unit are counted. Assumptions: the blocks of parameters over which the
paper averages squared gradients are rows of weight matrices; "top 10 %" applies to each layer. An
MLP without a gate projection has the neurons of its first projection.

Shape suffixes: T = tasks, U = units of a layer, M = adapted modules, K = experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from badit.analysis.gates import PromptGates
from badit.analysis.tables import COUNT, INDEX, Column, Table, layer_and_module
from badit.baselines.neurons import top_neurons
from badit.support.errors import BaditError
from badit.tuner.targets import PROJECTIONS, default_targets

_ROUNDING = 1e-6  # of a neutral gate

Marks = Mapping[int, np.ndarray]  # by layer, which tasks mark its units, (T, U)

COACTIVATION = Table(
    "coactivation",
    "kind layer",
    tasks=Column("number of tasks that mark a unit", INDEX),
    share="share of the layer's units that this many tasks mark",
    chance="the same if tasks marked units independently: binomial with the marked share",
)
COACTIVATION_TASKS = Table(
    "coactivation_tasks",
    "kind task layer",
    marked=Column("units marked by the task", COUNT),
    exclusive=Column("units marked by this task alone", COUNT),
    universal=Column("units marked by every task", COUNT),
)
COACTIVATION_PAIRS = Table(
    "coactivation_pairs",
    "kind task_a task_b",
    overlap="units of all layers that both tasks mark, divided by units that either task marks "
    "(Jaccard)",
)


class NeuronOutputs:
    """Sums of the outputs of the MLPs' first projections, by layer and task.

    Until ``hooks`` is closed, each forward pass adds its outputs to those of ``task``.
    """

    def __init__(self, model: nn.Module, tasks: int, hooks: ExitStack) -> None:
        self.task = 0
        self.positions_T = torch.zeros(tasks, dtype=torch.long)
        self._sums_TU: dict[int, torch.Tensor] = {}
        for layer, projection in enumerate(_first_projections(model)):
            hook = projection.register_forward_hook(partial(self._add, layer))
            hooks.callback(hook.remove)

    def _add(self, layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output_NU = output.detach().flatten(0, -2)
        # In bfloat16, a sum over many positions would lose most of its digits.
        sum_U = output_NU.sum(dim=0, dtype=torch.float32)
        zeros_TU = sum_U.new_zeros(len(self.positions_T), len(sum_U))
        self._sums_TU.setdefault(layer, zeros_TU)[self.task] += sum_U
        # All layers see the same positions, so one layer counts them.
        if layer == 0:
            self.positions_T[self.task] += len(output_NU)

    def means(self) -> dict[int, torch.Tensor]:
        """Returns the mean output of each neuron over all positions of a task, by layer (T, U)."""
        positions_T1 = self.positions_T[:, None]
        return {layer: sums.cpu() / positions_T1 for layer, sums in sorted(self._sums_TU.items())}


def _first_projections(model: nn.Module) -> list[nn.Module]:
    """Returns the MLPs' first projections by layer.

    If they are adapted, these are the adapter layers, whose outputs include the adapter.
    """
    names = default_targets(model) or set()
    projections = []
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if layer < 0 or name.endswith(".base_layer"):
            continue
        # The default targets are full names where the last parts are ambiguous.
        if name in names or below.rpartition(".")[2] in names:
            projections.append((layer, module))
    config: Any = model.config
    # Another order, or several projections in a layer, would mix up the layers of the tables.
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not projections or [layer for layer, _ in projections] != list(range(layers)):
        problem = f"co-activation cannot be measured for type {config.model_type}"
        needed = f"every layer needs one MLP with a projection named {' or '.join(PROJECTIONS)}"
        raise BaditError(f"model: {problem}: {needed}")
    return [module for _, module in projections]


def strongest(scores: Mapping[int, torch.Tensor], share: float) -> Marks:
    """Marks the ``share`` of each layer's units with a task's highest scores (T, U)."""
    marks = {}
    for layer, scores_TU in scores.items():
        masks = [top_neurons({"units": scores_U}, share)["units"] for scores_U in scores_TU]
        marks[layer] = torch.stack(masks).numpy()
    return marks


def marked_experts(gates: PromptGates) -> Marks:
    """Marks the experts of a layer's modules whose mean gate over a task's prompts is above 1."""
    layers_M = np.array([layer for layer, _ in gates.modules])
    marked_TMK = gates.means > 1 + _ROUNDING
    marks = {}
    for layer in np.unique(layers_M).tolist():
        # Experts of a layer's modules are different units, also those with the same number.
        of_layer_TMK = marked_TMK[:, layers_M == layer]
        marks[layer] = of_layer_TMK.reshape(len(marked_TMK), -1)
    return marks


def coactivation(
    tasks: Sequence[str], marked: Mapping[str, Marks], description: str
) -> list[pd.DataFrame]:
    """Returns the tables of co-activation from the marks by kind of unit.

    These are coactivation, coactivation_tasks and coactivation_pairs.
    """
    counts, of_tasks, pairs = [], [], []
    for kind, layers in marked.items():
        for layer, marked_TU in layers.items():
            counts += [(kind, layer, *row) for row in _counts(marked_TU)]
            of_tasks += [(kind, task, layer, *row) for task, *row in _by_task(tasks, marked_TU)]
        # Without layers, as for parameters if all weights are quantised, overlaps are not defined.
        if layers:
            pairs += [(kind, *row) for row in _overlaps(tasks, layers)]
    return [
        COACTIVATION.frame(counts, description),
        COACTIVATION_TASKS.frame(of_tasks, description),
        COACTIVATION_PAIRS.frame(pairs, description),
    ]


def _counts(marked_TU: np.ndarray) -> Iterator[tuple]:
    """Yields the numbers of tasks 0, 1, …, T, with the share of units they mark, and chance."""
    tasks, units = marked_TU.shape
    shares = np.bincount(marked_TU.sum(axis=0), minlength=tasks + 1) / units
    # The number of marks is a sum of independent ones, so its distribution is their convolution.
    chances = np.ones(1)
    for size in marked_TU.sum(axis=1):
        chances = np.convolve(chances, [1 - size / units, size / units])
    return zip(range(tasks + 1), shares, chances, strict=True)


def _by_task(tasks: Sequence[str], marked_TU: np.ndarray) -> Iterator[tuple]:
    """Yields each task with its units: marked, exclusive and universal."""
    tasks_U = marked_TU.sum(axis=0)
    universal = (tasks_U == len(tasks)).sum()
    sizes_T = marked_TU.sum(axis=1)
    exclusive_T = (marked_TU & (tasks_U == 1)).sum(axis=1)
    for task, size, exclusive in zip(tasks, sizes_T, exclusive_T, strict=True):
        yield task, size, exclusive, universal


def _overlaps(tasks: Sequence[str], layers: Marks) -> Iterator[tuple]:
    """Yields each pair of tasks with the Jaccard overlap of their units in all layers."""
    # Jaccard: |A ∩ B| / |A ∪ B|, where |A ∪ B| = |A| + |B| − |A ∩ B|.
    marked_TU = np.concatenate([*layers.values()], axis=1).astype(float)
    both_TT = marked_TU @ marked_TU.T
    sizes_T = marked_TU.sum(axis=1)
    with np.errstate(invalid="ignore"):  # NaN where neither task marks a unit
        overlap_TT = both_TT / (sizes_T[:, None] + sizes_T - both_TT)
    # task_b is later in alphabetical order.
    order = sorted(range(len(tasks)), key=tasks.__getitem__)
    for a, b in combinations(order, 2):
        yield tasks[a], tasks[b], overlap_TT[a, b]
