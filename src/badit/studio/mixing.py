"""The mixture that answers a prompt: which gates it had, gates set by hand, and the task whose mixture is nearest.

Gates are on the scale of :mod:`badit.analysis.gates`, on which 1 is neutral and K is one expert alone.

Shape suffixes: N = components, T = tasks, M = adapted modules, K = experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from badit.analysis.gates import Experts, PromptGates, changed_gates, gates_table, prompt_gates
from badit.analysis.tables import TidyTable
from badit.data import AnswerCollator, Task, batches_by_task
from badit.errors import BaditError
from badit.recipe import Recipe
from badit.runs import RunFolder
from badit.train import encoded, pad_id

# A task's prompts are close together in their gates.
_PROMPTS_PER_TASK = 4
_PAUSE = 0.01  # seconds, without which the measuring thread would take the model again before a waiting one wakes up
# Sums of softmaxes are 1 or K but for their last bits, which are not to be multiplied into gates set by hand.
_DECIMALS = 6


@contextmanager
def mixed(experts: Sequence[Experts], by_hand: Sequence[float] | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """Within, prompts are answered with the routers' gates, or with gates set by hand for all layers.

    Args:
        experts: the adapted layers; none for a method without experts.
        by_hand: a gate for each of the K experts.

    Yields:
        By adapted module, the gates (K) of the first pass within, which is the prompt's, a mean over its positions.
    """
    used: dict[str, torch.Tensor] = {}

    def mixing(one: Experts, own: torch.Tensor) -> torch.Tensor:
        # The number that is neutral is the method's: 1, or 1/K where its gates sum to 1.
        neutral = own.mean(dim=-1, keepdim=True).round(decimals=_DECIMALS)
        gates = own
        if by_hand is not None:
            gates = neutral * torch.tensor(by_hand, dtype=own.dtype, device=own.device)[one.expert_of_N.to(own.device)]
        if one.layer.name not in used:
            relative_N = (gates / neutral).flatten(0, -2).mean(dim=0)
            used[one.layer.name] = relative_N[one.first_components_K.to(own.device)].cpu()
        return gates

    with changed_gates(experts, mixing):
        yield used


@dataclass(frozen=True)
class TaskGates:
    """Every task's mean gates."""

    tasks: list[str]
    means_TMK: np.ndarray

    def nearest(self, gates_MK: np.ndarray) -> list[tuple[str, float]]:
        """All tasks, the nearest first, each with the mean absolute difference between its gates and these."""
        distance_T = np.abs(self.means_TMK - gates_MK).mean(axis=(1, 2))
        return [(self.tasks[t], float(distance_T[t])) for t in np.argsort(distance_T, kind="stable")]


def saved_task_gates(run: RunFolder, names: Sequence[str], experts: Sequence[Experts]) -> TaskGates | None:
    """The tasks' mean gates, from the run's analysis or as :func:`measure_task_gates` has left them in its folder.

    None where neither is of the present adapter and of tasks among ``names`` (of any tasks, if there are no names).
    """
    since = (run.adapter / SAFETENSORS_WEIGHTS_NAME).stat().st_mtime
    found = (_saved(folder / "gates.json", since, names, experts) for folder in (run.analysis, run.studio))
    return next((gates for gates in found if gates is not None), None)


def measure_task_gates(
    run: RunFolder, model: Any, tokenizer: Any, recipe: Recipe, tasks: Sequence[Task], free: AbstractContextManager[Any]
) -> TaskGates:
    """The tasks' mean gates over a few of their training prompts, which are kept in the run's folder.

    Args:
        free: is entered for every task, and left after it, so that others may use model and tokenizer in between.
    """
    modules: Sequence[tuple[int, str]] = []
    by_task: dict[str, np.ndarray] = {}
    for task in tasks:
        instances = task.train[:_PROMPTS_PER_TASK]
        if not instances:
            continue
        with free:
            examples = [encoded(tokenizer, recipe, task, instance) for instance in instances]
            collate = AnswerCollator(pad_id(tokenizer), with_tasks=True)
            gates = prompt_gates(model, batches_by_task(examples, collate, _PROMPTS_PER_TASK))
        modules = gates.modules
        by_task.update(gates.by_task)
        time.sleep(_PAUSE)
    gates = PromptGates(modules, by_task)
    with suppress(OSError):  # a run that cannot be written to is measured at every start
        gates_table(gates).save(run.studio)
    return TaskGates(gates.tasks, gates.means)


def _saved(path: Path, since: float, names: Sequence[str], experts: Sequence[Experts]) -> TaskGates | None:
    """A table's gates, if it is of the present adapter, of its modules and experts, and of the run's tasks."""
    if not path.is_file() or path.stat().st_mtime < since:
        return None
    try:
        records = TidyTable.load(path).records()
        gates = {(r["task"], r["layer"], r["module"], r["expert"]): float(str(r["mean"])) for r in records}
    except (BaditError, KeyError, ValueError):  # damaged: it is measured anew
        return None
    places = [(*one.place, expert) for one in experts for expert in range(one.number)]
    tasks = list(dict.fromkeys(task for task, *_ in gates))
    wanted = [(task, *place) for task in tasks for place in places]
    means = np.array([gates.get(key, math.nan) for key in wanted])
    if not tasks or len(wanted) < len(gates) or not np.isfinite(means).all() or not set(tasks) <= set(names or tasks):
        return None
    return TaskGates([str(task) for task in tasks], means.reshape(len(tasks), len(experts), -1))
