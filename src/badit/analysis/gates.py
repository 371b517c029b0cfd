"""The gates of prompts: how much BADIT, the mixture baselines and MTL-LoRA weight each expert.

All components of an expert have the same gate, and a layer's gates sum to K or to 1. Here they are divided by their
mean over the experts: 1 is neutral, K means that only one expert is used. If each position has its own gates, a
prompt's gates are the mean over its positions, without padding and answer.
Batches are grouped by task; each has ``input_ids``, ``attention_mask``, ``labels`` (B, T) and ``tasks``.

Shape suffixes: B = rows, T = positions, N = components, M = adapted modules, K = experts, P = prompts of one task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn

from badit.analysis.tables import Table, layer_and_module
from badit.data import AnswerCollator, Task, batches_by_task
from badit.method import prompt_mean
from badit.recipe.schema import Recipe
from badit.runs.fingerprints import model_fingerprint, task_fingerprints
from badit.runs.folder import RECORD, RunFolder
from badit.support.errors import BaditError, nearest
from badit.support.files import is_number, read_json, refuse_links, write_json
from badit.training.encoding import encoded
from badit.training.loading import model_dtype
from badit.training.trainer import answer_losses
from badit.tuner.layer import ExpertLinear
from badit.tuner.model import TaskBatches
from badit.tuner.prompt import before_first_label

GATES_FILE = "gates.json"  # the fixed gates, in the folder of an export
PROMPTS_PER_TASK = (
    32  # for the mean gates; gates vary little within a task, so few training prompts are enough
)
_BATCH_SIZE = 8

#: Maps a module's name to the gates of its K experts as used in the forward pass, not divided by their mean.
Gates = Mapping[str, Sequence[float]]

GATES = Table(
    "gates",
    "task layer module expert",
    mean="mean gate over the task's prompts; 1 is neutral",
    std="standard deviation over the task's prompts (divisor n − 1)",
)


class Experts(NamedTuple):
    """An adapted layer and an active adapter of it."""

    layer: ExpertLinear
    adapter: str

    @property
    def number(self) -> int:
        return self.layer.badit_config[self.adapter].num_experts


class PromptGates(NamedTuple):
    """The gates of each prompt: by task, an array (P, M, K) with the prompts in the order of the batches' rows."""

    modules: Sequence[tuple[int, str]]
    by_task: Mapping[str, np.ndarray]

    @property
    def means(self) -> np.ndarray:
        """(tasks, M, K): the mean over each task's prompts."""
        return np.stack([gates_PMK.mean(axis=0) for gates_PMK in self.by_task.values()])


def adapted_layers(model: nn.Module) -> list[Experts]:
    """Returns the layers of all active adapters in model order, including adapters with a single expert."""
    layers = (module for module in model.modules() if isinstance(module, ExpertLinear))
    return [Experts(layer, adapter) for layer in layers for adapter in layer.running_adapters]


def active_experts(model: nn.Module) -> list[Experts]:
    """Returns the layers of the active adapter with several experts; BaditError if several such adapters are active."""
    found = [one for one in adapted_layers(model) if one.number > 1]
    if len({one.adapter for one in found}) > 1:
        raise BaditError(
            "model: several adapters are active; activate only one with model.set_adapter(NAME)"
        )
    return found


@contextmanager
def changed_gates(
    experts: Sequence[Experts], change: Callable[..., torch.Tensor]
) -> Iterator[None]:
    """Context manager in which ``change`` replaces the gates (B, 1 or T, K) of every layer."""
    try:
        for one in experts:  # the instance attribute shadows the class's method
            vars(one.layer)["gates"] = lambda adapter, x, one=one, own=one.layer.gates: change(
                one, own(adapter, x)
            )
        yield
    finally:
        for one in experts:
            vars(one.layer).pop("gates", None)


def prompt_gates(model: Any, batches: TaskBatches) -> PromptGates:
    """Returns the gates of every prompt, from one forward pass of a model with experts in evaluation mode."""
    experts = active_experts(model)
    by_task = {}
    for task, of_task in batches.items():
        gates_PMK = torch.stack([*_gates_of_prompts(model, experts, of_task).values()], dim=1)
        by_task[task] = (gates_PMK / gates_PMK.mean(dim=-1, keepdim=True)).numpy()
    return PromptGates([layer_and_module(one.layer.name) for one in experts], by_task)


def mean_gates(model: Any, of_task: Iterable[Any]) -> Gates:
    """Returns the gates of every adapted module: undivided means over the prompts of a task's batches."""
    found = _gates_of_prompts(model, adapted_layers(model), of_task)
    return {name: gates_PK.mean(dim=0).tolist() for name, gates_PK in found.items()}


