"""Interference between the tasks of a model: conflicts of gradients, and the units they share."""

from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from badit.analysis.coactivation import NeuronOutputs, coactivation, marked_experts, strongest
from badit.analysis.gates import PromptGates
from badit.analysis.gradients import TaskGradients, gradient_frames
from badit.analysis.tables import span
from badit.support.errors import BaditError
from badit.training.trainer import answer_losses
from badit.tuner.model import TaskBatches

# Numbers per parameter's gradient; a cosine has a standard error of at most 1 / √SKETCH_SIZE.
SKETCH_SIZE = 16384
SHARE = 0.1  # of a layer's units: a task marks the strongest


def measure_interference(
    model: nn.Module,
    batches: TaskBatches,
    gates: PromptGates | None = None,
    *,
    progress: bool = False,
) -> list[pd.DataFrame]:
    """Returns the gradient tables, and the co-activation tables.

    Co-activation is measured for "neurons", "parameters" and, with gates, "experts".

    ``model`` is a causal language model in evaluation mode, optionally with a PEFT adapter; the
    ``requires_grad`` of its parameters is changed. ``batches`` has each task's instances, each a
    batch of one row. ``gates`` are those of the same tasks.
    """
    tasks = list(batches)
    sizes = [len(instances) for instances in batches.values()]
    parameter = next(model.parameters())
    with ExitStack() as hooks, torch.enable_grad():
        # Both measurements share each instance's forward and backward pass.
        gradients = TaskGradients(model, sizes, SKETCH_SIZE, hooks)
        neurons = NeuronOutputs(model, len(tasks), hooks)
        bar = hooks.enter_context(tqdm(total=sum(sizes), desc="Gradients", disable=not progress))
        for number, (task, instances) in enumerate(batches.items()):
            neurons.task = number
            for index, instance in enumerate(instances):
                gradients.begin(number, index)
                inputs = send_to_device(instance, parameter.device)
                _loss(model, inputs, f"task {task}, instance {index}").backward()
                bar.update()

    data = f"Measured on {len(sizes)} tasks with {span(sizes)} instances each."
    about_gradients = (
        f"{data} A task's gradient is the mean over its instances of the gradient of the answer's "
        "mean cross-entropy, without dropout, with the weights in "
        f"{str(parameter.dtype).removeprefix('torch.')}. Inner products are estimated from random "
        f"projections of each parameter to {SKETCH_SIZE} numbers, so a cosine has a standard error "
        f"of at most {SKETCH_SIZE**-0.5:.2g}. The choice of instances adds further noise: see "
        "reliability."
    )
    about_units = (
        f"{data} Each task marks the strongest {SHARE:.3g} of the units of every layer. Neurons: "
        "outputs of the MLP's first projection, before the activation function, averaged over all "
        "tokens. Parameters: rows of the layer's weight matrices, by their squared gradient, "
        "averaged over row and instances, unless they are quantised."
    )
    marked = {
        "neurons": strongest(neurons.means(), SHARE),
        "parameters": strongest(gradients.row_scores(), SHARE),
    }
    if gates is not None:
        marked["experts"] = marked_experts(gates)
        about_units += " Experts: those whose mean gate over a task's prompts is above neutral."
    return [
        *gradient_frames(tasks, gradients, about_gradients),
        *coactivation(tasks, marked, about_units),
    ]


def _loss(model: nn.Module, inputs: Any, name: str) -> torch.Tensor:
    """Returns the mean loss of an instance's answer; BaditError if it is not finite."""
    losses_L, _, _ = answer_losses(model, inputs)
    # Each instance counts equally, whatever the length of its answer.
    loss = losses_L.mean()
    if not torch.isfinite(loss):
        reason = "the dtype may overflow: use float32"
        if not len(losses_L):
            reason = "no answer tokens: remove it"
        raise BaditError(f"{name}: the loss is not finite; {reason}")
    return loss
