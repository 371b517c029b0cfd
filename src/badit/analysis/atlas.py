"""The ability atlas: each task's gates, its loss with each expert disabled, and the prompts with the largest gates.

Expert k stands for the experts k of all adapted modules together.

Shape suffixes: T = tasks, P = prompts (of one task), M = adapted modules, K = experts, S = states of the model (all
experts, then each one disabled), R = the original order of the tasks, then permutations, E = task pairs.
"""

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from badit.analysis.gates import PromptGates, active_experts, changed_gates, gates_frame
from badit.analysis.tables import INDEX, TEXT, Column, Table
from badit.data import Instance, Task
from badit.evaluation.losses import prompt_losses
from badit.tuner.model import TaskBatches

_NEAREST = 5
_SHOWN_CHARACTERS = 300
_CONSTANT = 1e-6  # a gate with a smaller deviation over all prompts or tasks counts as constant
_LEAST_SPREAD = 0.02
_STANDARD_ERRORS = 3
_NO_CHANGE = 0.005  # nats per token
_LEAST_LEAD = 0.25  # the largest change must exceed the mean by more than this share of the mean
_PERMUTATIONS, _SEED = 10_000, 0

Prompts = Sequence[tuple[Task, Sequence[Instance]]]

GATE_SIMILARITY = Table(
    "gate_similarity",
    "task_a task_b",
    similarity="correlation, −1 to 1; null if a task's gates equal the mean over tasks",
)
EXPERT_LOSSES = Table(
    "expert_losses",
    "task expert",
    loss="mean loss over the task's answer tokens with all experts, in nats",
    loss_without="the same with the expert disabled",
    change="loss_without minus loss, in nats per token",
)
NEAREST_PROMPTS = Table(
    "nearest_prompts",
    "expert rank task",
    rank=Column("1 for the prompt with the highest score", INDEX),
    instance=Column("the instance's id in the task", TEXT),
    score="mean over modules of the standardised gate",
    prompt=Column(f"the first {_SHOWN_CHARACTERS} characters of the instance's own input", TEXT),
)
ABILITIES = Table(
    "abilities",
    "expert",
    tasks=Column("the tasks with the largest mean gates; empty if no task stands out", TEXT),
    hurt_most=Column(
        "the tasks whose loss rises most with the expert disabled; empty if no task stands out",
        TEXT,
    ),
    mean_gate="mean gate over tasks; 1 is neutral",
    spread="the largest of the tasks' mean gates minus the smallest",
    change="mean over tasks of the loss with the expert disabled minus the loss, in nats per token",
)
ABILITY_RECOVERY = Table(
    "ability_recovery",
    measure=Column(
        "correlation: between gate similarity and the Jaccard overlap of abilities, over pairs of tasks; "
        "nearest_neighbour: share of tasks whose nearest neighbour by gates shares an ability",
        TEXT,
    ),
    value="the measure; null if it is not defined",
    chance="mean of the measure over the permutations",
    p_value="share of permutations with at least this value (one-sided; the observed order counts as a permutation)",
)


def ability_atlas(
    model: Any,
    batches: TaskBatches,
    gates: PromptGates,
    prompts: Prompts,
    *,
    progress: bool = False,
) -> list[pd.DataFrame]:
    """Returns all tables of the atlas, from one forward pass over the batches and another for each disabled expert.

    ``prompts`` has the tasks with the instances of ``batches`` and ``gates``, in the same order. ``ability_recovery``
    needs at least two tasks, all with known abilities.
    """
    losses_TS, errors_TK = expert_losses(model, batches, progress=progress)
    losses_frame = EXPERT_LOSSES.frame(
        [
            (task, expert, loss, without, without - loss)
            for task, (loss, *others) in zip(gates.by_task, losses_TS, strict=True)
            for expert, without in enumerate(others)
        ],
        "Loss of each task with one expert's gates set to 0 in every layer and the other gates unchanged. If the "
        "expert started as a part of the pretrained weight, that part is removed too.",
    )
    summary = expert_abilities(gates, losses_TS[:, 1:] - losses_TS[:, :1], errors_TK)
    frames = [
        gates_frame(gates),
        gate_similarity(gates),
        losses_frame,
        nearest_prompts(gates, prompts),
        summary,
    ]
    abilities = [task.abilities for task, _ in prompts]
    if len(abilities) > 1 and all(abilities):
        frames.append(ability_recovery(similarity(gates), abilities))
    return frames


