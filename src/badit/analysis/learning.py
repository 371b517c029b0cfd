"""Measures what experts and tasks learn: angles between experts, moves of components, score matrices and task gaps.

Component i is the pair (row i of A, column i of B). Its gradient ĝ_i is the gradients of both, concatenated and
normalised. Angles between components of one expert should be small, those between experts near 90° (paper, Fig. 4:
arXiv 2605.05676). The angles of a regrouping are measured on the steps after it, because those on the steps that it was
computed from are too favourable. Experts that share one A have no components, so they have no angles.

Shape suffixes: N = components, I/O = in/out features.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm

from badit.analysis.gates import active_experts
from badit.analysis.tables import COUNT, EXPERT, INDEX, TEXT, Column, Table, layer_and_module
from badit.comparison.results import SINGLE_TASK, load_results, paired
from badit.method import ExpertAngles, cosine_gram
from badit.method import expert_angles as angles_of
from badit.runs.folder import AnyPath, RunFolder
from badit.runs.scores import read_scores
from badit.support.errors import BaditError, explained
from badit.training.trainer import answer_losses
from badit.tuner.model import TaskBatches

EXPERT_ANGLES = Table(
    "expert_angles",
    "step layer module",
    step=Column(
        "step of the regrouping or of the log line; the last step for held-out; null if unknown",
        COUNT,
    ),
    measured=Column(
        "before or after: the grouping before or after this step's regrouping, on the following steps; held-out: the "
        "trained adapter on data that it was not trained on",
        TEXT,
    ),
    within_degrees="mean angle between components of one expert, in degrees",
    between_degrees="mean angle between components of two experts, in degrees",
    within_abs_cos="mean |cosine| between components of one expert",
    between_abs_cos="mean |cosine| between components of two experts",
)
COMPONENT_FLOW = Table(
    "component_flow",
    "step layer module",
    step=Column("step of the regrouping", INDEX),
    from_expert=Column("the expert before, counted from 0", EXPERT),
    to_expert=Column("the expert after, counted from 0", EXPERT),
    components=Column(
        "number of components that moved from from_expert to to_expert; rows with 0 are omitted",
        COUNT,
    ),
)
TRANSFER = Table(
    "transfer",
    stage=Column("number of tasks learnt so far", INDEX),
    trained_task=Column("the task learnt last", TEXT),
    task=Column("the scored task", TEXT),
    rouge_l="Rouge-L of the scored task, 0 to 100; null if it was not learnt yet and not scored",
)
TASK_GAP = Table(
    "task_gap",
    "method task",
    method=Column("the method's name in the comparison", TEXT),
    single="Rouge-L of the model trained on this task alone, 0 to 100",
    multi="Rouge-L of the model trained on all tasks, 0 to 100",
    gap="single minus multi, in points; above 0, training with the other tasks lowered the score",
)
_FIX = "delete the file to skip it"


def _logged(run: RunFolder, path: Path) -> Iterator[tuple[tuple, dict[str, Any]]]:
    for line in run.log(path):
        yield (
            (line["step"], *layer_and_module(line["module"].rpartition(".")[0])),
            line,
        )  # without the adapter's name


def expert_angles(
    run: RunFolder, held_out: Mapping[tuple[int, str], Sequence[float | None]] | None = None
) -> pd.DataFrame:
    """Returns the angles that the run logged, and those of the trained adapter on held-out data if given."""
    step = (run.known_environment.get("training") or {}).get("steps") if held_out else None
    about = (
        "Angles between the gradients of components of one expert (within) and of two experts (between), means over "
        "pairs. The groupings before and after a regrouping are both measured on the steps after it."
    )
    rows = []
    with explained(run.regroupings_path, fix=_FIX, any_error=True):
        for place, line in _logged(run, run.regroupings_path):
            for measured, prefix in (("before", "previous_"), ("after", "")):
                # An angle is missing if no step followed the regrouping, and null if there was no pair.
                rows.append(
                    (
                        *place,
                        measured,
                        *(line.get(prefix + field) for field in ExpertAngles._fields),
                    )
                )
        rows += [(step, *place, "held-out", *angles) for place, angles in (held_out or {}).items()]
        return EXPERT_ANGLES.checked(
            [row for row in rows if any(angle is not None for angle in row[4:])], about
        )


def component_flow(run: RunFolder) -> pd.DataFrame:
    """Returns how many components each regrouping moved from one expert to another, and how many stayed."""
    about = "Number of components that each regrouping moved between experts, including those that stayed."
    rows = []
    with explained(run.regroupings_path, fix=_FIX, any_error=True):
        for place, line in _logged(run, run.regroupings_path):
            moves = Counter(zip(line["previous_labels"], line["labels"], strict=True))
            rows += [(*place, *move, count) for move, count in sorted(moves.items())]
        return COMPONENT_FLOW.checked(rows, about)


@torch.enable_grad()
def held_out_angles(
    model: Any, batches: TaskBatches, *, progress: bool = False
) -> dict[tuple[int, str], list]:
    """Returns, for each module whose experts do not share A, the angles between their gradients over all batches.

    Afterwards, only these experts' A and B require a gradient.
    """
    experts = [
        one for one in active_experts(model) if not one.layer.badit_config[one.adapter].shares_A
    ]
    everything = [batch for of_task in batches.values() for batch in of_task if experts]
    parameters = [
        p
        for one in experts
        for p in (one.layer.badit_A[one.adapter], one.layer.badit_B[one.adapter])
    ]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    model.requires_grad_(False)
    nn.ParameterList(parameters).requires_grad_(True)
    for batch in tqdm(everything, desc="Angles", unit="batch", disable=not progress, leave=False):
        losses_L, _, _ = answer_losses(model, send_to_device(batch, model.device))
        for total, gradient in zip(
            sums, torch.autograd.grad(losses_L.sum(), parameters), strict=True
        ):
            total += gradient
    angles = {}
    for one, grad_A_NI, grad_B_ON in zip(experts, sums[::2], sums[1::2], strict=True):
        gram_NN = cosine_gram(grad_A_NI, grad_B_ON).cpu().numpy()
        found = angles_of(gram_NN, one.layer.expert_of(one.adapter).cpu().numpy())
        angles[layer_and_module(one.layer.name)] = list(found.defined().values())
    return angles


def transfer(run: RunFolder) -> pd.DataFrame:
    """Returns the score matrix of a sequential run from its scores."""
    scores = read_scores(run.scores_path)
    order, matrix = scores.get("order") or [], scores.get("matrix") or []
    if {len(matrix), *map(len, matrix)} != {len(order)}:
        raise BaditError(
            f"{run.scores_path}: matrix: needs a row and a column per task of order; score the run again"
        )
    places = product(enumerate(order, start=1), order)
    rows = [
        (*stage, task, score) for (stage, task), score in zip(places, chain(*matrix), strict=True)
    ]
    return TRANSFER.frame(
        rows, "Rouge-L on every task after each stage of a run that learns its tasks in sequence."
    )


def task_gap(path: AnyPath) -> pd.DataFrame:
    """Returns the scores of a comparison by method and task, trained on that task alone and on all tasks."""
    results = load_results(path)
    scores = results.scores.loc[results.scores["metric"] == "rouge_l"]
    pairs = pd.concat([paired(scores, method, method + SINGLE_TASK) for method in results.methods])
    of_task = pairs.groupby(["method", "task"], sort=False)
    means = of_task.agg(single=("score_other", "mean"), multi=("score", "mean")).reset_index()
    how = (
        "all tasks mixed"
        if results.protocol == "mixed"
        else "all tasks one after another, scored after the last"
    )
    return TASK_GAP.frame(
        means.assign(gap=means["single"] - means["multi"]),
        f"Difference between one model per task and one model for all tasks: Rouge-L of each method trained on each "
        f"task alone (single) and on {how} (multi), means over the seeds that have both.",
    )
