"""Estimates the time of a training from that of the same model with few layers."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from badit.data.encoding import sequences
from badit.data.examples import AnswerCollator, batches_by_task
from badit.models import device, load_skeleton
from badit.runs.resolved import ResolvedRun
from badit.support.console import quiet
from badit.training.loading import model_dtype
from badit.training.methods import training_method
from badit.training.trainer import answer_losses
from badit.tuner import hooks_of
from badit.tuner.model import READ_PER_CLUSTER

_LAYERS = 3
_TIMED_STEPS = 3
# Operations of a step that take about half a minute; a larger step is not tried.
_OPERATIONS_OF_CPU = 2e12
_OPERATIONS_OF_ACCELERATOR = 1e15


class Seconds(NamedTuple):
    """Estimated times on this machine."""

    preparation: float  # before the first step: decompositions, clusters and codes
    step: float  # of an optimizer step


def estimated_seconds(
    run: ResolvedRun, tokenizer: Any, examples: Sequence[dict[str, Any]]
) -> Seconds | None:
    """Returns the estimated times of a run.

    Preparations and steps with one and with three layers give the time per layer. The weights are
    random numbers, which do not change the time of a step. None if the steps would take too long,
    or if the model cannot be cut to few layers.
    """
    training = run.recipe.training
    rows = training.per_device_train_batch_size
    # Examples of all tasks, as in a mixed batch; they are in the tasks' order.
    sample = [examples[len(examples) * row // rows] for row in range(rows)]
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batch = collate(sequences(sample))
    batches = batches_by_task(examples, collate, rows)
    try:
        model, layers = cut_model(run, _LAYERS)
        if _is_too_large(model, batch):
            return None
        several = _timed(run, model, batch, batches)
        one = _timed(run, cut_model(run, 1)[0], batch, batches)
    except Exception:  # an architecture of another form, or too little memory
        return None
    whole = []
    for of_one, of_several in zip(one, several, strict=True):
        per_layer = max(0.0, of_several - of_one) / max(1, min(_LAYERS, layers) - 1)
        whole.append(of_one + (layers - 1) * per_layer)
    preparation, micro_batch = whole
    return Seconds(preparation, training.gradient_accumulation_steps * micro_batch)


def cut_model(run: ResolvedRun, count: int) -> tuple[Any, int]:
    """Returns the base model with at most ``count`` of its layers, and their whole number.

    Its weights are random.
    """
    options = run.recipe.model.model_dump(exclude={"dtype", "quantisation"})
    model: Any = load_skeleton(**options, dtype=model_dtype(run.recipe))
    config = model.config.get_text_config()
    number = config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            del module[count:]
            break
    else:
        raise ValueError("no list of layers")
    config.num_hidden_layers = min(count, number)
    model.to_empty(device=device())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in model.buffers():
        buffer.fill_(1)
    return model, number


def _prompts_per_read(run: ResolvedRun, batches: Any) -> float:
    """Returns how many prompts the training searches for clusters, per prompt of the batches."""
    clusters = getattr(run.method.options, "num_clusters", 0)
    searched = min(run.training_instances, READ_PER_CLUSTER * clusters)
    read = sum(len(of_task.dataset) for of_task in batches.values())
    return max(1.0, searched / max(1, read))


def _is_too_large(model: Any, batch: dict[str, Any]) -> bool:
    matrices = {parameter for parameter in model.parameters() if parameter.dim() == 2}
    # Embeddings are looked up, and logits are computed for answers only.
    matrices -= {model.get_input_embeddings().weight}
    operations = 6 * batch["input_ids"].numel() * sum(matrix.numel() for matrix in matrices)
    limit = _OPERATIONS_OF_CPU if device().type == "cpu" else _OPERATIONS_OF_ACCELERATOR
    return operations > limit


def _timed(run: ResolvedRun, model: Any, batch: dict[str, Any], batches: Any) -> Seconds:
    """Times the preparation, and forward and backward passes with an update (the median)."""
    began = time.perf_counter()
    method = training_method(run.method)
    model = method.apply(model, [task.name for task in run.tasks])
    if run.recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    method.before_training(model, batches)
    preparation = time.perf_counter() - began
    began = time.perf_counter()
    with quiet():
        hooks_of(model).start_task(batches)
    preparation += (time.perf_counter() - began) * _prompts_per_read(run, batches)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    inputs = {
        name: value.to(device()) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    has_reference = run.recipe.training.objective == "dpo"
    seconds = []
    for _ in range(1 + _TIMED_STEPS):
        began = time.perf_counter()
        if has_reference:
            with torch.no_grad():
                answer_losses(model, inputs)
        losses_L, _, _ = answer_losses(model, inputs)
        losses_L.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    # The first step also allocates memory and compiles kernels.
    return Seconds(preparation, sorted(seconds[1:])[_TIMED_STEPS // 2])
