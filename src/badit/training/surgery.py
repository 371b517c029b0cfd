"""Gradient surgery: combines the tasks' gradients so that they cancel each other less.

* pcgrad (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782, Algorithm
  1): from each gradient g_i, subtracts the projection on every other g_j with g_i · g_j < 0, in
  random order; sums the results.
* cagrad (Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv
  2110.14048, Algorithm 1): d = g_0 + c ‖g_0‖ g_w / ‖g_w‖, where g_0 is the mean of the T gradients
  and g_w = Σ_i w_i g_i; the weights w on the simplex minimise g_w · g_0 + c ‖g_0‖ ‖g_w‖. Here
  c = 0.5.

Both use torchjd, on all trainable parameters as one vector. A task's loss is its rows' share of the
batch loss, so the gradients sum to the plain gradient. pcgrad returns this sum if no gradients
conflict; cagrad, times T, if c = 0.

Assumptions: a task's weight is its number of answer tokens in the batch (in the papers every task
has its own loss); surgery is done in every micro-batch; a micro-batch with one task gives the plain
gradient (CAGrad's formula would multiply it by 1 + c). CAGrad's rescaling of the step is not used.

Shape suffixes: B = rows, T = positions in (B, T), otherwise tasks, P = trainable scalars.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from torch import nn

from badit.support.errors import BaditError
from badit.training.trainer import AnswerTrainer

Surgery = Literal["pcgrad", "cagrad"]
CAGRAD_RADIUS = 0.5  # c: the radius of the ball around the mean gradient, relative to its norm


def combination(surgery: Surgery) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns PCGrad (arXiv 2001.06782), or CAGrad (arXiv 2110.14048) times T.

    The function maps gradients (T, P) to one (P,). PCGrad's random order uses torch's global CPU
    generator, which checkpoints save.
    """
    try:
        from torchjd import aggregation

        if surgery == "pcgrad":
            return aggregation.PCGrad()
        # With torchjd's default of norm_eps, a task with a small gradient makes the result 0.
        aggregate = aggregation.CAGrad(c=CAGRAD_RADIUS, norm_eps=1e-30)  # imports the solver
    except ImportError:
        raise BaditError(
            "surgery needs torchjd and a solver: pip install 'badit[surgery]'"
        ) from None

    def combine(gradients_TP: torch.Tensor) -> torch.Tensor:
        # Scaled to norm 1, because torchjd's products of gradients would overflow or underflow.
        norm = gradients_TP.norm().clamp_min(torch.finfo(gradients_TP.dtype).tiny)
        return aggregate(gradients_TP / norm) * norm * len(gradients_TP)

    return combine


class SurgeryTrainer(AnswerTrainer):
    """An :class:`AnswerTrainer` for batches with ``tasks`` that combines the tasks' gradients.

    It holds more than 2 T gradients in float32. Each task has its own dropout mask. A method's own
    loss (``ExpertModel.extra_loss``) is computed for each task's rows and averaged over the tasks
    of a micro-batch. Training runs in one process, because other processes would have other tasks.
    """

    def __init__(self, *args: Any, surgery: Surgery, **kwargs: Any) -> None:
        self._combine = combination(surgery)
        super().__init__(*args, **kwargs)
        if self.accelerator.distributed_type != DistributedType.NO:
            raise BaditError("surgery runs in a single process: start it without a launcher")

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Adds the combined gradient of a micro-batch to ``.grad``; returns its loss.

        The micro-batch has tensors (B, T) and ``tasks``.
        """
        tasks = list(dict.fromkeys(inputs["tasks"]))
        if len(tasks) == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        earlier = [parameter.grad for parameter in parameters]  # of the micro-batches before

        losses = []
        gradients = []
        reached = set()  # the parameters that a task's loss depends on
        # ``compute_loss`` divides a method's own loss by this, and the cross-entropy by the number
        # of labels.
        self.current_gradient_accumulation_steps *= len(tasks)
        for task in tasks:
            model.zero_grad()
            rows = rows_of_task(inputs, task)
            losses.append(super().training_step(model, rows, num_items_in_batch))
            gradients.append(_gradient_vector(parameters))
            reached.update(parameter for parameter in parameters if parameter.grad is not None)
        self.current_gradient_accumulation_steps //= len(tasks)

        combined_P = self._combined(torch.stack(gradients))
        slices = combined_P.split([parameter.numel() for parameter in parameters])
        for parameter, gradient, slice_P in zip(parameters, earlier, slices, strict=True):
            if parameter in reached:
                combined = slice_P.view_as(parameter).to(parameter.dtype)
                gradient = combined if gradient is None else gradient + combined
            parameter.grad = gradient
        return torch.stack(losses).sum()

    def _combined(self, gradients_TP: torch.Tensor) -> torch.Tensor:
        # The Trainer must see non-finite gradients, which a loss scaler's overflow or divergence
        # causes.
        if not gradients_TP.isfinite().all():
            return gradients_TP.sum(dim=0)
        return self._combine(gradients_TP)


def _gradient_vector(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Returns all gradients as one vector (P,) in float32, with zeros where there is none."""
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        gradients.append(gradient.flatten().float())
    return torch.cat(gradients)


def rows_of_task(inputs: dict[str, Any], task: str) -> dict[str, Any]:
    """Returns one task's rows without their common padding at the end.

    Leading padding stays, because it affects positions.
    """
    rows = [row for row, name in enumerate(inputs["tasks"]) if name == task]
    is_attended_T = inputs["attention_mask"][rows].bool().any(dim=0)
    length = int(is_attended_T.nonzero().max()) + 1
    batch: dict[str, Any] = {
        name: value_BT[rows, :length] for name, value_BT in inputs.items() if name != "tasks"
    }
    batch["tasks"] = [task] * len(rows)
    return batch
