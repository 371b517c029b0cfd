"""The atlas of abilities: which experts the tasks draw on, what is lost without each, and whose prompts it answers to.

An expert stands for an ability, and there is one of each number in every adapted module. What is said of expert k here
is said of all modules' expert k together: their mean gate, and the loss when all of them are switched off. For BADIT
they have in common that they start from the same stretch of their weights' spectra, and what training makes of that.

* similarity of two tasks: Pearson's correlation of their mean gates, each gate first centred over tasks, or what all
  tasks have in common would make every pair alike. T unrelated tasks are then at −1/(T − 1) on average, not at 0.
* losses without an expert: :mod:`badit.analysis.losses`.
* nearest prompts: every gate standardised over all prompts, then averaged over modules.

Shape suffixes: T = tasks, P = prompts, M = adapted modules, K = experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from badit.analysis.gates import Batches, PromptGates, gates_table
from badit.analysis.losses import expert_losses, losses_table
from badit.analysis.recovery import ability_recovery
from badit.analysis.summaries import abilities_table
from badit.analysis.tables import TidyTable, defined
from badit.data import Task
from badit.errors import BaditError

NEAREST = 5
SHOWN_CHARACTERS = 300
# A gate that moves less than this over all prompts has no nearest ones.
_STILL = 1e-6

Texts = Mapping[str, Sequence[tuple[str, str]]]


def ability_atlas(
    model: Any, batches: Batches, gates: PromptGates, texts: Texts, tasks: Sequence[Task], *, progress: bool = False
) -> list[TidyTable]:
    """All tables of the atlas, from as many forward passes over the batches as there are experts, and one.

    Args:
        model: in evaluation mode, with one active adapter.
        batches: what losses are measured on: by task, batches of ``input_ids``, ``attention_mask``, ``labels`` and
            ``tasks``.
        gates: of the same tasks in the same order, perhaps of more prompts.
        texts: by task, the id and the text of the gates' prompts, in their order.
        tasks: what is known of the tasks; where all have their abilities written down, they are looked for.
        progress: show a bar on stderr.

    Raises:
        BaditError: a model without experts, or texts that do not go with the gates.
    """
    losses = expert_losses(model, batches, progress=progress)
    tables = [
        gates_table(gates),
        gate_similarity(gates),
        losses_table(losses),
        nearest_prompts(gates, texts),
        abilities_table(gates, losses.change_TK, losses.error_TK),
    ]
    known = {task.name: task.abilities for task in tasks}
    if all(known.get(task) for task in gates.tasks):
        tables.append(ability_recovery(gates.tasks, similarity(gates), known))
    return tables


def similarity(gates: PromptGates) -> np.ndarray:
    """(T, T), the correlation of the tasks' gates; NaN for a task whose gates are those of the tasks' mean."""
    profiles = gates.means.reshape(len(gates.tasks), -1).astype(np.float64)
    centred = profiles - profiles.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    norm_T = np.linalg.norm(centred, axis=1)
    unit = centred / np.where(norm_T > _STILL, norm_T, np.nan)[:, None]
    return np.clip(unit @ unit.T, -1.0, 1.0)


def gate_similarity(gates: PromptGates) -> TidyTable:
    """How alike every two tasks draw on the experts."""
    index = {task: t for t, task in enumerate(gates.tasks)}
    similarity_TT = similarity(gates)
    pairs = list(combinations(sorted(index), 2))
    return TidyTable(
        name="gate_similarity",
        about=(
            "How alike two tasks draw on the experts: Pearson's correlation of their mean gates over all modules and "
            f"experts, after each gate's mean over the {len(index)} tasks is taken off. Tasks without anything in "
            f"common are at {-1 / max(1, len(index) - 1):.2f} on average."
        ),
        columns={
            "task_a": "a task's name",
            "task_b": "another's, later in the alphabet",
            "similarity": "correlation, −1 to 1; null where a task's gates do not differ from the mean",
        },
        rows=[[a, b, defined(similarity_TT[index[a], index[b]])] for a, b in pairs],
    )


def nearest_prompts(gates: PromptGates, texts: Texts) -> TidyTable:
    """The prompts that draw on each expert most, above what the other prompts do.

    Raises:
        BaditError: texts that do not go with the gates' prompts.
    """
    for task, gates_PMK in gates.by_task.items():
        if len(texts.get(task, ())) != len(gates_PMK):
            raise BaditError(f"texts: task {task} has {len(texts.get(task, ()))} for {len(gates_PMK)} prompts")
    prompts = [(task, *text) for task in gates.tasks for text in texts[task]]
    scores_PK = prompt_scores(gates)
    rows = []
    for expert, scores_P in enumerate(scores_PK.T):
        # An expert that all prompts draw on alike has none that is nearest.
        order = np.argsort(-scores_P, kind="stable")[:NEAREST] if scores_P.any() else ()
        for rank, p in enumerate(order, start=1):
            task, instance, text = prompts[p]
            rows.append([expert, rank, task, instance, float(scores_P[p]), text[:SHOWN_CHARACTERS]])
    return TidyTable(
        name="nearest_prompts",
        about=(
            f"The {NEAREST} prompts that draw on each expert most, of {len(prompts)}. A prompt's score is its gate in "
            "standard deviations over all prompts, averaged over the modules."
        ),
        columns={
            "expert": "the expert, counted from 0",
            "rank": "1 for the prompt with the highest score",
            "task": "the prompt's task",
            "instance": "the instance's id in the task",
            "score": "mean over modules of the standardised gate",
            "prompt": f"the first {SHOWN_CHARACTERS} characters of the instance's own input",
        },
        rows=rows,
    )


def prompt_scores(gates: PromptGates) -> np.ndarray:
    """(P, K), all tasks' prompts one after another: their gates standardised over prompts, averaged over modules."""
    gates_PMK = np.concatenate(list(gates.by_task.values())).astype(np.float64)
    deviation_PMK = gates_PMK - gates_PMK.mean(axis=0)
    std_MK = gates_PMK.std(axis=0)
    return np.where(std_MK > _STILL, deviation_PMK / np.where(std_MK > _STILL, std_MK, 1.0), 0.0).mean(axis=1)
