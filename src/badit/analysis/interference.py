"""Interference between the tasks of a model: conflicts between their gradients, and the units that they share.

Gradients are measured for "weights", the weight matrices of the linear layers inside the transformer layers, frozen or
not, and for "adapter", the parameters of a PEFT adapter that the loss depends on. The backward pass stores them one
parameter at a time as count sketches (Charikar et al. 2002, "Finding Frequent Items in Data Streams"; for inner
products, Weinberger et al. 2009, arXiv 0902.2206). Coordinate i is added, with sign σ(i), to bucket h(i) of M buckets:

    (S a)_b = Σ_{h(i) = b} σ(i) a_i,    E⟨S a, S b⟩ = ⟨a, b⟩,    Var⟨S a, S b⟩ ≲ (‖a‖² ‖b‖² + ⟨a, b⟩²) / M.

To save memory, the vector is cut into runs c of M coordinates p, with random signs s and t and random shifts:
h(c, p) = (p + shift_c) mod M, σ(c, p) = s_p t_c. Coordinates of one run never share a bucket. Those of two runs share
one as rarely as with independent hashing, and the signs make the estimate unbiased.

Co-activation follows Figures 1 and 2 of the paper, arXiv 2605.05676. Each task marks its strongest units, and the tasks
that mark each unit are counted. If tasks marked units independently, this count would be binomial with the marked share
p (Poisson-binomial if the shares differ), and |A ∩ B| / |A ∪ B| of two tasks would be p / (2 − p).
A neuron is an output of the MLP's gate projection (its first projection if it has no gate), before the activation
function. Its score for a task is its mean over all positions of all instances. Assumptions: the blocks of parameters
over which the paper averages squared gradients are rows of weight matrices; "top 10 %" applies to each layer.

Shape suffixes: N = coordinates, M = buckets, T = tasks, R = 2T half-tasks in task order, U = units of a layer or rows
of a weight, A = units of all layers, P = places (a kind, layer and module), E = pairs of tasks.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from badit.analysis.gates import ByLayer, PromptGates, marked_experts, span
from badit.analysis.tables import COUNT, INDEX, SHARED, Column, Table, layer_and_module
from badit.baselines.neurons import top_neurons
from badit.data import on_device
from badit.errors import BaditError
from badit.trainer import answer_losses
from badit.tuner.model import TaskBatches
from badit.tuner.targets import PROJECTIONS, default_targets, is_quantised

# Size of the sketch of each parameter's gradient. A cosine has a standard error of at most 1 / √SKETCH_SIZE.
SKETCH_SIZE = 16384
# The share of a layer's units that a task marks.
SHARE = 0.1

Place = tuple[str, int, str]  # "weights" or "adapter", the layer, the module's name within the layer

GRADIENT_PAIRS = Table("gradient_pairs", "task_a task_b layer module cosine magnitude_similarity")
GRADIENT_OVERALL = Table(
    "gradient_overall",
    "task_a task_b parameters cosine",
    corrected_cosine="estimated cosine of the gradients without noise, from two halves of the instances; null if the "
    "reliability is not positive",
    magnitude_similarity=SHARED["magnitude_similarity"],
)
GRADIENT_SUMMARY = Table(
    "gradient_summary",
    "layer module parameters",
    conflict_rate="share of the pairs of tasks whose gradients have a negative cosine",
    mean_cosine="mean cosine over the pairs of tasks",
    mean_magnitude_similarity="mean of 2|a||b| / (|a|² + |b|²) over the pairs of tasks",
    reliability=f"{SHARED['reliability'].meaning}; mean over tasks",
)
GRADIENT_TASKS = Table(
    "gradient_tasks",
    "task parameters",
    norm="norm of the task's gradient, in nats per token and unit of the parameters",
    reliability=SHARED["reliability"],
    instances=Column("number of instances that the gradient is averaged over", COUNT),
)
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
    overlap="units of all layers that both tasks mark, divided by units that either task marks (Jaccard)",
    chance="the same if the tasks marked units independently: p / (2 − p) if both mark the share p",
)


def measure_interference(
    model: nn.Module, batches: TaskBatches, gates: PromptGates | None = None, *, progress: bool = False
) -> list[pd.DataFrame]:
    """Returns the gradient tables and the co-activation tables of "neurons", "parameters" and, with gates, "experts".

    Args:
        model: a causal language model in evaluation mode, optionally with a PEFT adapter. The ``requires_grad`` of its
            parameters is changed.
        batches: by task, its instances, each a batch of one row: ``input_ids``, ``attention_mask`` and ``labels``
            (−100 except for the answer), (1, T), and optionally ``tasks``, with the task's name.
        gates: the gates of the tasks' prompts.
        progress: show a progress bar.
    """
    sizes = [len(of_task) for of_task in batches.values()]
    parameter = next(model.parameters())
    sums: dict[int, Any] = {}  # by layer: sum of a task's outputs over all positions

    def add(layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        sums[layer] = sums.get(layer, 0) + output.detach().flatten(0, -2).sum(dim=0, dtype=torch.float32)

    marked: dict[str, dict[str, ByLayer]] = {"neurons": {}, "parameters": {}}
    with ExitStack() as hooks, torch.enable_grad():
        gradients = TaskGradients(model, sizes, SKETCH_SIZE, hooks)
        bar = hooks.enter_context(tqdm(total=sum(sizes), desc="Gradients", disable=not progress))
        for layer, projection in enumerate(_first_projections(model)):
            hooks.callback(projection.register_forward_hook(partial(add, layer)).remove)
        for number, (task, of_task) in enumerate(batches.items()):
            sums.clear()
            positions = 0
            for index, instance in enumerate(of_task):
                gradients.row = 2 * number + index % 2
                losses_L, _, _ = answer_losses(model, on_device(instance, parameter.device))
                if not torch.isfinite(losses_L.mean()):
                    reason = "the dtype may overflow: use float32" if len(losses_L) else "no answer tokens: remove it"
                    raise BaditError(f"task {task}, instance {index}: the loss is not finite; {reason}")
                losses_L.mean().backward()
                positions += instance["input_ids"].numel()
                bar.update()
            marked["neurons"][task] = _strongest({layer: sums[layer].cpu() / positions for layer in sorted(sums)})
            marked["parameters"][task] = _strongest(gradients.row_scores(number))
    data = f"Measured on {len(sizes)} tasks with {span(sizes)} instances each."
    about_gradients = (
        f"{data} A task's gradient is the mean over its instances of the gradient of the answer's mean cross-entropy, "
        f"without dropout, with the weights in {str(parameter.dtype).removeprefix('torch.')}. Inner products are "
        f"estimated from random projections of each parameter to {SKETCH_SIZE} numbers, so a cosine has a standard "
        f"error of at most {SKETCH_SIZE**-0.5:.2g}. The choice of instances adds further noise: see reliability."
    )
    about_units = (
        f"{data} Each task marks the strongest {SHARE:.3g} of the units of every layer. Neurons: outputs of the MLP's "
        "first projection, before the activation function, averaged over all tokens. Parameters: rows of the layer's "
        "weight matrices, by their squared gradient, averaged over row and instances, unless they are quantised."
    )
    if gates is not None:
        marked["experts"] = marked_experts(gates)
        about_units += " Experts: those whose mean gate over a task's prompts is above neutral."
    return [*gradient_frames(list(batches), gradients, about_gradients), *coactivation(marked, about_units)]


def _first_projections(model: nn.Module) -> list[nn.Module]:
    """Returns the MLPs' first projections by layer, or their adapter layers, whose outputs include the adapter."""
    names = default_targets(model) or set()
    found = []
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if layer >= 0 and names & {name, below.rpartition(".")[2]} and not name.endswith(".base_layer"):
            found.append((layer, module))
    config: Any = model.config
    if not found or [layer for layer, _ in found] != list(range(getattr(config, "num_hidden_layers", 0))):
        raise BaditError(
            f"model: co-activation cannot be measured for type {config.model_type}: every layer needs one MLP with a "
            f"projection named {' or '.join(PROJECTIONS)}"
        )
    return [module for _, module in found]


