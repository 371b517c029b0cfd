"""Whether experts differ in what they learn: the angles between their components' gradients, and regrouping's moves.

Component i is the pair (row i of A, column i of B), and its gradient ĝ_i those two, concatenated and normalised. DOG
groups components of like gradients, so the angles between components of one expert should be small, those between
components of two experts near 90° (paper, Fig. 4: arXiv 2605.05676). Angles on the very gradients that a grouping was
made from flatter it. Here they are

* of the steps that followed a regrouping, under the grouping before it and the one after it;
* for methods that never regroup, of the steps before the line was logged ("training");
* for a finished adapter, of the whole loss on data that it was not trained on ("held-out").

Experts that share one A have no components of their own, and so no such angles.

Shape suffixes: N = components, I/O = in/out features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import nn
from tqdm import tqdm

from badit.analysis.gates import Batches, Experts, active_experts
from badit.analysis.gradients import layer_and_module
from badit.analysis.tables import TidyTable, Value
from badit.data import on_device
from badit.errors import BaditError, first_problem
from badit.files import read_json, read_jsonl
from badit.method import ExpertAngles, cosine_gram
from badit.method import expert_angles as angles_of
from badit.runs import RunFolder
from badit.trainer import answer_losses


class _Logged(BaseModel):
    """A line of a log; the angles are missing where no step followed, and null where there was no pair."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    step: int
    module: str
    intra_degrees: float | None = None
    inter_degrees: float | None = None
    intra_abs_cos: float | None = None
    inter_abs_cos: float | None = None

    @property
    def place(self) -> tuple[int, str]:
        return layer_and_module(self.module.rpartition(".")[0])  # the last part is the adapter's name

    def angles(self, prefix: str = "") -> list[float | None]:
        return [getattr(self, prefix + field) for field in ExpertAngles._fields]


class _Regrouping(_Logged):
    previous_labels: list[int]
    labels: list[int]
    previous_intra_degrees: float | None = None
    previous_inter_degrees: float | None = None
    previous_intra_abs_cos: float | None = None
    previous_inter_abs_cos: float | None = None

    @model_validator(mode="after")
    def _same_components(self) -> _Regrouping:
        if len(self.labels) != len(self.previous_labels):
            raise ValueError("labels and previous_labels must name the same number of components")
        if any(not 0 <= label < len(self.labels) for label in (*self.labels, *self.previous_labels)):
            raise ValueError("labels and previous_labels must be experts, from 0 and fewer than components")
        return self


_Line = TypeVar("_Line", bound=_Logged)


def expert_angles(
    run: RunFolder, model: Any = None, batches: Batches | None = None, *, progress: bool = False
) -> TidyTable:
    """The angles that the run has logged and, given its model and held-out batches, those of the finished adapter.

    ``progress`` shows a bar on stderr.

    Raises:
        BaditError: a damaged log.
    """
    rows: list[list[Value]] = [
        [line.step, *line.place, measured, *line.angles(prefix)]
        for line in _lines(run.regroupings, _Regrouping)
        for measured, prefix in (("before", "previous_"), ("after", ""))
    ]
    rows += [[line.step, *line.place, "training", *line.angles()] for line in _lines(run.angles, _Logged)]
    if model is not None and batches is not None:
        step, found = _last_step(run), held_out_angles(model, batches, progress=progress)
        rows += [[step, *place, "held-out", *angles] for place, angles in found.items()]
    return TidyTable(
        name="expert_angles",
        about=(
            "Angles between the gradients of components of one expert (within) and of two experts (between), means "
            "over pairs. A signed mean hides opposite directions, so the mean |cosine| stands beside it. Of a "
            "regrouping, both groupings are measured on the steps that followed it, which neither was made from."
        ),
        columns={
            "step": "step of the regrouping or of the log line; the last one for held-out; null if not known",
            "layer": "index of the transformer layer, from 0",
            "module": "the adapted module's name below its layer",
            "measured": (
                "before or after: the grouping before or after this step's regrouping, on the steps that followed; "
                "training: a method without regrouping; held-out: the finished adapter on data it was not trained on"
            ),
            "within_degrees": "mean angle between components of one expert, in degrees",
            "between_degrees": "mean angle between components of two experts, in degrees",
            "within_abs_cos": "mean |cosine| between components of one expert",
            "between_abs_cos": "mean |cosine| between components of two experts",
        },
        rows=[row for row in rows if any(angle is not None for angle in row[4:])],
    )


