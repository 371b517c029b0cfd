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
that mark each unit are counted. Assumptions: the blocks of parameters over which the paper averages squared gradients
are rows of weight matrices; "top 10 %" applies to each layer. An MLP without a gate projection has the neurons of its
first projection.

Shape suffixes: N = coordinates, M = buckets (of gates: adapted modules), T = tasks, R = 2T half-tasks in task order,
U = units of a layer or rows of a weight, K = experts, P = places (a kind, layer and module), E = pairs of tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from badit.analysis.gates import PromptGates, span
from badit.analysis.tables import COUNT, INDEX, SHARED, Column, Table, layer_and_module
from badit.baselines.neurons import top_neurons
from badit.support.errors import BaditError
from badit.training.trainer import answer_losses
from badit.tuner.model import TaskBatches
from badit.tuner.targets import PROJECTIONS, default_targets, is_quantised

SKETCH_SIZE = (
    16384  # of each parameter's gradient; a cosine has a standard error of at most 1 / √SKETCH_SIZE
)
SHARE = 0.1  # of a layer's units: a task marks the strongest
MOST_PAIRS = 1_000_000  # rows of the table gradient_pairs, about 60 MB

Marks = Mapping[int, np.ndarray]  # by layer, which tasks mark its units, (T, U)
Place = tuple[
    str, int, str
]  # "weights" or "adapter", the layer, the module's name within the layer