def _strongest(scores: ByLayer) -> ByLayer:
    """Returns, for each layer's scores (U,), a mask of the units that a task marks."""
    return {layer: top_neurons({"layer": scores_U}, SHARE)["layer"] for layer, scores_U in scores.items()}


def coactivation(marked: Mapping[str, Mapping[str, ByLayer]], about: str) -> list[pd.DataFrame]:
    """Returns the tables coactivation, coactivation_tasks and coactivation_pairs.

    ``marked`` has, by kind of unit and by task, a boolean mask (U,) of each layer. ``about`` says how they were
    measured. A kind without layers is left out.
    """
    counts, by_task, pairs = [], [], []
    for kind, masks in marked.items():
        tasks, layers = list(masks), next(iter(masks.values()))
        layers_TU = {each: torch.stack([mask[each] for mask in masks.values()]).cpu().numpy() for each in layers}
        if not layers:
            continue
        for layer, marked_TU in layers_TU.items():
            tasks_U, sizes_T, units = marked_TU.sum(axis=0), marked_TU.sum(axis=1), marked_TU.shape[1]
            shares = np.bincount(tasks_U, minlength=len(tasks) + 1) / units
            chances = np.ones(1)  # probabilities of 0, 1, …, T marks
            for size in sizes_T:
                chances = np.convolve(chances, [1 - size / units, size / units])
            counts += [(kind, layer, k, *row) for k, row in enumerate(zip(shares, chances, strict=True))]
            exclusive_T, universal = (marked_TU & (tasks_U == 1)).sum(axis=1), (tasks_U == len(tasks)).sum()
            of_tasks = zip(tasks, sizes_T, exclusive_T, strict=True)
            by_task += [(kind, task, layer, size, exclusive, universal) for task, size, exclusive in of_tasks]
        marked_TA = np.concatenate(list(layers_TU.values()), axis=1).astype(np.float64)
        sizes_T = marked_TA.sum(axis=1)
        # Each layer has its own marked shares, so the expected counts are summed over the layers.
        expected_TT = sum(np.outer(m.sum(axis=1), m.sum(axis=1)) / m.shape[1] for m in layers_TU.values())
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


