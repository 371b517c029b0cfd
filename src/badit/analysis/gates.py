"""Which experts a prompt draws on: the gates of BADIT, of the mixture baselines and of MTL-LoRA.

All components of an expert have the same gate, and a layer's gates sum to K or to 1. Here they are divided by their
mean over the experts: 1 is neutral, K is one expert alone. Where every position has its own gates, a prompt's are the
mean over its positions, without padding and answer.
Batches are by task, each of ``input_ids``, ``attention_mask``, ``labels`` (B, T) and ``tasks``.

Shape suffixes: B = rows, T = positions, N = components, M = adapted modules, K = experts, P = prompts of one task,
U = experts of all of a layer's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import nn

from badit.analysis.tables import Table, layer_and_module
from badit.data import AnswerCollator, Task, batches_by_task, on_device
from badit.errors import BaditError, nearest
from badit.files import read_json, refuse_links, write_json
from badit.method import prompt_mean
from badit.recipe import Recipe
from badit.run import RECORD, Run
from badit.train import encoded, model_dtype, model_fingerprint, pad_id, task_fingerprints
from badit.trainer import answer_losses
from badit.tuner.config import is_number
from badit.tuner.layer import ExpertLinear
from badit.tuner.prompt import before_first_label

# A gate that is neutral except for rounding does not count as drawn on.
_ROUNDING = 1e-6
#: In the folder of an export, the gates that have been fixed.
GATES_FILE = "gates.json"
#: Gates of prompts of one task are close together: this many training prompts settle the mean.
PROMPTS_PER_TASK = 32
_BATCH_SIZE = 8

#: By the module's name, a gate for each of its K experts, as they multiply.
Gates = Mapping[str, Sequence[float]]
Batches = Mapping[str, Sequence[Mapping[str, Any]]]
Change = Callable[["Experts", torch.Tensor], torch.Tensor]

GATES = Table(
    "gates",
    "task layer module expert",
    mean="mean gate over the task's prompts; 1 is neutral",
    std="standard deviation over the task's prompts (divisor n − 1)",
)


class Experts(NamedTuple):
    """An adapted layer and the adapter that is active in it."""

    layer: ExpertLinear
    adapter: str

    @property
    def place(self) -> tuple[int, str]:
        """The index of the transformer layer and the module's name below it."""
        return layer_and_module(self.layer.name)

    @property
    def number(self) -> int:
        return self.layer.badit_config[self.adapter].num_experts

    @property
    def expert_of_N(self) -> torch.Tensor:
        """The expert of every component: what DOG has made of it, or runs of equal length."""
        return self.layer.expert_of(self.adapter)

    @property
    def first_components_K(self) -> torch.Tensor:
        """A component of every expert, in the order of the experts."""
        labels_N = self.expert_of_N.cpu()
        return labels_N.argsort(stable=True)[:: len(labels_N) // (int(labels_N.max()) + 1)]


class PromptGates(NamedTuple):
    """How much every prompt draws on every expert: by task, gates (P, M, K), the prompts in the order of the rows."""

    modules: Sequence[tuple[int, str]]
    by_task: Mapping[str, np.ndarray]

    @property
    def tasks(self) -> list[str]:
        return list(self.by_task)

    @property
    def means(self) -> np.ndarray:
        """(tasks, M, K): the mean over each task's prompts."""
        return np.stack([gates_PMK.mean(axis=0) for gates_PMK in self.by_task.values()])


def adapted_layers(model: nn.Module) -> list[Experts]:
    """The layers of all active adapters, first to last, also of those with a single expert."""
    layers = (module for module in model.modules() if isinstance(module, ExpertLinear))
    return [Experts(layer, adapter) for layer in layers for adapter in layer.running_adapters]


def active_experts(model: nn.Module) -> list[Experts]:
    """The layers of the active adapter with several experts, first to last; BaditError if several such are active."""
    found = [one for one in adapted_layers(model) if one.number > 1]
    if len({one.adapter for one in found}) > 1:
        raise BaditError("several adapters are active; choose the one to look at: model.set_adapter(NAME)")
    return found


@contextmanager
def changed_gates(experts: Sequence[Experts], change: Change) -> Iterator[None]:
    """Within, the components' gates (B, 1 or T, N) of every layer are what ``change`` makes of them."""
    try:
        for one in experts:  # an attribute of the instance hides the class's method
            own = one.layer.component_gates
            vars(one.layer)["component_gates"] = lambda adapter, x, one=one, own=own: change(one, own(adapter, x))
        yield
    finally:
        for one in experts:
            vars(one.layer).pop("component_gates", None)


@torch.no_grad()
def prompt_gates(model: Any, batches: Batches) -> PromptGates:
    """The gates of every prompt, from one forward pass of a model in evaluation mode with experts."""
    experts = active_experts(model)
    by_task = {}
    for task, of_task in batches.items():
        layers = zip(experts, _component_gates(model, experts, of_task), strict=True)
        gates_PMK = torch.stack([gates_PN[:, one.first_components_K] for one, gates_PN in layers], dim=1)
        by_task[task] = (gates_PMK / gates_PMK.mean(dim=-1, keepdim=True)).numpy()
    return PromptGates([one.place for one in experts], by_task)


@torch.no_grad()
def mean_component_gates(model: Any, batches: Batches) -> dict[str, list[torch.Tensor]]:
    """By task, the components' gates (N) in every adapted layer, as they multiply, the mean over the task's prompts."""
    adapted = adapted_layers(model)
    return {
        task: [g_PN.mean(dim=0) for g_PN in _component_gates(model, adapted, of_task)]
        for task, of_task in batches.items()
    }


def _component_gates(model: Any, experts: Sequence[Experts], of_task: Sequence[Any]) -> list[torch.Tensor]:
    """The components' gates (P, N) by layer, means over each prompt's positions, on the CPU."""
    kept: dict[str, list[torch.Tensor]] = {one.layer.name: [] for one in experts}
    prompt_BT = torch.empty(0)  # of the running batch

    def keep(one: Experts, gates: torch.Tensor) -> torch.Tensor:
        # OPT's MLP sees all positions of a batch as rows.
        by_row = gates.unflatten(0, prompt_BT.shape) if gates.ndim == 2 else gates
        gates_BTN = by_row.float().expand(*prompt_BT.shape, -1)
        kept[one.layer.name].append(prompt_mean(gates_BTN, prompt_BT.to(gates.device)).cpu())
        return gates

    with changed_gates(experts, keep):
        for batch in of_task:
            inputs = on_device(batch, model.device)
            prompt_BT = inputs["attention_mask"].bool() & before_first_label(inputs["labels"])
            answer_losses(model, inputs, model)  # for its forward pass, which tells every method what it needs to know
    return [torch.cat(of_layer) for of_layer in kept.values()]


def span(counts: Sequence[int]) -> str:
    """The counts in words: one number, or the least and the largest."""
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def gates_frame(gates: PromptGates) -> pd.DataFrame:
    """Every task's gates in every module: mean and standard deviation over its prompts."""
    each = span([len(gates_PMK) for gates_PMK in gates.by_task.values()])
    # A single prompt has no standard deviation.
    stds = [g.std(axis=0, ddof=1) if len(g) > 1 else np.full_like(g[0], np.nan) for g in gates.by_task.values()]
    places = product(gates.tasks, gates.modules, range(gates.means.shape[-1]))
    numbers = zip(places, gates.means.ravel(), np.ravel(stds), strict=True)
    return GATES.frame(
        [(task, *module, expert, mean, std) for (task, module, expert), mean, std in numbers],
        f"How much each task draws on each expert: the gates of its prompts, from {each} prompts of each of "
        f"{len(gates.by_task)} tasks; 1 is neutral, and the number of experts is one expert alone.",
    )


def marked_experts(gates: PromptGates) -> dict[str, list[torch.Tensor]]:
    """By task, a mask (U,) for every layer: the experts whose mean gate over the task's prompts is above neutral."""
    layers_M = np.array([layer for layer, _ in gates.modules])
    return {
        task: [torch.from_numpy(marked_MK[layers_M == layer].ravel()) for layer in np.unique(layers_M)]
        for task, marked_MK in zip(gates.tasks, gates.means > 1 + _ROUNDING, strict=True)
    }


def task_gates(
    run: Run, model: Any, tokenizer: Any, recipe: Recipe, tasks: Mapping[str, Task], names: Sequence[str]
) -> Iterator[tuple[str, Gates]]:
    """The mean gates of each of the named ``tasks`` over its first training prompts, one task after another.

    They are measured once and kept in the run's ``gates.json``, with fingerprints of what they depend on.
    """
    depends = {"model": model_fingerprint(model), "dtype": model_dtype(recipe), "prompt": recipe.prompt.model_dump()}
    depends |= {"prompts_per_task": PROMPTS_PER_TASK, **task_fingerprints(list(tasks.values()))}
    by_task: dict[str, Gates] = {}
    with suppress(BaditError, KeyError, TypeError, AttributeError):  # there are none yet, or they are damaged
        kept = read_json(run.gates_path)
        if kept["depends_on"] == depends:
            by_task = {name: _checked_gates(gates, run.gates_path, model) for name, gates in kept["tasks"].items()}
    layers, collate = adapted_layers(model), AnswerCollator(pad_id(tokenizer), with_tasks=True)
    for name in names:
        if name not in by_task:
            pairs = [(tasks[name], instance) for instance in tasks[name].train[:PROMPTS_PER_TASK]]
            batches = batches_by_task(encoded(tokenizer, recipe, pairs, model), collate, _BATCH_SIZE)
            of_layers = zip(layers, mean_component_gates(model, batches)[name], strict=True)
            by_task[name] = {one.layer.name: gates_N[one.first_components_K].tolist() for one, gates_N in of_layers}
            with suppress(BaditError):  # a run that cannot be written to can still be used
                write_json(run.gates_path, {"depends_on": depends, "tasks": by_task})
        yield name, by_task[name]


def read_gates(path: Path, model: PeftModel) -> Gates:
    """A file's gates: one for every expert of every adapted module and nothing else."""
    if (path.parent / RECORD).is_file():
        refuse_links(path.parent)  # an export, which may come from elsewhere
    return _checked_gates(read_json(path), path, model)


def _checked_gates(content: Mapping[str, Any], path: Path, model: PeftModel) -> Gates:
    experts = {one.layer.name: len(one.first_components_K) for one in adapted_layers(model)}
    for name in (*content, *experts):
        gates, number = content.get(name), experts.get(name)
        if number is None:
            raise BaditError(f"{path}: {name}: the run adapts no such module{nearest(name, experts)}")
        if not isinstance(gates, list) or len(gates) != number or not all(map(is_number, gates)):
            raise BaditError(f"{path}: {name}: must be a list of {number} numbers, one gate for each expert")
    return content