def component_flow(run: RunFolder) -> TidyTable:
    """How many components every regrouping has moved from one expert to another, and how many have stayed.

    Raises:
        BaditError: a damaged log.
    """
    rows: list[list[Value]] = []
    for line in _lines(run.regroupings, _Regrouping):
        moves = Counter(zip(line.previous_labels, line.labels, strict=True))
        rows += [[line.step, *line.place, *move, count] for move, count in sorted(moves.items())]
    return TidyTable(
        name="component_flow",
        about="Where each regrouping took the experts' components from and to; those that stayed are counted too.",
        columns={
            "step": "step of the regrouping",
            "layer": "index of the transformer layer, from 0",
            "module": "the adapted module's name below its layer",
            "from_expert": "the expert before, counted from 0",
            "to_expert": "the expert after, counted from 0",
            "components": "how many components went this way; pairs without any are left out",
        },
        rows=rows,
    )


def held_out_angles(
    model: Any, batches: Batches, *, progress: bool = False
) -> dict[tuple[int, str], list[float | None]]:
    """By module, the angles between the experts' gradients of the summed loss over all batches.

    Modules whose experts share one A are left out. ``progress`` shows a bar on stderr.
    """
    experts = [one for one in active_experts(model) if one.layer.badit_config[one.adapter].experts_own_components]
    gradients = _gradients(model, experts, batches, progress) if experts else []
    angles = {}
    for one, (grad_A_NI, grad_B_ON) in zip(experts, gradients, strict=True):
        gram_NN = cosine_gram(grad_A_NI, grad_B_ON).cpu().numpy()
        angles[one.place] = list(angles_of(gram_NN, one.expert_of_N.cpu().numpy()).defined().values())
    return angles


def _gradients(
    model: Any, experts: list[Experts], batches: Batches, progress: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of the sum of all answer tokens' losses, for every layer's A (N, I) and B (O, N), in float32."""
    parameters = [
        parameter for one in experts for parameter in (one.layer.badit_A[one.adapter], one.layer.badit_B[one.adapter])
    ]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    everything = [batch for of_task in batches.values() for batch in of_task]
    with _requiring_gradients(parameters), torch.enable_grad():
        for batch in tqdm(everything, desc="Angles", unit="batch", disable=not progress, leave=False):
            losses_L, _, _ = answer_losses(model, on_device(batch, model.device), model)
            for total, gradient in zip(sums, torch.autograd.grad(losses_L.sum(), parameters), strict=True):
                total += gradient
    return list(zip(sums[::2], sums[1::2], strict=True))


@contextmanager
def _requiring_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, they do; a model that was loaded for inference has them frozen."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)


def _lines(path: Path, kind: type[_Line]) -> Iterator[_Line]:
    number = 1
    try:
        for line in read_jsonl(path):
            yield kind.model_validate(line)
            number += 1
    except ValidationError as error:
        location, message = first_problem(error)
        where = ": ".join([f"{path}: line {number}", *map(str, location)])
        raise BaditError(f"{where}: {message}; remove the file to leave it out") from None


def _last_step(run: RunFolder) -> int | None:
    """The step that the run's training ended at, as its environment file has it."""
    training: Mapping[str, Any] = read_json(run.environment).get("training") or {} if run.environment.is_file() else {}
    steps = training.get("steps")
    return steps if isinstance(steps, int) else None