class MeasuredParameter(NamedTuple):
    """A parameter and its place in the model."""

    place: Place
    parameter: nn.Parameter
    in_dim: int | None = None  # dimension of the input features; None for an adapter's parameters


def measured_parameters(model: nn.Module) -> list[MeasuredParameter]:
    """Returns the weights of the linear layers, then the adapter's parameters, each in model order."""
    # PEFT starts the names of an adapter's modules and parameters with a prefix such as lora_.
    own: Any = f".{model.base_model.prefix}" if isinstance(model, PeftModel) else None
    found = []
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if layer < 0 or (own and own in name) or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight: Any = module.weight
        if not is_quantised(module):  # a quantised weight has no gradient
            found.append(MeasuredParameter(("weights", layer, below), weight, 0 if isinstance(module, Conv1D) else 1))
    for name, parameter in model.named_parameters() if own else ():
        above, mark, _ = name.partition(own)
        if mark:
            found.append(MeasuredParameter(("adapter", *layer_and_module(f"{above}.adapter")), parameter))
    return found


class TaskGradients:
    """Sums of the instances' gradients by task and half, as sketches, and of the squares of "weights" by row.

    Until ``hooks`` is closed, each backward pass computes only the measured parameters' gradients and adds them to the
    half-task ``row``. ``instances`` is each task's number of instances, which alternate between its two halves.
    """

    def __init__(self, model: nn.Module, instances: Sequence[int], sketch_size: int, hooks: ExitStack) -> None:
        self._measured = measured_parameters(model)
        self.counts_T2 = torch.tensor([[n - n // 2, n // 2] for n in instances], dtype=torch.float64)
        self.row = 0
        generator = torch.Generator().manual_seed(0)
        model.requires_grad_(False)
        self._sketches, self._squares = [], {}
        for i, (_, p, in_dim) in enumerate(self._measured):
            self._sketches.append(SketchedSums(p.numel(), 2 * len(instances), sketch_size, generator, p.device))
            if in_dim is not None:
                self._squares[i] = torch.zeros(len(instances), p.shape[1 - in_dim], device=p.device)
            hooks.callback(p.requires_grad_(True).register_post_accumulate_grad_hook(partial(self._take, i)).remove)

    @torch.no_grad()
    def _take(self, index: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        self._sketches[index].add(self.row, gradient.flatten())
        if index in self._squares:
            self._squares[index][self.row // 2] += gradient.square().mean(dim=self._measured[index].in_dim)

    def grams(self) -> tuple[list[Place], torch.Tensor]:
        """Returns the places that have a gradient, weights first, and the half-tasks' inner products (P, R, R)."""
        grams: dict[Place, torch.Tensor] = {}
        for item, sketch in zip(self._measured, self._sketches, strict=True):
            grams[item.place] = grams.get(item.place, 0) + sketch.gram()
        places = sorted((place for place in grams if grams[place].any()), key=lambda p: (p[0] != "weights", p[1]))
        if not places:
            raise BaditError("model: no weights with a gradient; load it without quantisation or with an adapter")
        return places, torch.stack([grams[place] for place in places])

    def row_scores(self, task: int) -> ByLayer:
        """Returns, by layer, the mean squared gradient of every row of its weights (U,), over the task's instances."""
        layers: dict[int, list[torch.Tensor]] = {}
        for index, squares_TU in self._squares.items():
            layers.setdefault(self._measured[index].place[1], []).append(squares_TU[task].cpu())
        return {layer: torch.cat(layers[layer]) / self.counts_T2[task].sum().float() for layer in sorted(layers)}


class SketchedSums:
    """Sums of vectors (N = length), each a sketch of at most M = size numbers. If N is at most M, they are exact."""

    def __init__(self, length: int, sums: int, size: int, generator: torch.Generator, device: Any = None) -> None:
        self.sums_RM = torch.zeros(sums, min(length, size), device=device)
        self._exact = length <= size
        if not self._exact:
            runs = -(-length // size)
            # The shifts repeat after M runs, which are 268 million coordinates for M = 16384.
            self._shifts = torch.randperm(size, generator=generator).repeat(-(-runs // size))[:runs].tolist()
            self._run_signs = (2 * torch.randint(2, (runs,), generator=generator) - 1).tolist()
            self._signs_M = (2 * torch.randint(2, (size,), generator=generator) - 1).to(self.sums_RM)

    def add(self, index: int, vector_N: torch.Tensor) -> None:
        """Adds a float32 vector to the sum with this index."""
        if self._exact:
            self.sums_RM[index] += vector_N
            return
        # 2 M buckets, so that a shifted run is contiguous. Then the second half is added to the first.
        size = len(self._signs_M)
        buckets = self._signs_M.new_zeros(2 * size)
        for run, shift, sign in zip(vector_N.split(size), self._shifts, self._run_signs, strict=True):
            buckets[shift : shift + len(run)].addcmul_(run, self._signs_M[: len(run)], value=sign)
        self.sums_RM[index] += buckets[:size] + buckets[size:]

    def gram(self) -> torch.Tensor:
        """Returns estimates (R, R) of the sums' inner products, in float64 on the CPU."""
        sums_RM = self.sums_RM.cpu().double()
        return sums_RM @ sums_RM.T


def agreement(gram_PRR: torch.Tensor, counts_T2: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes how well the tasks' gradients agree, from inner products of the halves' sums; NaN where undefined.

    Returns:
        cosine: (P, T, T), cos(g_a, g_b) of the mean gradients.
        corrected_cosine: (P, T, T), ⟨g_a, g_b⟩ / √(⟨a_1, a_2⟩ ⟨b_1, b_2⟩), with a_1 and a_2 the means over the even and
            the odd instances (Spearman's correction for attenuation). Undefined if ⟨a_1, a_2⟩ or ⟨b_1, b_2⟩ is ≤ 0.
        magnitude_similarity: (P, T, T), 2 |g_a| |g_b| / (|g_a|² + |g_b|²) (Yu et al. 2020, arXiv 2001.06782).
        norm: (P, T), |g|; reliability: (P, T), cos(a_1, a_2).
    """
    counts_R, counts_T = counts_T2.flatten(), counts_T2.sum(dim=1)

    def by_half(values_PRR: torch.Tensor) -> torch.Tensor:
        return values_PRR.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))

    def outer(values_PT: torch.Tensor) -> torch.Tensor:
        return values_PT[:, :, None] * values_PT[:, None, :]

    # All inner products of an empty half are 0, and those of its mean are 0 / 0 = NaN.
    within_P22T = by_half(gram_PRR / counts_R[:, None] / counts_R).diagonal(dim1=-4, dim2=-2)
    means_PTT = by_half(gram_PRR).sum(dim=(-3, -1)) / (counts_T[:, None] * counts_T)
    between_PT = within_P22T[:, 0, 1]
    squared_PT = means_PTT.diagonal(dim1=-2, dim2=-1)
    norms_PTT = outer(squared_PT.sqrt())
    noiseless_PT = torch.where(between_PT > 0, between_PT, torch.nan).sqrt()
    return {
        "cosine": (means_PTT / norms_PTT).clamp(-1, 1),
        "corrected_cosine": (means_PTT / outer(noiseless_PT)).clamp(-1, 1),
        "magnitude_similarity": 2 * norms_PTT / (squared_PT[:, :, None] + squared_PT[:, None, :]),
        "norm": squared_PT.sqrt(),
        "reliability": (between_PT / (within_P22T[:, 0, 0] * within_P22T[:, 1, 1]).sqrt()).clamp(-1, 1),
    }


def gradient_frames(tasks: Sequence[str], gradients: TaskGradients, about: str) -> list[pd.DataFrame]:
    """Returns the tables gradient_pairs, gradient_overall, gradient_summary and gradient_tasks."""
    order = sorted(range(len(tasks)), key=tasks.__getitem__)
    pairs = pd.DataFrame(combinations([tasks[t] for t in order], 2), columns=["task_a", "task_b"])
    first_E, second_E = torch.tensor(order)[torch.triu_indices(len(order), len(order), offset=1)]
    found, gram_PRR = gradients.grams()
    places = pd.DataFrame(found, columns=["parameters", "layer", "module"])
    kinds = pd.DataFrame({"parameters": places["parameters"].unique()})
    # Inner products of whole gradients are sums over the places.
    of_kind = [gram_PRR[(places["parameters"] == kind).tolist()].sum(dim=0) for kind in kinds["parameters"]]
    single = agreement(gram_PRR, gradients.counts_T2)
    whole = agreement(torch.stack(of_kind), gradients.counts_T2)

    def by_pair(rows: pd.DataFrame, values: dict[str, torch.Tensor]) -> pd.DataFrame:
        names = ("cosine", "corrected_cosine", "magnitude_similarity")
        flat = {name: values[name][:, first_E, second_E].flatten().numpy() for name in names}
        return rows.merge(pairs, how="cross").assign(**flat)

    cosine_PE, magnitude_PE = (single[name][:, first_E, second_E] for name in ("cosine", "magnitude_similarity"))
    means = {
        "conflict_rate": (cosine_PE < 0).double().masked_fill(cosine_PE.isnan(), torch.nan),
        "mean_cosine": cosine_PE,
        "mean_magnitude_similarity": magnitude_PE,
        "reliability": single["reliability"],
    }
    summary = places.assign(**{name: values.nanmean(dim=1).numpy() for name, values in means.items()})
    by_task = kinds.merge(pd.DataFrame({"task": tasks}), how="cross").assign(
        **{name: whole[name].flatten().numpy() for name in ("norm", "reliability")},
        instances=gradients.counts_T2.sum(dim=1).repeat(len(kinds)).numpy(),
    )
    rows = {GRADIENT_PAIRS: by_pair(places, single), GRADIENT_OVERALL: by_pair(kinds, whole)}
    rows |= {GRADIENT_SUMMARY: summary, GRADIENT_TASKS: by_task}
    return [table.frame(of_table, about) for table, of_table in rows.items()]
