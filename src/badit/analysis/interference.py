"""How tasks get in one another's way in a model: conflicts between their gradients, and the units that they share.

One pass over the data measures both: a forward pass of each instance gives its neurons' outputs, the backward pass its
gradients. See :mod:`badit.analysis.gradients` and :mod:`badit.analysis.coactivation` for what they are.

The measures are those of the interference literature (gradient conflict and magnitude similarity: Yu et al. 2020, arXiv
2001.06782) and of the paper's Figures 1 and 2 (co-activation, arXiv 2605.05676). Assumption, where the paper averages
squared gradients over blocks of parameters: a block is a row of a weight matrix, what one output feature reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from badit.analysis.coactivation import NeuronMeans, coactivation_tables, strongest, tidy
from badit.analysis.gradients import Agreement, Place, TaskGradients
from badit.analysis.tables import TidyTable, Value, defined
from badit.errors import BaditError
from badit.trainer import answer_losses
from badit.tuner.base_config import is_int, is_number

Batches = Mapping[str, Sequence[Mapping[str, Any]]]

_TASK_A, _TASK_B = "a task", "another task, later in the alphabet"
_LAYER = "transformer layer, from 0; −1 for what belongs to none"
_MODULE = 'name below the layer, such as mlp.gate_proj; with ".adapter" for the adapter on it'
_PARAMETERS = '"weights" (of the linear layers) or "adapter"'
_COSINE = "cosine of the two tasks' gradients"
_MAGNITUDE = "2|a||b| / (|a|² + |b|²) of the two gradients: 1 for equal norms"
_RELIABILITY = "cosine between gradients on two halves of a task's instances: how little of them is noise"


def measure_interference(
    model: nn.Module,
    batches: Batches,
    *,
    sketch_size: int = 16384,
    share: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> list[TidyTable]:
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
        BaditError: a task without instances, an instance without a finite loss, an option out of range, or a model
            whose layers have no MLP of a known kind.
    """
    if not is_int(sketch_size) or sketch_size < 1:
        raise BaditError(f"sketch_size must be a whole number of at least 1, got {sketch_size!r}")
    if not is_number(share) or not 0 < share <= 1:
        raise BaditError(f"share must be above 0 and at most 1, got {share!r}")
    sizes = {task: sum(len(batch["input_ids"]) for batch in of_task) for task, of_task in batches.items()}
    if not sizes or not all(sizes.values()):
        empty = next((task for task, size in sizes.items() if not size), None)
        raise BaditError("batches: there are none" if empty is None else f"batches: task {empty} has no instances")
    gradients = TaskGradients(model, len(batches), sketch_size, seed)
    neurons = NeuronMeans(model, len(batches))
    with gradients.taking(), tqdm(total=sum(sizes.values()), desc="Gradients", disable=not progress) as bar:
        for number, (task, of_task) in enumerate(batches.items()):
            with neurons.counting(number):
                for index, instance in enumerate(_instances(of_task, next(model.parameters()).device)):
                    gradients.begin_instance(number)
                    _backward(model, instance, f"task {task}, instance {index}")
                    bar.update()
    names = list(batches)
    about = _about(model, sizes, sketch_size)
    marks = {"neurons": neurons.of_task, "parameters": gradients.row_scores}
    counted = [
        coactivation_tables(kind, {name: strongest(scores(i), share) for i, name in enumerate(names)})
        for kind, scores in marks.items()
    ]
    return [*_gradient_tables(names, gradients, about), *tidy(counted, _about_coactivation(sizes, share))]


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


