"""What experts and tasks learn: angles between experts, moves of components, score matrices, and task gaps.

Component i is the pair (row i of A, column i of B), and its gradient ĝ_i those two, concatenated and normalised. Angles
between components of one expert should be small, those between experts near 90° (paper, Fig. 4: arXiv 2605.05676).
Those of a regrouping are measured on the steps that followed it, since those that it was made from flatter it. Experts
that share one A have no components, and so no such angles.

Shape suffixes: N = components, I/O = in/out features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from badit.analysis.gates import Batches, active_experts
from badit.analysis.tables import COUNT, EXPERT, INDEX, SHARED, TEXT, Column, Table, layer_and_module
from badit.data import on_device
from badit.errors import BaditError, explained
from badit.files import read_jsonl
from badit.method import ExpertAngles, cosine_gram
from badit.method import expert_angles as angles_of
from badit.results import SINGLE_TASK, load_results, paired, read_scores
from badit.run import AnyPath, Run
from badit.trainer import answer_losses

EXPERT_ANGLES = Table(
    "expert_angles",
    step=Column("step of the regrouping or of the log line; the last one for held-out; null if not known", COUNT),
    layer=SHARED["layer"],
    module=SHARED["module"],
    measured=Column(
        "before or after: the grouping before or after this step's regrouping, on the steps that followed; training: a "
        "method without regrouping; held-out: the finished adapter on data it was not trained on",
        TEXT,
    ),
    within_degrees="mean angle between components of one expert, in degrees",
    between_degrees="mean angle between components of two experts, in degrees",
    within_abs_cos="mean |cosine| between components of one expert",
    between_abs_cos="mean |cosine| between components of two experts",
)
COMPONENT_FLOW = Table(
    "component_flow",
    step=Column("step of the regrouping", INDEX),
    layer=SHARED["layer"],
    module=SHARED["module"],
    from_expert=Column("the expert before, counted from 0", EXPERT),
    to_expert=Column("the expert after, counted from 0", EXPERT),
    components=Column("how many components went this way; pairs without any are left out", COUNT),
)
TRANSFER = Table(
    "transfer",
    stage=Column("how many tasks had been learnt", INDEX),
    trained_task=Column("the task learnt last", TEXT),
    task=Column("the task scored", TEXT),
    rouge_l="its Rouge-L, 0 to 100; null where a task still to come was not scored",
)
TASK_GAP = Table(
    "task_gap",
    method=Column("the method's name in the comparison", TEXT),
    task=SHARED["task"],
    single="Rouge-L of the model trained on this task alone, 0 to 100",
    multi="Rouge-L of the model trained on all tasks, 0 to 100",
    gap="single minus multi, in points: above 0, the task lost by being trained with the others",
)
_FIX = "remove the file to leave it out"


def _logged(path: Path) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """A log's lines, each with its step, layer and module."""
    for line in read_jsonl(path):
        module = line["module"].rpartition(".")[0]  # the last part is the adapter's name
        yield (line["step"], *layer_and_module(module)), line


def expert_angles(run: Run, held_out: Mapping[tuple[int, str], Sequence[float | None]] | None = None) -> pd.DataFrame:
    """The angles that the run has logged, and those of the finished adapter on held-out data."""
    regroups = run.regroupings_path.is_file()
    path = run.regroupings_path if regroups else run.angles_path
    prefixes = {"before": "previous_", "after": ""} if regroups else {"training": ""}
    step = (run.known_environment.get("training") or {}).get("steps") if held_out else None
    about = (
        "Angles between the gradients of components of one expert (within) and of two experts (between), means over "
        "pairs. Of a regrouping, both groupings are measured on the steps that followed it."
    )
    rows = []
    with explained(path, fix=_FIX, any_error=True):
        for place, line in _logged(path):
            for measured, prefix in prefixes.items():
                # An angle is missing where no step followed, and null where there was no pair.
                rows.append((*place, measured, *(line.get(prefix + field) for field in ExpertAngles._fields)))
        rows += [(step, *place, "held-out", *angles) for place, angles in (held_out or {}).items()]
        return EXPERT_ANGLES.checked([row for row in rows if any(angle is not None for angle in row[4:])], about)


def component_flow(run: Run) -> pd.DataFrame:
    """How many components every regrouping has moved from one expert to another, and how many have stayed."""
    about = "Where each regrouping took the experts' components from and to; those that stayed are counted too."
    rows = []
    with explained(run.regroupings_path, fix=_FIX, any_error=True):
        for place, line in _logged(run.regroupings_path):
            moves = Counter(zip(line["previous_labels"], line["labels"], strict=True))
            rows += [(*place, *move, count) for move, count in sorted(moves.items())]
        return COMPONENT_FLOW.checked(rows, about)


@torch.enable_grad()
def held_out_angles(model: Any, batches: Batches, *, progress: bool = False) -> dict[tuple[int, str], list]:
    """By module whose experts have an A each, the angles between their gradients of the loss over all batches.

    Afterwards no other parameter of the model requires a gradient.
    """
    experts = [one for one in active_experts(model) if not one.layer.badit_config[one.adapter].shares_A]
    everything = [batch for of_task in batches.values() for batch in of_task if experts]
    parameters = [p for one in experts for p in (one.layer.badit_A[one.adapter], one.layer.badit_B[one.adapter])]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    model.requires_grad_(False)
    nn.ParameterList(parameters).requires_grad_(True)
    for batch in tqdm(everything, desc="Angles", unit="batch", disable=not progress, leave=False):
        losses_L, _, _ = answer_losses(model, on_device(batch, model.device), model)
        for total, gradient in zip(sums, torch.autograd.grad(losses_L.sum(), parameters), strict=True):
            total += gradient
    angles = {}
    for one, grad_A_NI, grad_B_ON in zip(experts, sums[::2], sums[1::2], strict=True):
        gram_NN = cosine_gram(grad_A_NI, grad_B_ON).cpu().numpy()
        angles[one.place] = list(angles_of(gram_NN, one.expert_of_N.cpu().numpy()).defined().values())
    return angles


def transfer(run: Run) -> pd.DataFrame:
    """The score matrix of a sequential run, which has been scored."""
    scores = read_scores(run.scores_path)
    order, matrix = scores.get("order") or [], scores.get("matrix") or []
    if {len(matrix), *map(len, matrix)} != {len(order)}:
        raise BaditError(f"{run.scores_path}: matrix: must have a row and a column for every task of order")
    places = product(enumerate(order, start=1), order)
    rows = [(*stage, task, score) for (stage, task), score in zip(places, chain(*matrix), strict=True)]
    return TRANSFER.frame(rows, "Rouge-L on every task after each stage of a run that learns its tasks one by one.")


def task_gap(path: AnyPath) -> pd.DataFrame:
    """Every method's score on every task, trained on that task alone and on all of them; ``path`` is a comparison's."""
    results = load_results(path)
    scores = results.scores.loc[results.scores["metric"] == "rouge_l"]
    pairs = pd.concat([paired(scores, method, method + SINGLE_TASK) for method in results.methods])
    of_task = pairs.groupby(["method", "task"], sort=False)
    means = of_task.agg(single=("score_other", "mean"), multi=("score", "mean")).reset_index()
    how = "all tasks mixed" if results.protocol == "mixed" else "all tasks one after another, scored after the last"
    return TASK_GAP.frame(
        means.assign(gap=means["single"] - means["multi"]),
        f"What a model for one task has ahead of a model for all of them: Rouge-L of each method trained on every task "
        f"alone (single) and on {how} (multi), means over the seeds that have both.",
    )