GRADIENT_PAIRS = Table("gradient_pairs", "task_a task_b layer module cosine magnitude_similarity")
GRADIENT_OVERALL = Table(
    "gradient_overall",
    "task_a task_b parameters cosine corrected_cosine magnitude_similarity",
    corrected_cosine="estimated cosine of the gradients without noise, from two halves of the instances; null if the "
    "reliability is not positive",
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
    "task parameters norm reliability",
    norm="norm of the task's gradient, in nats per token and unit of the parameters",
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
    model: nn.Module,
    batches: TaskBatches,
    gates: PromptGates | None = None,
    *,
    progress: bool = False,
) -> list[pd.DataFrame]:
    """Returns the gradient tables and the co-activation tables of "neurons", "parameters" and, with gates, "experts".

    ``model`` is a causal language model in evaluation mode, optionally with a PEFT adapter; the ``requires_grad`` of
    its parameters is changed. ``batches`` has each task's instances, each a batch of one row. ``gates`` are those of
    the same tasks.
    """
    tasks, sizes = list(batches), [len(of_task) for of_task in batches.values()]
    parameter = next(model.parameters())
    outputs_TU: dict[int, torch.Tensor] = {}  # by layer: sums over all positions
    positions_T = torch.zeros(len(tasks), dtype=torch.long)

    def add(layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        sum_U = output.detach().flatten(0, -2).sum(dim=0, dtype=torch.float32)
        outputs_TU.setdefault(layer, sum_U.new_zeros(len(tasks), len(sum_U)))[
            gradients.row // 2
        ] += sum_U

    with ExitStack() as hooks, torch.enable_grad():
        gradients = TaskGradients(model, sizes, SKETCH_SIZE, hooks)
        bar = hooks.enter_context(tqdm(total=sum(sizes), desc="Gradients", disable=not progress))
        for layer, projection in enumerate(_first_projections(model)):
            hooks.callback(projection.register_forward_hook(partial(add, layer)).remove)
        for number, (task, of_task) in enumerate(batches.items()):
            for index, instance in enumerate(of_task):
                gradients.row = 2 * number + index % 2
                losses_L, _, _ = answer_losses(model, send_to_device(instance, parameter.device))
                if not torch.isfinite(losses_L.mean()):
                    reason = (
                        "the dtype may overflow: use float32"
                        if len(losses_L)
                        else "no answer tokens: remove it"
                    )
                    raise BaditError(
                        f"task {task}, instance {index}: the loss is not finite; {reason}"
                    )
                losses_L.mean().backward()
                positions_T[number] += instance["input_ids"].numel()
                bar.update()
    neurons = {
        layer: outputs_TU[layer].cpu() / positions_T[:, None] for layer in sorted(outputs_TU)
    }
    marked = {"neurons": _strongest(neurons), "parameters": _strongest(gradients.row_scores())}
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
    return [
        *gradient_frames(tasks, gradients, about_gradients),
        *coactivation(tasks, marked, about_units),
    ]


def _first_projections(model: nn.Module) -> list[nn.Module]:
    """Returns the MLPs' first projections by layer, or their adapter layers, whose outputs include the adapter."""
    names = default_targets(model) or set()
    found = []
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if (
            layer >= 0
            and names & {name, below.rpartition(".")[2]}
            and not name.endswith(".base_layer")
        ):
            found.append((layer, module))
    config: Any = model.config
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not found or [layer for layer, _ in found] != list(range(layers)):
        problem = f"co-activation cannot be measured for type {config.model_type}"
        needed = f"every layer needs one MLP with a projection named {' or '.join(PROJECTIONS)}"
        raise BaditError(f"model: {problem}: {needed}")
    return [module for _, module in found]


def _strongest(scores: Mapping[int, torch.Tensor]) -> Marks:
    def marks(scores_TU: torch.Tensor) -> np.ndarray:
        return torch.stack(
            [top_neurons({"units": scores_U}, SHARE)["units"] for scores_U in scores_TU]
        ).numpy()

    return {layer: marks(scores_TU) for layer, scores_TU in scores.items()}


def marked_experts(gates: PromptGates) -> Marks:
    """Marks the experts of a layer's modules whose mean gate over a task's prompts is above 1."""
    layers_M = np.array([layer for layer, _ in gates.modules])
    marked_TMK = gates.means > 1 + 1e-6  # more than by rounding
    by_layer = {layer: marked_TMK[:, layers_M == layer] for layer in np.unique(layers_M).tolist()}
    return {layer: of_layer.reshape(len(of_layer), -1) for layer, of_layer in by_layer.items()}


def coactivation(
    tasks: Sequence[str], marked: Mapping[str, Marks], about: str
) -> list[pd.DataFrame]:
    """Returns the tables coactivation, coactivation_tasks and coactivation_pairs, from the marks by kind of unit."""
    counts, by_task, pairs = [], [], []
    order = sorted(range(len(tasks)), key=tasks.__getitem__)
    for kind, layers in marked.items():
        if not layers:
            continue
        # Marked units, and units that two tasks mark, observed and by chance.
        total_T, both_2TT = np.zeros(len(tasks)), np.zeros((2, len(tasks), len(tasks)))
        for layer, marked_TU in layers.items():
            tasks_U, sizes_T, units = (
                marked_TU.sum(axis=0),
                marked_TU.sum(axis=1),
                marked_TU.shape[1],
            )
            shares = np.bincount(tasks_U, minlength=len(tasks) + 1) / units
            chances = np.ones(1)  # probabilities of 0, 1, …, T marks
            for size in sizes_T:
                chances = np.convolve(chances, [1 - size / units, size / units])
            counts += [
                (kind, layer, k, *row) for k, row in enumerate(zip(shares, chances, strict=True))
            ]
            exclusive_T, universal = (
                (marked_TU & (tasks_U == 1)).sum(axis=1),
                (tasks_U == len(tasks)).sum(),
            )
            of_tasks = zip(tasks, sizes_T, exclusive_T, strict=True)
            by_task += [
                (kind, task, layer, size, exclusive, universal)
                for task, size, exclusive in of_tasks
            ]
            total_T += sizes_T
            both_2TT += np.stack(
                [marked_TU.astype(float) @ marked_TU.T, np.outer(sizes_T, sizes_T) / units]
            )
        with np.errstate(invalid="ignore"):  # NaN where neither task marks a unit
            overlap_TT, chance_TT = both_2TT / (total_T[:, None] + total_T - both_2TT)
        pairs += [
            (kind, tasks[a], tasks[b], overlap_TT[a, b], chance_TT[a, b])
            for a, b in combinations(order, 2)
        ]
    rows = {COACTIVATION: counts, COACTIVATION_TASKS: by_task, COACTIVATION_PAIRS: pairs}
    return [table.frame(of_table, about) for table, of_table in rows.items()]


def measured_parameters(model: nn.Module) -> Iterator[tuple[Place, nn.Parameter, int | None]]:
    """Yields the weights of the linear layers, then the adapter's parameters, each in model order.

    With each, its place and the dimension of a weight's input features (None for an adapter's parameters).
    """
    # PEFT starts the names of an adapter's modules and parameters with a prefix such as lora_.
    own = f".{model.base_model.prefix}" if isinstance(model, PeftModel) else ""
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        of_adapter = own != "" and own in name
        # A quantised weight has no gradient.
        if (
            layer >= 0
            and isinstance(module, (nn.Linear, Conv1D))
            and not (of_adapter or is_quantised(module))
        ):
            weight: Any = module.weight
            yield ("weights", layer, below), weight, 0 if isinstance(module, Conv1D) else 1
    for name, parameter in model.named_parameters() if own else ():
        above, mark, _ = name.partition(own)
        if mark:
            yield ("adapter", *layer_and_module(f"{above}.adapter")), parameter, None


class TaskGradients:
    """Sums of the instances' gradients by task and half, as sketches, and of the squares of "weights" by row.

    Until ``hooks`` is closed, each backward pass computes only the measured parameters' gradients and adds them to the
    half-task ``row``. ``instances`` is each task's number of instances, which alternate between its two halves.
    """

    def __init__(
        self, model: nn.Module, instances: Sequence[int], sketch_size: int, hooks: ExitStack
    ) -> None:
        self.counts_T2 = torch.tensor(
            [[n - n // 2, n // 2] for n in instances], dtype=torch.float64
        )
        self.row = 0
        self.sketches: dict[Place, list[SketchedSums]] = {}
        self._squares: dict[int, list[torch.Tensor]] = {}  # by layer, (T, U) of each weight
        generator = torch.Generator().manual_seed(0)
        model.requires_grad_(False)
        for place, p, in_dim in measured_parameters(model):
            sketch, squares_TU = (
                SketchedSums(p.numel(), 2 * len(instances), sketch_size, generator, p.device),
                None,
            )
            self.sketches.setdefault(place, []).append(sketch)
            if in_dim is not None:
                squares_TU = torch.zeros(len(instances), p.shape[1 - in_dim], device=p.device)
                self._squares.setdefault(place[1], []).append(squares_TU)
            take = partial(self._take, sketch, squares_TU, in_dim)
            hooks.callback(p.requires_grad_(True).register_post_accumulate_grad_hook(take).remove)

    @torch.no_grad()
    def _take(
        self, sketch: "SketchedSums", squares_TU: Any, in_dim: int | None, parameter: torch.Tensor
    ) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        sketch.add(self.row, gradient.flatten())
        if squares_TU is not None:
            squares_TU[self.row // 2] += gradient.square().mean(dim=in_dim)

    def grams(self) -> tuple[list[Place], torch.Tensor]:
        """Returns the places that have a gradient, weights first, and the half-tasks' inner products (P, R, R)."""
        grams: dict[Place, Any] = {
            place: sum(each.gram() for each in self.sketches[place]) for place in self.sketches
        }
        places = sorted(
            (place for place in grams if grams[place].any()),
            key=lambda p: (p[0] != "weights", p[1]),
        )
        if not places:
            raise BaditError(
                "model: no weights with a gradient; load it without quantisation or with an adapter"
            )
        gram_PRR = torch.stack([grams[place] for place in places])
        if not gram_PRR.isfinite().all():
            raise BaditError("model.dtype: the gradients are not finite; use bfloat16 or float32")
        return places, gram_PRR

    def row_scores(self) -> dict[int, torch.Tensor]:
        """Returns, by layer, the mean squared gradient of each row of its weights over each task's instances (T, U)."""
        counts_T1 = self.counts_T2.sum(dim=1, keepdim=True).float()
        return {
            layer: torch.cat(self._squares[layer], dim=1).cpu() / counts_T1
            for layer in sorted(self._squares)
        }


class SketchedSums:
    """Sums of vectors (N = length), each a sketch of at most M = size numbers. If N is at most M, they are exact."""

    def __init__(
        self, length: int, sums: int, size: int, generator: torch.Generator, device: Any = None
    ) -> None:
        self.sums_RM = torch.zeros(sums, min(length, size), device=device)
        self._shifts, self._run_signs, self._signs_M = (
            [0],
            [1],
            torch.ones_like(self.sums_RM[0]),
        )  # exact
        if length > size:
            runs = -(-length // size)
            # The shifts repeat after M runs, which are 268 million coordinates for M = 16384.
            self._shifts = (
                torch.randperm(size, generator=generator).repeat(-(-runs // size))[:runs].tolist()
            )
            self._run_signs = (2 * torch.randint(2, (runs,), generator=generator) - 1).tolist()
            self._signs_M = (2 * torch.randint(2, (size,), generator=generator) - 1).to(
                self.sums_RM
            )

    def add(self, index: int, vector_N: torch.Tensor) -> None:
        """Adds a float32 vector to the sum with this index."""
        # 2 M buckets, so that a shifted run is contiguous. Then the second half is added to the first.
        size = len(self._signs_M)
        buckets = self._signs_M.new_zeros(2 * size)
        for run, shift, sign in zip(
            vector_N.split(size), self._shifts, self._run_signs, strict=True
        ):
            buckets[shift : shift + len(run)].addcmul_(run, self._signs_M[: len(run)], value=sign)
        self.sums_RM[index] += buckets[:size] + buckets[size:]

    def gram(self) -> torch.Tensor:
        """Returns estimates (R, R) of the sums' inner products, in float64 on the CPU."""
        sums_RM = self.sums_RM.cpu().double()
        return sums_RM @ sums_RM.T


def agreement(
    gram_PRR: torch.Tensor, counts_T2: torch.Tensor, pairs_2E: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns how well the gradients of pairs of tasks agree (P, E), and the tasks' norms and reliabilities (P, T).

    They are computed from inner products of the halves' sums; NaN where undefined. If a_1 and a_2 are the means of a
    task's gradients over its even and its odd instances, the reliability is cos(a_1, a_2) and the corrected cosine is
    ⟨a, b⟩ / √(⟨a_1, a_2⟩ ⟨b_1, b_2⟩) (Spearman's correction for attenuation). Yu et al. 2020, arXiv 2001.06782, define
    the magnitude similarity.
    """
    counts_T, (a_E, b_E) = counts_T2.sum(dim=1), pairs_2E
    gram_PT2T2 = gram_PRR.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    # All inner products of an empty half are 0, and those of its mean are 0 / 0 = NaN.
    within_P22T = (gram_PT2T2 / counts_T2[:, :, None, None] / counts_T2).diagonal(dim1=1, dim2=3)
    between_PT = within_P22T[:, 0, 1]
    means_PTT = gram_PT2T2.sum(dim=(2, 4)) / (counts_T[:, None] * counts_T)
    means_PE = means_PTT[:, a_E, b_E]
    squared_PT = means_PTT.diagonal(dim1=-2, dim2=-1)
    norm_PT = squared_PT.sqrt()
    norms_PE = norm_PT[:, a_E] * norm_PT[:, b_E]
    noiseless_PT = torch.where(between_PT > 0, between_PT, torch.nan).sqrt()
    of_pairs = {
        "cosine": (means_PE / norms_PE).clamp(-1, 1),
        "corrected_cosine": (means_PE / (noiseless_PT[:, a_E] * noiseless_PT[:, b_E])).clamp(-1, 1),
        "magnitude_similarity": 2 * norms_PE / (squared_PT[:, a_E] + squared_PT[:, b_E]),
    }
    reliability_PT = between_PT / (within_P22T[:, 0, 0] * within_P22T[:, 1, 1]).sqrt()
    return of_pairs, {"norm": norm_PT, "reliability": reliability_PT.clamp(-1, 1)}


def gradient_frames(
    tasks: Sequence[str], gradients: TaskGradients, about: str
) -> list[pd.DataFrame]:
    """Returns gradient_overall, gradient_summary, gradient_tasks, and gradient_pairs up to ``MOST_PAIRS`` rows."""
    order = sorted(range(len(tasks)), key=tasks.__getitem__)
    pairs_2E = torch.tensor(order)[torch.triu_indices(len(order), len(order), offset=1)]
    pairs = pd.DataFrame(np.array(tasks)[pairs_2E.T.numpy()], columns=["task_a", "task_b"])
    single = pd.DataFrame({"task": tasks, "instances": gradients.counts_T2.sum(dim=1).numpy()})
    found, gram_PRR = gradients.grams()
    places = pd.DataFrame(found, columns=["parameters", "layer", "module"])
    kinds = pd.DataFrame({"parameters": places["parameters"].unique()})
    # Inner products of whole gradients are sums over the places.
    of_kind = [
        gram_PRR[(places["parameters"] == kind).tolist()].sum(dim=0) for kind in kinds["parameters"]
    ]
    pairs_by_place, tasks_by_place = agreement(gram_PRR, gradients.counts_T2, pairs_2E)
    pairs_by_kind, tasks_by_kind = agreement(torch.stack(of_kind), gradients.counts_T2, pairs_2E)

    def crossed(
        rows: pd.DataFrame, columns: pd.DataFrame, values: Mapping[str, torch.Tensor]
    ) -> pd.DataFrame:
        flat = {name: each.flatten().numpy() for name, each in values.items()}
        return rows.merge(columns, how="cross").assign(**flat)

    cosine_PE = pairs_by_place["cosine"]
    means = {
        "conflict_rate": (cosine_PE < 0).double().masked_fill(cosine_PE.isnan(), torch.nan),
        "mean_cosine": cosine_PE,
        "mean_magnitude_similarity": pairs_by_place["magnitude_similarity"],
        "reliability": tasks_by_place["reliability"],
    }
    frames = {
        GRADIENT_OVERALL: crossed(kinds, pairs, pairs_by_kind),
        GRADIENT_SUMMARY: places.assign(
            **{name: each.nanmean(dim=1).numpy() for name, each in means.items()}
        ),
        GRADIENT_TASKS: crossed(kinds, single, tasks_by_kind),
    }
    if (rows := len(places) * len(pairs)) <= MOST_PAIRS:
        frames[GRADIENT_PAIRS] = crossed(places, pairs, pairs_by_place)
    else:
        about += f" The table of every pair of tasks in every module is left out, because it has {rows:,} rows."
    return [table.frame(frame, about) for table, frame in frames.items()]