def similarity(gates: PromptGates) -> np.ndarray:
    """Returns the correlations (T, T) of the tasks' gates; NaN for a task whose gates equal the mean over tasks."""
    profiles = gates.means.reshape(len(gates.by_task), -1).astype(np.float64)
    unit = _standardised(profiles - profiles.mean(axis=0), _CONSTANT)
    return np.clip(unit @ unit.T, -1.0, 1.0)


def gate_similarity(gates: PromptGates) -> pd.DataFrame:
    """Returns the similarity of the gates of every two tasks."""
    tasks = list(gates.by_task)
    similarity_TT = pd.DataFrame(similarity(gates), tasks, tasks)
    return GATE_SIMILARITY.frame(
        [(a, b, similarity_TT.at[a, b]) for a, b in combinations(sorted(tasks), 2)],
        f"Pearson correlation of two tasks' mean gates over all modules and experts, after subtracting each gate's "
        f"mean over the {len(tasks)} tasks. Unrelated tasks are at {-1 / max(1, len(tasks) - 1):.2f} on average.",
    )


def nearest_prompts(gates: PromptGates, prompts: Prompts) -> pd.DataFrame:
    """Returns the prompts with the largest gates for each expert, relative to the other prompts."""
    about = [(task.name, instance) for task, instances in prompts for instance in instances]
    rows = []
    for expert, scores_P in enumerate(prompt_scores(gates).T):
        # If all prompts have the same gates for an expert, it has no nearest prompts.
        nearest = np.argsort(-scores_P, kind="stable")[:_NEAREST] if scores_P.any() else ()
        for rank, p in enumerate(nearest, start=1):
            task, instance = about[p]
            rows.append(
                (expert, rank, task, instance.id, scores_P[p], instance.input[:_SHOWN_CHARACTERS])
            )
    return NEAREST_PROMPTS.frame(
        rows,
        f"The {_NEAREST} of {len(about)} prompts with the largest gates for each expert. A prompt's score is its "
        "gate, standardised over all prompts and averaged over the modules.",
    )


def prompt_scores(gates: PromptGates) -> np.ndarray:
    """Returns scores (P, K) of all tasks' prompts: gates standardised over prompts, then averaged over modules."""
    gates_PMK = np.concatenate(list(gates.by_task.values())).astype(np.float64)
    deviation_PMK, std_MK = gates_PMK - gates_PMK.mean(axis=0), gates_PMK.std(axis=0)
    return np.where(std_MK > _CONSTANT, deviation_PMK / np.fmax(std_MK, _CONSTANT), 0.0).mean(
        axis=1
    )


