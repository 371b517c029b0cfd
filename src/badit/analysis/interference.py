"""How tasks interfere in a model: conflicts between their gradients, and the units that they share.

Co-activation is that of the paper's Figures 1 and 2, arXiv 2605.05676. Each task marks its strongest units, and for
each unit the tasks are counted. If tasks marked independently, the number of tasks that mark a unit would be binomial
with the marked share p (Poisson-binomial where shares differ), and |A ∩ B| / |A ∪ B| of two tasks would be p / (2 − p).

A neuron is an output of the MLP's gate projection, or of its first projection where there is no gate, before the
activation function. Its score on a task is its mean over all positions of all instances. Assumptions: a block of
parameters, over which the paper averages squared gradients, is a row of a weight matrix; "top 10 %" is of each layer.

Shape suffixes: U = units of a layer, T = tasks, A = units of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from badit.analysis.gates import Batches, PromptGates, marked_experts
from badit.analysis.gradients import TaskGradients, gradient_frames, layer_and_module
from badit.analysis.tables import COUNT, INDEX, Column, Table
from badit.baselines.neurons import top_neurons
from badit.data import on_device
from badit.errors import BaditError
from badit.trainer import answer_losses
from badit.tuner.targets import PROJECTIONS, default_targets

# Numbers that each parameter's gradient is kept in: a cosine's standard error is the inverse root of it.
SKETCH_SIZE = 16384
# Of the units of a layer, how many a task marks.
SHARE = 0.1

COACTIVATION = Table(
    "coactivation",
    "kind layer",
    tasks=Column("by how many tasks a unit is marked", INDEX),
    share="share of the layer's units that are marked by so many",
    chance="the same if the tasks marked independently: binomial with the marked share",
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
    overlap="units of all layers that both have marked, as a share of those that either has (Jaccard)",
    chance="the same if the two marked independently: p / (2 − p) where both mark the share p",
)


def measure_interference(
    model: nn.Module, batches: Batches, gates: PromptGates | None = None, *, progress: bool = False
) -> list[pd.DataFrame]:
    """The gradient tables, and the co-activation tables with "neurons", "parameters" and, given gates, "experts".

    Args:
        model: a causal language model in evaluation mode, perhaps with a PEFT adapter. Which of its parameters require
            a gradient changes.
        batches: by task, its instances, each a batch of one row: ``input_ids``, ``attention_mask`` and ``labels``
            (−100 on all but the answer), (1, T), and perhaps ``tasks``, with the task's name.
        gates: those of the tasks' prompts.
        progress: whether to show a bar.
    """
    sizes = [len(of_task) for of_task in batches.values()]
    parameter = next(model.parameters())
    gradients = TaskGradients(model, len(batches), SKETCH_SIZE)
    sums: dict[int, Any] = {}  # by layer, of a task's outputs over all positions

    def add(layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        sums[layer] = sums.get(layer, 0) + output.detach().flatten(0, -2).sum(dim=0, dtype=torch.float32)

    marked: dict[str, dict[str, list[torch.Tensor]]] = {"neurons": {}, "parameters": {}}
    with ExitStack() as hooks, gradients.taking():
        bar = hooks.enter_context(tqdm(total=sum(sizes), desc="Gradients", disable=not progress))
        for layer, projection in enumerate(_first_projections(model)):
            hooks.callback(projection.register_forward_hook(partial(add, layer)).remove)
        for number, (task, of_task) in enumerate(batches.items()):
            sums.clear()
            positions = 0
            for index, instance in enumerate(of_task):
                gradients.begin_instance(number)
                losses_L, _, _ = answer_losses(model, on_device(instance, parameter.device), model)
                if not torch.isfinite(losses_L.mean()):
                    reason = "it may overflow in its type; use float32" if len(losses_L) else "it has no answer tokens"
                    raise BaditError(f"task {task}, instance {index}: has no finite loss; {reason}")
                losses_L.mean().backward()
                positions += instance["input_ids"].numel()
                bar.update()
            marked["neurons"][task] = strongest([sums[layer].cpu() / positions for layer in sorted(sums)], SHARE)
            marked["parameters"][task] = strongest(gradients.row_scores(number), SHARE)
    few, many = min(sizes), max(sizes)
    data = f"Measured on {len(sizes)} tasks with {few if few == many else f'{few} to {many}'} instances each."
    about_gradients = (
        f"{data} A task's gradient is the mean over its instances of the gradient of the answer's mean cross-entropy, "
        f"without dropout, with the weights in {str(parameter.dtype).removeprefix('torch.')}. Inner products are "
        f"estimated from random projections of each parameter to {SKETCH_SIZE} numbers, and a cosine has a standard "
        f"error of at most {SKETCH_SIZE**-0.5:.2g}. Noise from the choice of instances comes on top: see reliability."
    )
    about_units = (
        f"{data} Each task marks the strongest {SHARE:.3g} of the units of every layer. Neurons: outputs of the MLP's "
        "first projection, before the activation function, averaged over all tokens. Parameters: rows of the layer's "
        "weight matrices, by their squared gradient, averaged over the row and over the instances."
    )
    if gates is not None:
        marked["experts"] = marked_experts(gates)
        about_units += " Experts: those whose mean gate over a task's prompts is above neutral."
    return [*gradient_frames(list(batches), gradients, about_gradients), *coactivation(marked, about_units)]


def _first_projections(model: nn.Module) -> list[nn.Module]:
    """In the order of the layers; where an adapter wraps one, the wrapper, whose output has the adapter's part."""
    names = default_targets(model) or set()
    found = []
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if layer >= 0 and names & {name, below.rpartition(".")[2]} and not name.endswith(".base_layer"):
            found.append((layer, module))
    config: Any = model.config
    if not found or [layer for layer, _ in found] != list(range(getattr(config, "num_hidden_layers", 0))):
        raise BaditError(
            f"co-activation does not go with a model of type {config.model_type}: every layer needs one MLP, with a "
            f"projection named {' or '.join(PROJECTIONS)}"
        )
    return [module for _, module in found]


