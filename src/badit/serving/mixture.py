"""The fixed mixture that an export takes in the router's place: a task's mean gates, the mean over tasks, or a file's.

A mixture's file is a JSON object with a list of gates for every adapted module, one gate for each expert, as they
multiply: ``{"model.layers.0.mlp.gate_proj": [1.02, 0.97, …], …}``. An export leaves its own as ``gates.json``.

Shape suffixes: N = components, K = experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from badit.analysis.gates import Experts, adapted_layers, mean_component_gates
from badit.data import AnswerCollator, Task, batches_by_task
from badit.errors import BaditError, nearest
from badit.files import read_json
from badit.recipe import Recipe
from badit.train import encoded, pad_id
from badit.tuner.base_config import is_number

# Gates of prompts of one task are close together: this many training prompts settle the mean.
PROMPTS_PER_TASK = 32
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Mixture:
    """Fixed gates, and where they are from.

    Attributes:
        source: in words.
        gates: by adapted module, a gate for every expert.
    """

    source: str
    gates: Mapping[str, Sequence[float]]

    def of_components(self, one: Experts) -> torch.Tensor:
        """(N): every component its expert's gate."""
        gates_K = torch.tensor(self.gates[one.layer.name], dtype=torch.float32)
        return gates_K[one.expert_of_N.cpu()]


def mean_mixture(
    model: PeftModel, tokenizer: Any, recipe: Recipe, tasks: Sequence[Task], *, named: bool, progress: bool
) -> Mixture:
    """The mean gates over the first training prompts of each of ``tasks``, every task weighing the same.

    Args:
        named: whether the task was asked for by name, rather than all of the run's.
        progress: show a bar on stderr.
    """
    chosen = [(task, task.train[:PROMPTS_PER_TASK]) for task in tasks if task.train]
    if not chosen:
        raise BaditError(f"task {tasks[0].name}: has no training prompts to take mean gates from; give --gates FILE")
    examples = [encoded(tokenizer, recipe, task, instance) for task, instances in chosen for instance in instances]
    batches = batches_by_task(examples, AnswerCollator(pad_id(tokenizer), with_tasks=True), _BATCH_SIZE)
    by_task = mean_component_gates(model, batches, progress=progress)
    adapted = adapted_layers(model)
    gates = {
        one.layer.name: torch.stack(of_tasks).mean(dim=0)[one.first_components_K].tolist()
        for one, *of_tasks in zip(adapted, *by_task.values(), strict=True)
    }
    of_what = f"of task {tasks[0].name}" if named else f"of {len(chosen)} tasks, and over these,"
    return Mixture(f"mean gates {of_what} on {len(examples)} training prompts", gates)


def read_mixture(path: Path, adapted: Sequence[Experts]) -> Mixture:
    """A file's mixture.

    Raises:
        BaditError: no such file, or not a gate for every expert of every adapted module and nothing else.
    """
    content = read_json(path)
    names = [one.layer.name for one in adapted]
    for name in content:
        if name not in names:
            raise BaditError(f"{path}: {name}: the run adapts no such module{nearest(name, names)}")
    for one in adapted:
        name, experts = one.layer.name, len(one.first_components_K)
        if name not in content:
            raise BaditError(f"{path}: {name}: is missing; give it a list of {experts} gates")
        gates = content[name]
        if not isinstance(gates, list) or len(gates) != experts or not all(map(is_number, gates)):
            raise BaditError(f"{path}: {name}: must be a list of {experts} numbers, one gate for each expert")
    return Mixture(f"gates of {path}", content)