def expert_losses(
    model: Any, batches: TaskBatches, *, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean losses of answer tokens with all experts and without each (T, S), and the changes' errors (T, K)."""
    experts = active_experts(model)
    estimates = []
    for of_task in tqdm(
        batches.values(), desc="Experts", unit="task", disable=not progress, leave=False
    ):
        passes = []
        for off in range(-1, experts[0].number):  # −1 disables no expert
            off_K = torch.arange(experts[0].number, device=model.device) == off
            with changed_gates(
                experts, lambda one, gates, off_K=off_K: gates.masked_fill(off_K, 0.0)
            ):
                passes.append(prompt_losses(model, of_task))
        sums_SP, counts_P = np.stack([sums_P for sums_P, _ in passes]), passes[0][1]
        tokens, prompts = counts_P.sum(), len(counts_P)
        loss_S = sums_SP.sum(axis=1) / tokens
        # The loss per token is a ratio of two sums over prompts. Its error is computed by linear approximation.
        residual_KP = sums_SP[1:] - sums_SP[0] - (loss_S[1:] - loss_S[0])[:, None] * counts_P
        squares_K = np.square(residual_KP).sum(axis=1)
        estimates.append((loss_S, np.sqrt(squares_K * prompts / max(1, prompts - 1)) / tokens))
    return np.stack([loss_S for loss_S, _ in estimates]), np.stack(
        [error_K for _, error_K in estimates]
    )


def expert_abilities(
    gates: PromptGates, change_TK: np.ndarray, error_TK: np.ndarray
) -> pd.DataFrame:
    """Returns a summary of each expert from the gates, the changes of the loss without it and their standard errors."""
    rows, tasks = [], list(gates.by_task)
    for expert in range(change_TK.shape[1]):
        gate_T, change_T, error_T = (
            gates.means.mean(axis=1)[:, expert],
            change_TK[:, expert],
            error_TK[:, expert],
        )
        of_prompts = [gates_PMK.mean(axis=1)[:, expert] for gates_PMK in gates.by_task.values()]
        gate_error_T = np.array(
            [g_P.std(ddof=min(1, len(g_P) - 1)) / np.sqrt(len(g_P)) for g_P in of_prompts]
        )
        drawn = _standing_out(gate_T, gate_error_T) if np.ptp(gate_T) >= _LEAST_SPREAD else []
        mean, most = change_T.mean(), change_T.max()
        hurt = (
            _standing_out(change_T, error_T)
            if most >= _NO_CHANGE and most - mean > _LEAST_LEAD * mean
            else []
        )
        names = (", ".join(tasks[t] for t in named) for named in (drawn, hurt))
        rows.append((expert, *names, gate_T.mean(), np.ptp(gate_T), mean))
    about = "Summary of each expert over all modules. Mean gate and change of the loss are means over all tasks."
    return ABILITIES.frame(rows, about)


def _standing_out(value_T: np.ndarray, error_T: np.ndarray) -> list[int]:
    """Returns at most two tasks that lead the mean by over half of the largest lead; none if that lead is noise."""
    first, mean = np.argsort(-value_T, kind="stable")[:2], value_T.mean()
    if value_T[first[0]] - mean < _STANDARD_ERRORS * error_T[first[0]]:
        return []
    return [int(t) for t in first if value_T[t] > (mean + value_T[first[0]]) / 2]


def ability_recovery(
    similarity_TT: np.ndarray, abilities: Sequence[Collection[str]]
) -> pd.DataFrame:
    """Returns how well gates agree with known abilities; p-values are Mantel's (1967), as pairs are not independent."""
    tasks, sets = np.arange(len(abilities)), [set(each) for each in abilities]
    overlap_TT = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    order_RT = np.random.default_rng(_SEED).permuted(np.tile(tasks, (_PERMUTATIONS, 1)), axis=1)
    order_RT = np.vstack([tasks, order_RT])
    first_E, second_E = np.triu_indices(len(tasks), k=1)
    overlap_RE = overlap_TT[order_RT[:, first_E], order_RT[:, second_E]]
    correlation_R = (
        _standardised(overlap_RE) @ _standardised(similarity_TT[first_E, second_E][None])[0]
    )
    others_TT = np.where(np.eye(len(tasks), dtype=bool), -np.inf, similarity_TT)
    related_R = (overlap_TT > 0)[order_RT, order_RT[:, others_TT.argmax(axis=1)]].mean(axis=1)
    if np.isnan(others_TT).any():
        related_R = np.full(len(order_RT), np.nan)
    # Equal values may differ by rounding.
    rows = [
        (
            name,
            v_R[0],
            v_R[1:].mean(),
            np.nan if np.isnan(v_R[0]) else (v_R >= v_R[0] - 1e-9).mean(),
        )
        for name, v_R in (("correlation", correlation_R), ("nearest_neighbour", related_R))
    ]
    return ABILITY_RECOVERY.frame(
        rows,
        f"Whether tasks that share known abilities have similar gates, over {len(tasks)} tasks, compared with "
        f"{_PERMUTATIONS} permutations of the tasks (seed {_SEED}). The correlation's p-value is from Mantel's test.",
    )


def _standardised(values_RE: np.ndarray, constant: float = 1e-12) -> np.ndarray:
    """Returns rows with mean 0 and norm 1, whose dot products are correlations; NaN for constant rows."""
    centred_RE = values_RE - values_RE.mean(axis=1, keepdims=True)
    norm_R1 = np.linalg.norm(centred_RE, axis=1, keepdims=True)
    return centred_RE / np.where(norm_R1 > constant, norm_R1, np.nan)