def strongest(scores: Sequence[torch.Tensor], share: float) -> list[torch.Tensor]:
    """For each layer's scores (U,), masks that are true for the ``share`` of them that is highest, at least one."""
    return [top_neurons({"layer": scores_U}, share)["layer"] for scores_U in scores]


def coactivation(marked: Mapping[str, Mapping[str, Sequence[torch.Tensor]]], about: str) -> list[pd.DataFrame]:
    """The tables coactivation, coactivation_tasks and coactivation_pairs.

    ``marked`` is by the kind of the units and by task: booleans (U,) for each layer. ``about`` says how they were made.
    """
    counts, by_task, pairs = [], [], []
    for kind, masks in marked.items():
        tasks = list(masks)
        layers_TU = [torch.stack(layer).cpu().numpy() for layer in zip(*masks.values(), strict=True)]
        for layer, marked_TU in enumerate(layers_TU):
            tasks_U, sizes_T, units = marked_TU.sum(axis=0), marked_TU.sum(axis=1), marked_TU.shape[1]
            shares = np.bincount(tasks_U, minlength=len(tasks) + 1) / units
            chances = np.ones(1)  # of 0, 1, …, T marks
            for size in sizes_T:
                chances = np.convolve(chances, [1 - size / units, size / units])
            counts += [(kind, layer, k, *row) for k, row in enumerate(zip(shares, chances, strict=True))]
            exclusive_T, universal = (marked_TU & (tasks_U == 1)).sum(axis=1), (tasks_U == len(tasks)).sum()
            of_tasks = zip(tasks, sizes_T, exclusive_T, strict=True)
            by_task += [(kind, task, layer, size, exclusive, universal) for task, size, exclusive in of_tasks]
        marked_TA = np.concatenate(layers_TU, axis=1).astype(np.float64)
        sizes_T = marked_TA.sum(axis=1)
        # Each layer has its own marked shares, so the expected numbers are added up over the layers.
        expected_TT = sum(np.outer(m.sum(axis=1), m.sum(axis=1)) / m.shape[1] for m in layers_TU)
        with np.errstate(invalid="ignore"):  # NaN where neither task marks a unit
            overlap_TT, chance_TT = (
                both_TT / (sizes_T[:, None] + sizes_T - both_TT) for both_TT in (marked_TA @ marked_TA.T, expected_TT)
            )
        order = sorted(range(len(tasks)), key=tasks.__getitem__)
        pairs += [(kind, tasks[a], tasks[b], overlap_TT[a, b], chance_TT[a, b]) for a, b in combinations(order, 2)]
    return [
        COACTIVATION.frame(counts, about),
        COACTIVATION_TASKS.frame(by_task, about),
        COACTIVATION_PAIRS.frame(pairs, about),
    ]