def _gradient_tables(names: Sequence[str], gradients: TaskGradients, about: str) -> list[TidyTable]:
    order = sorted(range(len(names)), key=names.__getitem__)
    pair_names = list(combinations([names[i] for i in order], 2))
    grams = gradients.grams()
    counts_T2 = gradients.counts_T2
    pairs: list[list[Value]] = []
    summary: list[list[Value]] = []
    for (parameters, layer, module), gram_RR in sorted(grams.items(), key=_by_kind_and_layer):
        agreement = Agreement(gram_RR, counts_T2)
        cosines, magnitudes = (agreement.pairs(v, order) for v in (agreement.cosine_TT, agreement.magnitude_TT))
        for (a, b), *values in zip(pair_names, cosines.tolist(), magnitudes.tolist(), strict=True):
            pairs.append([a, b, layer, module, *map(defined, values)])
        known = cosines[~cosines.isnan()]
        rates = [(known < 0).double().mean(), known.mean(), magnitudes.nanmean(), agreement.reliability_T.nanmean()]
        summary.append([layer, module, parameters, *(defined(float(rate)) for rate in rates)])
    overall: list[list[Value]] = []
    by_task: list[list[Value]] = []
    for parameters in dict.fromkeys(place[0] for place in grams):
        of_kind = [gram_RR for place, gram_RR in grams.items() if place[0] == parameters]
        agreement = Agreement(torch.stack(of_kind).sum(dim=0), counts_T2)
        measures = (agreement.cosine_TT, agreement.corrected_TT, agreement.magnitude_TT)
        columns = [agreement.pairs(values_TT, order).tolist() for values_TT in measures]
        for (a, b), *values in zip(pair_names, *columns, strict=True):
            overall.append([a, b, parameters, *map(defined, values)])
        per_task = zip(agreement.norm_T.tolist(), agreement.reliability_T.tolist(), counts_T2.sum(1), strict=True)
        for name, (norm, reliability, instances) in zip(names, per_task, strict=True):
            by_task.append([name, parameters, defined(norm), defined(reliability), int(instances)])
    rows = {
        "gradient_pairs": pairs,
        "gradient_overall": overall,
        "gradient_summary": summary,
        "gradient_tasks": by_task,
    }
    return [TidyTable(name, about, columns, rows[name]) for name, columns in _COLUMNS.items()]


def _by_kind_and_layer(item: tuple[Place, torch.Tensor]) -> tuple[bool, int]:
    """Weights first; within a layer the modules stay in the model's order, since sorting is stable."""
    (parameters, layer, _), _ = item
    return parameters != "weights", layer


_COLUMNS: dict[str, dict[str, str]] = {
    "gradient_pairs": {
        "task_a": _TASK_A,
        "task_b": _TASK_B,
        "layer": _LAYER,
        "module": _MODULE,
        "cosine": _COSINE,
        "magnitude_similarity": _MAGNITUDE,
    },
    "gradient_overall": {
        "task_a": _TASK_A,
        "task_b": _TASK_B,
        "parameters": f"{_PARAMETERS}, all modules together",
        "cosine": _COSINE,
        "corrected_cosine": "the cosine that noiseless gradients would have, from the halves of the instances; null "
        "where noise is all that can be seen",
        "magnitude_similarity": _MAGNITUDE,
    },
    "gradient_summary": {
        "layer": _LAYER,
        "module": _MODULE,
        "parameters": _PARAMETERS,
        "conflict_rate": "share of the pairs of tasks whose gradients have a negative cosine",
        "mean_cosine": "mean cosine over the pairs of tasks",
        "mean_magnitude_similarity": "mean of 2|a||b| / (|a|² + |b|²) over the pairs of tasks",
        "reliability": f"{_RELIABILITY}; mean over tasks",
    },
    "gradient_tasks": {
        "task": "the task",
        "parameters": f"{_PARAMETERS}, all modules together",
        "norm": "norm of the task's gradient (nats a token, for a unit of the parameters)",
        "reliability": _RELIABILITY,
        "instances": "instances that the gradient is the mean of",
    },
}


def _about(model: nn.Module, sizes: Mapping[str, int], sketch_size: int) -> str:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return (
        f"{_data(sizes)} A task's gradient is the mean over its instances of the gradient of the answer's mean "
        "cross-entropy (so that neither padding nor the make-up of batches matters), without dropout, with the weights "
        f"in {dtype}. Weights are those of the linear layers inside the transformer's layers, whether they are trained "
        "or not. Inner products are estimated without bias from random projections (count sketches) of each parameter "
        f"to {sketch_size} numbers, and a cosine has a standard error of at most {sketch_size**-0.5:.2g}; parameters "
        "of no more numbers are exact. Noise from the choice of instances comes on top: see reliability."
    )


def _about_coactivation(sizes: Mapping[str, int], share: float) -> str:
    return (
        f"{_data(sizes)} Each task marks the strongest {share:.3g} of the units of every layer, ranked within it. "
        "Neurons: outputs of the MLP's gate projection (or first projection), before the activation function, averaged "
        "over all tokens of prompts and answers. Parameters: rows of the layer's weight matrices, attention and MLP "
        "together, by their squared gradient, averaged over the row and over the instances."
    )


def _data(sizes: Mapping[str, int]) -> str:
    few, many = min(sizes.values()), max(sizes.values())
    return f"Measured on {len(sizes)} tasks with {few if few == many else f'{few} to {many}'} instances each."
