"""Which units work for several tasks: each task marks its strongest units, and for each unit the tasks are counted.

Units are neurons, rows of weight matrices, or experts. Among tasks that mark independently of one another, a unit is
marked by as many as there are heads in T tosses: binomial with the marked share p (Poisson-binomial where the tasks'
shares differ), and the sets of two tasks overlap, as |A ∩ B| / |A ∪ B|, by p / (2 − p).

A neuron is an output of the MLP's gate projection, or of its first projection where there is no gate, before the
activation function: the paper's choice (arXiv 2605.05676), and what BADIT adapts. Its score on a task is its mean over
all attended positions of all instances. Assumption, where the paper says "top 10 %": of each layer, since outputs and
gradients differ in scale between layers.

Shape suffixes: U = units of a layer, T = tasks, L = layers, A = units of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from badit.analysis.gradients import layer_and_module
from badit.analysis.tables import TidyTable, Value
from badit.baselines.neurons import top_neurons
from badit.errors import BaditError
from badit.tuner.model import TARGET_MODULES

Marked = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]
Rows = list[list[Value]]

_KIND = '"neurons", "parameters" (rows of weight matrices) or "experts"'
COLUMNS: dict[str, dict[str, str]] = {
    "coactivation": {
        "kind": _KIND,
        "layer": "transformer layer, from 0",
        "tasks": "by how many tasks a unit is marked",
        "share": "share of the layer's units that are marked by so many",
        "chance": "the same if the tasks marked independently: binomial with the marked share",
    },
    "coactivation_tasks": {
        "kind": _KIND,
        "task": "the task",
        "layer": "transformer layer, from 0",
        "marked": "units marked by the task",
        "exclusive": "units marked by this task alone",
        "universal": "units marked by every task",
    },
    "coactivation_pairs": {
        "kind": _KIND,
        "task_a": "a task",
        "task_b": "another task, later in the alphabet",
        "overlap": "units of all layers that both have marked, as a share of those that either has (Jaccard index)",
        "chance": "the same if the two marked independently: p / (2 − p) where both mark the share p",
    },
}
_FIRST_PROJECTIONS = sorted({name for names in TARGET_MODULES.values() for name in names})


def coactivation_tables(kind: str, marked: Marked) -> dict[str, Rows]:
    """Counts, for every unit, the tasks that have marked it.

    Args:
        kind: what the units are, for the first column.
        marked: by task, which units it marks: booleans (L, U), or one (U,) a layer where widths differ.

    Returns:
        The rows of the tables ``coactivation``, ``coactivation_tasks`` and ``coactivation_pairs``, by these names; the
        columns are those of :data:`COLUMNS`.

    Raises:
        BaditError: no task, or tasks with units of different layers.
    """
    names = list(marked)
    if not names or any(_widths(marked[name]) != _widths(marked[names[0]]) for name in names):
        raise BaditError("marked: give at least one task, and for all tasks units of the same layers")
    layers_TU = [torch.stack([mask.cpu() for mask in of_tasks]) for of_tasks in zip(*marked.values(), strict=True)]
    counts: Rows = []
    by_task: Rows = []
    for layer, marked_TU in enumerate(layers_TU):
        tasks_U = marked_TU.sum(dim=0)
        shares = (tasks_U.bincount(minlength=len(names) + 1).double() / len(tasks_U)).tolist()
        chances = _independent(marked_TU.double().mean(dim=1).tolist())
        counts += [[kind, layer, *row] for row in zip(range(len(names) + 1), shares, chances, strict=True)]
        universal = int((tasks_U == len(names)).sum())
        for name, marked_U in zip(names, marked_TU, strict=True):
            exclusive = int((marked_U & (tasks_U == 1)).sum())
            by_task.append([kind, name, layer, int(marked_U.sum()), exclusive, universal])
    pairs: Rows = [[kind, *pair] for pair in _pairs(names, layers_TU)]
    return {"coactivation": counts, "coactivation_tasks": by_task, "coactivation_pairs": pairs}


def tidy(rows: Sequence[Mapping[str, Rows]], about: str) -> list[TidyTable]:
    """The tables that the rows of several kinds make."""
    return [
        TidyTable(name, about, columns, [row for of_kind in rows for row in of_kind[name]])
        for name, columns in COLUMNS.items()
    ]


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
        sums = self._sums[task]
        return [sums[layer].cpu() / self._positions[task] for layer in range(len(self._projections))]

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


def _widths(of_task: torch.Tensor | Sequence[torch.Tensor]) -> list[int]:
    return [len(mask) for mask in of_task]


def _independent(shares: Sequence[float]) -> list[float]:
    """The chances of 0, 1, …, T marks when task t marks with the probability ``shares[t]``, independently."""
    chances = np.ones(1)
    for share in shares:
        chances = np.convolve(chances, [1 - share, share])
    return chances.tolist()


def _pairs(names: Sequence[str], layers_TU: Sequence[torch.Tensor]) -> Iterator[list[Value]]:
    marked_TA = torch.cat(list(layers_TU), dim=1).double()
    both_TT = (marked_TA @ marked_TA.T).tolist()
    # Expected numbers, added up over the layers, each of which has a share of its own.
    expected_both_TT = torch.stack([_expected_both(marked_TU.double()) for marked_TU in layers_TU]).sum(dim=0).tolist()
    sizes_T = marked_TA.sum(dim=1).tolist()
    order = sorted(range(len(names)), key=names.__getitem__)
    for position, a in enumerate(order):
        for b in order[position + 1 :]:
            sizes = sizes_T[a] + sizes_T[b]
            yield [names[a], names[b], *(_overlap(both[a][b], sizes) for both in (both_TT, expected_both_TT))]


def _expected_both(marked_TU: torch.Tensor) -> torch.Tensor:
    sizes_T = marked_TU.sum(dim=1)
    return sizes_T[:, None] * sizes_T / marked_TU.shape[1]


def _overlap(both: float, sizes: float) -> float | None:
    """|A ∩ B| / |A ∪ B| from |A ∩ B| and |A| + |B|."""
    return both / (sizes - both) if sizes else None
