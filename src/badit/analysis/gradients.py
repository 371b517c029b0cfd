"""Agreement and conflicts between the gradients of tasks.

Gradients are measured for "weights", the weight matrices of the linear layers inside the
transformer layers, frozen or not, and for "adapter", the parameters of a PEFT adapter that the loss
depends on. The backward pass stores them one parameter at a time as count sketches (see
:mod:`badit.method.sketches`).

Noise alone makes half of all cosines negative. Two tasks conflict if their cosine, corrected for
noise, is negative and both gradients are reliable; otherwise the pair is not decided. How sure the
cosine of whole gradients is follows from the spread over the instances (:func:`cosine_errors`).

Shape suffixes: T = tasks, I = instances of all tasks in task order, R = 2T half-tasks in task
order, U = units (rows of a weight), P = places (a kind, layer and module), E = pairs of tasks, M =
numbers of a sketch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.analysis.reliability import RELIABLE, instances_needed, spearman_brown
from badit.analysis.tables import COUNT, SHARED, Column, Table, layer_and_module
from badit.method.sketches import SketchedSums, random_signs
from badit.support.errors import BaditError
from badit.tuner.targets import is_quantised

MOST_PAIRS = 1_000_000  # rows of the table gradient_pairs, about 60 MB

#: "weights" or "adapter", the layer, and the module's name within the layer.
Place = tuple[str, int, str]

GRADIENT_PAIRS = Table("gradient_pairs", "task_a task_b layer module cosine magnitude_similarity")
_SIGNAL = (
    "reliability of the whole gradient, from that of its halves (Spearman–Brown): the share of its "
    "squared norm that is not noise"
)
_NEEDED = f"predicted instances per task for a signal of {RELIABLE}"
GRADIENT_OVERALL = Table(
    "gradient_overall",
    "task_a task_b parameters cosine corrected_cosine magnitude_similarity",
    corrected_cosine="estimated cosine of the gradients without noise, from two halves of the "
    "instances; null if the reliability is not positive",
    low="lower end of the cosine's 95 % interval over instances of the two tasks",
    high="upper end of this interval; null with a single instance",
    signal=f"{_SIGNAL}; the lower one of the two tasks",
    conflict="1 if the corrected cosine is negative, 0 if it is not; null if the signal is below "
    f"{RELIABLE}, so that the pair is not decided",
    instances_needed=f"{_NEEDED} in both tasks; null if a reliability is not positive",
)
GRADIENT_SUMMARY = Table(
    "gradient_summary",
    "layer module parameters",
    conflict_rate="share of the decided pairs of tasks that conflict; null if none is decided",
    decided=f"share of the pairs of tasks that are decided: both signals are at least {RELIABLE}",
    reliability=f"{SHARED['reliability'].meaning}; mean over tasks",
    instances_needed=f"{_NEEDED} in both tasks of half of the pairs; null if it is not known",
)
GRADIENT_TASKS = Table(
    "gradient_tasks",
    "task parameters norm reliability",
    norm="norm of the task's gradient, in nats per token and unit of the parameters",
    signal=_SIGNAL,
    instances=Column("number of instances that the gradient is averaged over", COUNT),
    instances_needed=f"{_NEEDED}; null if the reliability is not positive",
)


def measured_parameters(model: nn.Module) -> Iterator[tuple[Place, nn.Parameter, int | None]]:
    """Yields the weights of the linear layers, then the adapter's parameters, in model order.

    With each, its place and the dimension of a weight's input features (None for an adapter's
    parameters).
    """
    # PEFT starts the names of an adapter's modules and parameters with a prefix such as lora_.
    prefix = f".{model.base_model.prefix}" if isinstance(model, PeftModel) else ""
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if layer < 0 or not isinstance(module, nn.Linear | Conv1D):
            continue
        # A quantised weight has no gradient.
        if (prefix and prefix in name) or is_quantised(module):
            continue
        weight: Any = module.weight
        # Conv1D stores its weight as (in, out).
        in_dim = 0 if isinstance(module, Conv1D) else 1
        yield ("weights", layer, below), weight, in_dim
    if not prefix:
        return
    for name, parameter in model.named_parameters():
        module_name, mark, _ = name.partition(prefix)
        # A module's adapter has its own name, because its weight has rows in the same tables.
        if mark:
            yield ("adapter", *layer_and_module(f"{module_name}.adapter")), parameter, None


class TaskGradients:
    """Sums of the instances' gradients by task and half, and of the squares of "weights" by row.

    Until ``hooks`` is closed, each backward pass computes only the measured parameters' gradients
    and adds them to the half-task ``row``. ``instances`` is each task's number of instances, which
    alternate between its two halves.
    """

    def __init__(
        self, model: nn.Module, instances: Sequence[int], sketch_size: int, hooks: ExitStack
    ) -> None:
        # Instances alternate between the halves and start with the first, which may be larger.
        halves = [[count - count // 2, count // 2] for count in instances]
        self.counts_T2 = torch.tensor(halves, dtype=torch.float64)
        self.row = 0
        # For the spread over instances: by kind, the sketch of every instance's whole gradient.
        self.whole_IM: dict[str, torch.Tensor] = {}
        self._instance = -1
        self._sketch_size = sketch_size
        self._next_bucket: dict[str, int] = {}
        self.sketches: dict[Place, list[SketchedSums]] = {}
        self._squares: dict[int, list[torch.Tensor]] = {}  # by layer, (T, U) of each weight
        # A fixed seed, so that a repeated analysis has the same tables.
        generator = torch.Generator().manual_seed(0)
        signs = torch.Generator().manual_seed(1)
        # The backward pass then computes no gradients that are not measured.
        model.requires_grad_(False)
        for place, parameter, in_dim in measured_parameters(model):
            sketch = SketchedSums(
                parameter.numel(), 2 * len(instances), sketch_size, generator, parameter.device
            )
            self.sketches.setdefault(place, []).append(sketch)
            squares_TU = None
            # Only rows of weights are units of co-activation.
            if in_dim is not None:
                rows = parameter.shape[1 - in_dim]
                squares_TU = torch.zeros(len(instances), rows, device=parameter.device)
                self._squares.setdefault(place[1], []).append(squares_TU)
            add_to_whole = self._sketch_of_whole(place[0], sketch, sum(instances), signs)
            take = partial(self._take, sketch, squares_TU, in_dim, add_to_whole)
            parameter.requires_grad_(True)
            hooks.callback(parameter.register_post_accumulate_grad_hook(take).remove)

    def begin(self, task: int, index: int) -> None:
        """Begins the next instance, number ``index`` of a task."""
        # The instances of a task alternate between its two halves.
        self.row = 2 * task + index % 2
        self._instance += 1

    def _sketch_of_whole(
        self, kind: str, sketch: SketchedSums, instances: int, generator: torch.Generator
    ) -> Callable[[torch.Tensor], None]:
        """Returns the function that adds a parameter's sketch to that of its instance."""
        size = sketch.sums_RM.shape[1]
        if kind not in self.whole_IM:
            self.whole_IM[kind] = sketch.sums_RM.new_zeros(instances, self._sketch_size)
            self._next_bucket[kind] = 0
        # The parameters follow one another, so those that fit together share no buckets.
        first = self._next_bucket[kind]
        self._next_bucket[kind] = first + size
        buckets_M = (first + torch.arange(size)) % self._sketch_size
        buckets_M = buckets_M.to(self.whole_IM[kind].device)
        # Random signs, for those that share buckets.
        signs_M = random_signs(size, generator).to(sketch.sums_RM)

        def add(sketch_M: torch.Tensor) -> None:
            of_instance_M = self.whole_IM[kind][self._instance]
            # The layers of a large model may be on several devices.
            of_instance_M.index_add_(0, buckets_M, (signs_M * sketch_M).to(of_instance_M.device))

        return add

    @torch.no_grad()
    def _take(
        self,
        sketch: SketchedSums,
        squares_TU: Any,
        in_dim: int | None,
        add_to_whole: Callable[[torch.Tensor], None],
        parameter: torch.Tensor,
    ) -> None:
        """Adds a parameter's gradient and frees it, before the next one is computed."""
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        add_to_whole(sketch.add(self.row, gradient.flatten()))
        if in_dim is not None:
            squares_TU[self.row // 2] += gradient.square().mean(dim=in_dim)

    def grams(self) -> tuple[list[Place], torch.Tensor]:
        """Returns the places that have a gradient, and the half-tasks' inner products (P, R, R).

        The weights come first.
        """
        # Inner products of several parameters together are the sum of theirs.
        grams: dict[Place, Any] = {
            place: sum(sketch.gram() for sketch in sketches)
            for place, sketches in self.sketches.items()
        }
        # The loss does not depend on the other places.
        places = [place for place, gram_RR in grams.items() if gram_RR.any()]
        places.sort(key=lambda place: (place[0] != "weights", place[1]))
        if not places:
            fix = "load it without quantisation or with an adapter"
            raise BaditError(f"model: no weights with a gradient; {fix}")
        gram_PRR = torch.stack([grams[place] for place in places])
        if not gram_PRR.isfinite().all():
            raise BaditError("model.dtype: the gradients are not finite; use bfloat16 or float32")
        return places, gram_PRR

    def row_scores(self) -> dict[int, torch.Tensor]:
        """Returns the mean squared gradient of each row of a layer's weights, by layer (T, U).

        The mean is over the row and over the task's instances.
        """
        counts_T1 = self.counts_T2.sum(dim=1, keepdim=True).float()
        return {
            layer: torch.cat(squares, dim=1).cpu() / counts_T1
            for layer, squares in sorted(self._squares.items())
        }


def agreement(
    gram_PRR: torch.Tensor, counts_T2: torch.Tensor, pairs_2E: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns how well the gradients of pairs of tasks agree (P, E), and the tasks' values (P, T).

    The tasks' values are norms, reliabilities and what follows from these. All are computed from
    inner products of the halves' sums; NaN where undefined. If a_1 and a_2 are the means of a
    task's gradients over its even and its odd instances, the reliability is cos(a_1, a_2) and the
    corrected cosine is ⟨a, b⟩ / √(⟨a_1, a_2⟩ ⟨b_1, b_2⟩) (Spearman's correction for attenuation).
    Yu et al. 2020, arXiv 2001.06782, define the magnitude similarity.
    """
    a_E, b_E = pairs_2E
    counts_T = counts_T2.sum(dim=1)
    # The half-tasks R = 2T as task and half.
    gram_PT2T2 = gram_PRR.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    # All inner products of an empty half are 0, and those of its mean are 0 / 0 = NaN.
    means_PT2T2 = gram_PT2T2 / counts_T2[:, :, None, None] / counts_T2
    # ⟨a_i, a_j⟩ of the halves of each task; diagonal moves T to the end.
    within_P22T = means_PT2T2.diagonal(dim1=1, dim2=3)
    between_PT = within_P22T[:, 0, 1]
    # ⟨a, b⟩ of the means over both halves.
    means_PTT = gram_PT2T2.sum(dim=(2, 4)) / (counts_T[:, None] * counts_T)
    means_PE = means_PTT[:, a_E, b_E]

    squared_PT = means_PTT.diagonal(dim1=-2, dim2=-1)
    norm_PT = squared_PT.sqrt()
    norms_PE = norm_PT[:, a_E] * norm_PT[:, b_E]
    # √⟨a_1, a_2⟩ is the norm without noise, because the noise of the halves is independent.
    noiseless_PT = torch.where(between_PT > 0, between_PT, torch.nan).sqrt()
    noiseless_PE = noiseless_PT[:, a_E] * noiseless_PT[:, b_E]
    reliability_PT = between_PT / (within_P22T[:, 0, 0] * within_P22T[:, 1, 1]).sqrt()
    # Clamped, because inner products are estimates and may exceed the product of the norms.
    reliability_PT = reliability_PT.clamp(-1, 1)
    signal_PT = spearman_brown(reliability_PT, 2)
    needed_PT = instances_needed(signal_PT, counts_T)
    corrected_PE = (means_PE / noiseless_PE).clamp(-1, 1)
    signal_PE = torch.minimum(signal_PT[:, a_E], signal_PT[:, b_E])
    of_pairs = {
        "cosine": (means_PE / norms_PE).clamp(-1, 1),
        "corrected_cosine": corrected_PE,
        "magnitude_similarity": 2 * norms_PE / (squared_PT[:, a_E] + squared_PT[:, b_E]),
        "signal": signal_PE,
        "conflict": torch.where(signal_PE >= RELIABLE, (corrected_PE < 0).double(), torch.nan),
        "instances_needed": torch.maximum(needed_PT[:, a_E], needed_PT[:, b_E]),
    }
    of_tasks = {
        "norm": norm_PT,
        "reliability": reliability_PT,
        "signal": signal_PT,
        "instances_needed": needed_PT,
    }
    return of_pairs, of_tasks


def cosine_errors(
    whole_IM: torch.Tensor, counts_T: Sequence[int], pairs_2E: torch.Tensor
) -> torch.Tensor:
    """Returns the standard errors (E) of the cosines of pairs of tasks over their instances.

    The mean product of two tasks is a mean over the instances of both. With ā and b̄ the means of
    the instances' gradients a_i and b_j,

        SE² = (Var_i ⟨a_i, b̄⟩ / n_a + Var_j ⟨ā, b_j⟩ / n_b) / (‖ā‖² ‖b̄‖²).

    It counts the noise that both share twice, so it is rather too large. NaN with one instance.
    """
    of_tasks = whole_IM.double().split(list(counts_T))
    means_TM = torch.stack([of_task.mean(dim=0) for of_task in of_tasks])
    # Var_i ⟨a_i, b̄⟩ / n_a of each task a (row) and b (column).
    variances_TT = torch.stack(
        [
            (of_task @ means_TM.T).var(dim=0) / len(of_task)
            if len(of_task) > 1
            else torch.full((len(counts_T),), torch.nan, dtype=torch.float64)
            for of_task in of_tasks
        ]
    )
    a_E, b_E = pairs_2E
    norm_T = means_TM.norm(dim=1)
    return (variances_TT[a_E, b_E] + variances_TT[b_E, a_E]).sqrt() / (norm_T[a_E] * norm_T[b_E])


def cosine_intervals(
    cosine_E: torch.Tensor, error_E: torch.Tensor, counts_T: Sequence[int], pairs_2E: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the 95 % t intervals, with the degrees of freedom of the smaller task."""
    from scipy.stats import t

    counts = torch.as_tensor(counts_T)
    freedom_E = torch.minimum(counts[pairs_2E[0]], counts[pairs_2E[1]]) - 1
    reach_E = error_E * torch.as_tensor(t.ppf(0.975, freedom_E.clamp_min(1).numpy()))
    return {"low": cosine_E - reach_E, "high": cosine_E + reach_E}


def gradient_frames(
    tasks: Sequence[str], gradients: TaskGradients, description: str
) -> list[pd.DataFrame]:
    """Returns gradient_overall, gradient_summary, gradient_tasks and gradient_pairs.

    gradient_pairs is left out above ``MOST_PAIRS`` rows.
    """
    order = sorted(range(len(tasks)), key=tasks.__getitem__)
    pairs_2E = torch.tensor(order)[torch.triu_indices(len(order), len(order), offset=1)]
    counts_T2 = gradients.counts_T2
    names, gram_PRR = gradients.grams()
    places = pd.DataFrame(names, columns=["parameters", "layer", "module"])
    kinds = pd.DataFrame({"parameters": places["parameters"].unique()})
    pairs = pd.DataFrame(np.array(tasks)[pairs_2E.T.numpy()], columns=["task_a", "task_b"])
    single = pd.DataFrame({"task": tasks, "instances": counts_T2.sum(dim=1).numpy()})

    # Inner products of whole gradients are sums over the places.
    gram_by_kind = [
        gram_PRR[(places["parameters"] == kind).tolist()].sum(dim=0) for kind in kinds["parameters"]
    ]
    pairs_by_kind, tasks_by_kind = agreement(torch.stack(gram_by_kind), counts_T2, pairs_2E)
    counts_T = counts_T2.sum(dim=1).long().tolist()
    errors_KE = torch.stack(
        [
            cosine_errors(gradients.whole_IM[kind].cpu(), counts_T, pairs_2E)
            for kind in kinds["parameters"]
        ]
    )
    pairs_by_kind |= cosine_intervals(pairs_by_kind["cosine"], errors_KE, counts_T, pairs_2E)
    pairs_by_place, tasks_by_place = agreement(gram_PRR, counts_T2, pairs_2E)
    conflict_PE = pairs_by_place["conflict"]
    frames = {
        GRADIENT_OVERALL: _crossed(kinds, pairs, pairs_by_kind),
        GRADIENT_SUMMARY: places.assign(
            conflict_rate=conflict_PE.nanmean(dim=1).numpy(),
            decided=(~conflict_PE.isnan()).double().mean(dim=1).numpy(),
            instances_needed=_of_half(pairs_by_place["instances_needed"]).numpy(),
            reliability=tasks_by_place["reliability"].nanmean(dim=1).numpy(),
        ),
        GRADIENT_TASKS: _crossed(kinds, single, tasks_by_kind),
    }
    rows = len(places) * len(pairs)
    if rows <= MOST_PAIRS:
        frames[GRADIENT_PAIRS] = _crossed(places, pairs, pairs_by_place)
    else:
        description += (
            " The table of every pair of tasks in every module is left out, because it has "
            f"{rows:,} rows."
        )
    return [table.frame(frame, description) for table, frame in frames.items()]


def _of_half(needed_PE: torch.Tensor) -> torch.Tensor:
    """Returns the number of instances that suffices for half of the pairs; infinite if unknown."""
    if not needed_PE.shape[1]:
        return torch.full((len(needed_PE),), torch.inf)
    # A pair whose number is not known needs more than any number.
    return needed_PE.nan_to_num(nan=torch.inf).median(dim=1).values


def _crossed(
    rows: pd.DataFrame, columns: pd.DataFrame, values: Mapping[str, torch.Tensor]
) -> pd.DataFrame:
    """Returns one row per entry of the values, which have the shape (rows, columns)."""
    flat = {name: matrix.flatten().numpy() for name, matrix in values.items()}
    return rows.merge(columns, how="cross").assign(**flat)
