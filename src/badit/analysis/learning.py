"""What experts and tasks learn: angles between experts, moves of components, scores and task gaps.

Component i is the pair (row i of A, column i of B). Its gradient ĝ_i is the gradients of both,
concatenated and normalised. Angles between components of one expert should be small, those between
experts near 90° (paper, Fig. 4: arXiv 2605.05676). The angles of a regrouping are measured on the
steps after it, because those on the steps that it was computed from are too favourable. Experts
that share one A have no components, so they have no angles.

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

from badit.analysis.tables import COUNT, EXPERT, INDEX, TEXT, Column, Table, layer_and_module
from badit.comparison.results import SINGLE_TASK, load_results, paired
from badit.method import ExpertAngles, cosine_gram
from badit.method import expert_angles as angles_of
from badit.recipe.loading import read_values
from badit.runs.folder import AnyPath, RunFolder
from badit.runs.scores import read_scores
from badit.support.errors import BaditError, explained
from badit.support.files import refuse_links
from badit.training.trainer import answer_losses
from badit.tuner.experts import active_experts
from badit.tuner.model import TaskBatches

Angles = Mapping[tuple[int, str], Sequence[float | None]]  # by layer and module

EXPERT_ANGLES = Table(
    "expert_angles",
    "step layer module",
    step=Column(
        "step of the regrouping or of the log line; the last step for held-out; null if unknown",
        COUNT,
    ),
    measured=Column(
        "before or after: the grouping before or after this step's regrouping, on the following "
        "steps; held-out: the trained adapter on data that it was not trained on",
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


def expert_angles(run: RunFolder, held_out: Angles | None = None) -> pd.DataFrame:
    """Returns the angles that the run logged, and those of the trained adapter if given."""
    rows = []
    with explained(run.regroupings_path, fix=_FIX, any_error=True):
        for place, line in _regroupings(run):
            # Both groupings are measured on the same steps, so their angles can be compared.
            for measured, prefix in (("before", "previous_"), ("after", "")):
                # An angle is missing if no step followed the regrouping, and null if there was no
                # pair.
                angles = [line.get(prefix + name) for name in ExpertAngles._fields]
                rows.append((*place, measured, *angles))
        if held_out:
            # At the last step, the end of the logged curves.
            training = run.known_environment.get("training") or {}
            step = training.get("steps")
            rows += [(step, *place, "held-out", *angles) for place, angles in held_out.items()]
        # The log may come from others, so its values are checked.
        return EXPERT_ANGLES.checked(
            [row for row in rows if any(angle is not None for angle in row[4:])],
            "Angles between the gradients of components of one expert (within) and of two experts "
            "(between), means over pairs. The groupings before and after a regrouping are both "
            "measured on the steps after it.",
        )


def component_flow(run: RunFolder) -> pd.DataFrame:
    """Returns how many components each regrouping moved between experts, and how many stayed."""
    rows = []
    with explained(run.regroupings_path, fix=_FIX, any_error=True):
        for place, line in _regroupings(run):
            moves = Counter(zip(line["previous_labels"], line["labels"], strict=True))
            rows += [(*place, *move, count) for move, count in sorted(moves.items())]
        return COMPONENT_FLOW.checked(
            rows,
            "Number of components that each regrouping moved between experts, including those that "
            "stayed.",
        )


def _regroupings(run: RunFolder) -> Iterator[tuple[tuple[Any, int, str], dict[str, Any]]]:
    """Yields the lines of the log, each with its step, layer and module."""
    for line in run.log(run.regroupings_path):
        module, _, _ = line["module"].rpartition(".")  # without the adapter's name
        yield (line["step"], *layer_and_module(module)), line


@torch.enable_grad()
def held_out_angles(model: Any, batches: TaskBatches, *, progress: bool = False) -> Angles:
    """Returns, for each module whose experts do not share A, the angles between their gradients.

    The gradients are over all batches. Afterwards, only these experts' A and B require a gradient.
    """
    experts = [
        (layer, adapter)
        for layer, adapter in active_experts(model)
        if not layer.badit_config[adapter].shares_A
    ]
    if not experts:
        return {}
    parameters = []
    for layer, adapter in experts:
        parameters += [layer.badit_A[adapter], layer.badit_B[adapter]]
    # The gradients of all other parameters would only cost time and memory.
    model.requires_grad_(False)
    nn.ParameterList(parameters).requires_grad_(True)

    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    all_batches = [batch for of_task in batches.values() for batch in of_task]
    for batch in tqdm(all_batches, desc="Angles", unit="batch", disable=not progress, leave=False):
        losses_L, _, _ = answer_losses(model, send_to_device(batch, model.device))
        gradients = torch.autograd.grad(losses_L.sum(), parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient

    angles = {}
    factors = zip(experts, sums[::2], sums[1::2], strict=True)
    for (layer, adapter), grad_A_NI, grad_B_ON in factors:
        gram_NN = cosine_gram(grad_A_NI, grad_B_ON).cpu().numpy()
        labels_N = layer.expert_of(adapter).cpu().numpy()
        values = angles_of(gram_NN, labels_N).defined().values()
        angles[layer_and_module(layer.name)] = list(values)
    return angles


def transfer(run: RunFolder) -> pd.DataFrame:
    """Returns the score matrix of a sequential run from its scores."""
    scores = read_scores(run.scores_path)
    order = scores.get("order") or []
    matrix = scores.get("matrix") or []
    if {len(matrix), *map(len, matrix)} != {len(order)}:
        problem = "needs a row and a column per task of order"
        raise BaditError(f"{run.scores_path}: matrix: {problem}; score the run again")
    places = product(enumerate(order, start=1), order)
    return TRANSFER.frame(
        [
            (*stage, task, score)
            for (stage, task), score in zip(places, chain(*matrix), strict=True)
        ],
        "Rouge-L on every task after each stage of a run that learns its tasks in sequence.",
    )


def transfer_of_chain(run: RunFolder) -> pd.DataFrame:
    """Returns the scores of a run and of the runs that it extends, the first one first.

    Of runs whose folders are gone, or that have no scores, there are no rows. Without an earlier
    run, there are none at all.
    """
    stages: list[tuple[str, dict[str, float | None]]] = []
    members = _chain(run)
    for member in members if len(members) > 1 else ():
        stages += _stages_of(member)
    tasks = dict.fromkeys(task for _, scores in stages for task in scores)
    rows = []
    for number, (label, scores) in enumerate(stages, start=1):
        # Runs may have trained tasks of the same names, as with merge=true.
        label = f"{label} ({number})" if label in [of for of, _ in stages[: number - 1]] else label
        rows += [(number, label, task, scores.get(task)) for task in tasks]
    return TRANSFER.frame(
        rows, "Rouge-L on every task that was scored after each run of a chain of badit extend."
    )


def _chain(run: RunFolder) -> list[RunFolder]:
    """Returns a run and the scored runs that it extends, the first one first."""
    members = [run]
    while members[0].config_path.is_file():
        # Not validated: recipes of other versions may have other keys.
        section = read_values(members[0].config_path).get("extend")
        path = section.get("run") if isinstance(section, dict) else None
        if not isinstance(path, str) or not Path(path, run.scores_path.name).is_file():
            break
        earlier = RunFolder.at(path)
        refuse_links(earlier.path)
        if earlier.path in [member.path for member in members]:
            break
        members.insert(0, earlier)
    return members


def _stages_of(run: RunFolder) -> list[tuple[str, dict[str, float | None]]]:
    """Returns the tasks that a run has trained, as text, and its scores; a sequence has several."""
    scores = read_scores(run.scores_path)
    earlier = {}
    if run.earlier_scores_path.is_file():
        earlier = _rouge_of(read_scores(run.earlier_scores_path))
    names = list(scores["tasks"])
    label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    stages = [(label, _rouge_of(scores))]
    if scores.get("matrix"):
        order = scores["order"]
        stages = [
            (task, dict(zip(order, row, strict=True)))
            for task, row in zip(order, scores["matrix"], strict=True)
        ]
    label, last = stages[-1]
    return [*stages[:-1], (label, {**earlier, **last})]


def _rouge_of(scores: Mapping[str, Any]) -> dict[str, float | None]:
    return {task: of_task["rouge_l"] for task, of_task in scores["tasks"].items()}


def task_gap(path: AnyPath) -> pd.DataFrame:
    """Returns the scores of a comparison by method and task.

    The models are trained on that task alone and on all tasks.
    """
    results = load_results(path)
    scores = results.scores.query("metric == 'rouge_l'")
    # Single-task runs have no order: each is paired with the runs of every order.
    pairs = pd.concat([paired(scores, method, method + SINGLE_TASK) for method in results.methods])
    means = (
        pairs.groupby(["method", "task"], sort=False)
        .agg(single=("score_other", "mean"), multi=("score", "mean"))
        .reset_index()
    )
    training = "all tasks one after another, scored after the last"
    if results.protocol == "mixed":
        training = "all tasks mixed"
    return TASK_GAP.frame(
        means.assign(gap=means["single"] - means["multi"]),
        "Difference between one model per task and one model for all tasks: Rouge-L of each method "
        f"trained on each task alone (single) and on {training} (multi), means over the seeds that "
        "have both.",
    )