@torch.no_grad()
def _gates_of_prompts(
    model: Any, experts: Sequence[Experts], of_task: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """Returns the gates (P, K) of each layer by its name: means over each prompt's positions, on the CPU."""
    kept: dict[str, list[torch.Tensor]] = {one.layer.name: [] for one in experts}
    prompt_BT = torch.empty(0)  # prompt mask of the current batch

    def keep(one: Experts, gates: torch.Tensor) -> torch.Tensor:
        # OPT flattens batch and positions into one dimension before its MLP.
        by_row = gates.unflatten(0, prompt_BT.shape) if gates.ndim == 2 else gates
        if by_row.shape[1] not in (1, prompt_BT.shape[1]):
            problem = "does not see every position, so its gates cannot be measured"
            raise BaditError(
                f"{one.layer.name}: {problem}; leave it out of target_modules, or use export --gates"
            )
        gates_BTK = by_row.float().expand(*prompt_BT.shape, -1)
        kept[one.layer.name].append(prompt_mean(gates_BTK, prompt_BT.to(gates.device)).cpu())
        return gates

    with changed_gates(experts, keep):
        for batch in of_task:
            inputs = send_to_device(batch, model.device)
            prompt_BT = before_first_label(inputs["labels"], inputs["attention_mask"])
            answer_losses(model, inputs)  # runs a forward pass with the prompt mask and the tasks
    return {name: torch.cat(of_layer) for name, of_layer in kept.items()}


def span(counts: Sequence[int]) -> str:
    """Returns the counts as text: one number if all are equal, otherwise "MINIMUM to MAXIMUM"."""
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def gates_frame(gates: PromptGates) -> pd.DataFrame:
    """Returns each task's gates in each module: mean and standard deviation over its prompts."""
    each = span([len(gates_PMK) for gates_PMK in gates.by_task.values()])
    # A single prompt has no standard deviation.
    stds = [
        g.std(axis=0, ddof=1) if len(g) > 1 else np.full_like(g[0], np.nan)
        for g in gates.by_task.values()
    ]
    places = product(gates.by_task, gates.modules, range(gates.means.shape[-1]))
    numbers = zip(places, gates.means.ravel(), np.ravel(stds), strict=True)
    return GATES.frame(
        [(task, *module, expert, mean, std) for (task, module, expert), mean, std in numbers],
        f"Gates of {each} prompts of each of {len(gates.by_task)} tasks, divided by their mean over the experts: 1 is "
        "neutral, and the number of experts means that only one expert is used.",
    )


def task_gates(
    run: RunFolder,
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    tasks: Mapping[str, Task],
    names: Sequence[str],
) -> Iterator[tuple[str, Gates]]:
    """Yields each named task with its mean gates over its first training prompts, cached in ``gates.json``."""
    depends = {
        "model": model_fingerprint(model),
        "dtype": model_dtype(recipe),
        "prompt": recipe.prompt.model_dump(),
    }
    depends |= {"prompts_per_task": PROMPTS_PER_TASK, **task_fingerprints(list(tasks.values()))}
    by_task: dict[str, Gates] = {}
    with suppress(
        BaditError, KeyError, TypeError, AttributeError
    ):  # the cache does not exist or is damaged
        kept = read_json(run.gates_path)
        if kept["depends_on"] == depends:
            by_task = {
                name: _checked_gates(gates, run.gates_path, model)
                for name, gates in kept["tasks"].items()
            }
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    written, last = (
        len(by_task),
        next((name for name in reversed(names) if name not in by_task), None),
    )
    for name in names:
        if name not in by_task:
            pairs = [(tasks[name], instance) for instance in tasks[name].train[:PROMPTS_PER_TASK]]
            batches = batches_by_task(
                encoded(tokenizer, recipe, pairs, model), collate, _BATCH_SIZE
            )
            by_task[name] = mean_gates(model, batches[name])
            if (
                name == last or len(by_task) > 1.2 * written
            ):  # ever fewer times, since the file grows with the tasks
                written = len(by_task)
                with suppress(BaditError):  # the run's folder may be read-only
                    write_json(run.gates_path, {"depends_on": depends, "tasks": by_task})
        yield name, by_task[name]


def read_gates(path: Path, model: PeftModel) -> Gates:
    """Reads gates from a file, which must have one gate for every expert of every adapted module and nothing else."""
    if (path.parent / RECORD).is_file():
        refuse_links(path.parent)  # an export, which may be untrusted
    return _checked_gates(read_json(path), path, model)


def _checked_gates(content: Mapping[str, Any], path: Path, model: PeftModel) -> Gates:
    # Not Experts.number: a method with a branch for each task has one expert, and a gate for each branch.
    experts = {
        one.layer.name: int(one.layer.expert_of(one.adapter).max()) + 1
        for one in adapted_layers(model)
    }
    for name in (*content, *experts):
        gates, number = content.get(name), experts.get(name)
        if number is None:
            raise BaditError(
                f"{path}: {name}: not a module that the run adapts{nearest(name, experts)}"
            )
        if not isinstance(gates, list) or len(gates) != number or not all(map(is_number, gates)):
            raise BaditError(
                f"{path}: {name}: must be a list of {number} numbers, one gate per expert"
            )
    return content
