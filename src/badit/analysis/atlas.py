"""The ability atlas: which experts each task uses, and which it needs.

It has each task's gates, its loss with each expert disabled, and the prompts with the largest
gates. Expert k stands for the experts k of all adapted modules together.

Shape suffixes: T = tasks, P = prompts (of one task), M = adapted modules, K = experts, S = states
of the model (all experts, then each one disabled), R = the original order of the tasks, then
permutations, E = task pairs.
"""

from collections.abc import Collection, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from badit.analysis.gates import PromptGates, clusters_frame, gates_frame
from badit.analysis.tables import INDEX, TEXT, Column, Table
from badit.data import Instance, Task
from badit.evaluation.losses import prompt_losses
from badit.tuner.experts import AdaptedLayer, active_experts, changed_gates
from badit.tuner.model import TaskBatches

_NEAREST = 5
_SHOWN_CHARACTERS = 300
_CONSTANT = 1e-6  # a gate with a smaller deviation over all prompts or tasks counts as constant
_LEAST_SPREAD = 0.02  # of the tasks' mean gates; below it, no task stands out
_STANDARD_ERRORS = 3  # a smaller lead over the mean counts as noise
_NO_CHANGE = 0.005  # nats per token
_LEAST_LEAD = 0.25  # the largest change must exceed the mean by more than this share of the mean
_PERMUTATIONS = 10_000  # so the smallest p-value is 1 / 10,001
_SEED = 0

Prompts = Sequence[tuple[Task, Sequence[Instance]]]

GATE_SIMILARITY = Table(
    "gate_similarity",
    "task_a task_b",
    similarity="0 for unrelated tasks, 1 for equal gates; null if a task's gates equal the mean "
    "over tasks, and for fewer than three tasks",
    noise="twice the standard deviation for gates that are random and independent in every module",
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
        "correlation: between gate similarity and the Jaccard overlap of abilities, over pairs of "
        "tasks; nearest_neighbour: share of tasks whose nearest neighbour by gates shares an "
        "ability",
        TEXT,
    ),
    value="the measure; null if it is not defined",
    chance="mean of the measure over the permutations",
    p_value="share of permutations with at least this value (one-sided; the observed order counts "
    "as a permutation)",
)


def ability_atlas(
    model: Any,
    batches: TaskBatches,
    gates: PromptGates,
    prompts: Prompts,
    *,
    progress: bool = False,
) -> list[pd.DataFrame]:
    """Returns all tables of the atlas.

    They need one forward pass over the batches and another for each disabled expert. ``prompts``
    has the tasks with the instances of ``batches`` and ``gates``, in the same order.
    ``ability_recovery`` needs at least two tasks, all with known abilities.
    """
    losses_TS, errors_TK = expert_losses(model, batches, progress=progress)
    # State 0 has all experts.
    changes_TK = losses_TS[:, 1:] - losses_TS[:, :1]
    frames = [
        gates_frame(gates),
        clusters_frame(model, gates),
        gate_similarity(gates),
        _losses_frame(list(gates.by_task), losses_TS),
        nearest_prompts(gates, prompts),
        expert_abilities(gates, changes_TK, errors_TK),
    ]
    abilities = [task.abilities for task, _ in prompts]
    if len(abilities) > 1 and all(abilities):
        frames.append(ability_recovery(similarity(gates), abilities))
    return frames


def similarity(gates: PromptGates) -> np.ndarray:
    """Returns the similarities s (T, T) of the tasks' gates: 0 if unrelated, 1 if equal.

    With the correlation c of the gates' deviations from their mean over T tasks,

        s = c + (1 − c) / T.

    The T deviations sum to 0, so those of unrelated tasks with gates of equal variance correlate by
    −1 / (T − 1); s maps this to 0. NaN for a task whose gates equal the mean over tasks, and for
    fewer than three tasks, whose deviations are opposite whatever their gates are.
    """
    # What all tasks share is subtracted, because it would make every correlation large.
    profiles = gates.means.reshape(len(gates.by_task), -1).astype(np.float64)
    unit = _standardised(profiles - profiles.mean(axis=0), _CONSTANT)
    correlation_TT = np.clip(unit @ unit.T, -1.0, 1.0)
    tasks = len(correlation_TT)
    if tasks < 3:
        return np.full_like(correlation_TT, np.nan)
    return correlation_TT + (1 - correlation_TT) / tasks


def gate_similarity(gates: PromptGates) -> pd.DataFrame:
    """Returns the similarity of the gates of every two tasks."""
    tasks = list(gates.by_task)
    similarity_TT = pd.DataFrame(similarity(gates), tasks, tasks)
    _, modules, experts = gates.means.shape
    # The gates of a module have a fixed sum, so K − 1 of them are independent.
    noise = 2 / np.sqrt(modules * max(1, experts - 1))
    return GATE_SIMILARITY.frame(
        [(a, b, similarity_TT.at[a, b], noise) for a, b in combinations(sorted(tasks), 2)],
        "Pearson correlation c of two tasks' mean gates over all modules and experts, after "
        f"subtracting each gate's mean over the {len(tasks)} tasks, as c + (1 − c) / {len(tasks)}, "
        "which is 0 on average for unrelated tasks.",
    )


def nearest_prompts(gates: PromptGates, prompts: Prompts) -> pd.DataFrame:
    """Returns the prompts with the largest gates for each expert, relative to the other prompts."""
    instances = [(task.name, instance) for task, of_task in prompts for instance in of_task]
    rows = []
    for expert, scores_P in enumerate(prompt_scores(gates).T):
        # If all prompts have the same gates for an expert, it has no nearest prompts.
        if not scores_P.any():
            continue
        nearest = np.argsort(-scores_P, kind="stable")[:_NEAREST]
        for rank, p in enumerate(nearest, start=1):
            task, instance = instances[p]
            rows.append((expert, rank, task, instance.id, instance.input[:_SHOWN_CHARACTERS]))
    return NEAREST_PROMPTS.frame(
        rows,
        f"The {_NEAREST} of {len(instances)} prompts with the largest gates for each expert. A "
        "prompt's score is its gate, standardised over all prompts and averaged over the modules.",
    )


def prompt_scores(gates: PromptGates) -> np.ndarray:
    """Returns scores (P, K) of all tasks' prompts.

    They are gates standardised over prompts, then averaged over modules.
    """
    gates_PMK = np.concatenate(list(gates.by_task.values())).astype(np.float64)
    # Without standardisation, the modules with the largest deviations would decide the mean.
    deviation_PMK = gates_PMK - gates_PMK.mean(axis=0)
    std_MK = gates_PMK.std(axis=0)
    scores_PMK = deviation_PMK / np.fmax(std_MK, _CONSTANT)
    return np.where(std_MK > _CONSTANT, scores_PMK, 0.0).mean(axis=1)


def expert_losses(
    model: Any, batches: TaskBatches, *, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean losses of answer tokens with all experts and without each (T, S).

    Also returns the standard errors of the changes (T, K).
    """
    experts = active_experts(model)
    losses, errors = [], []
    tasks = tqdm(batches.values(), desc="Experts", unit="task", disable=not progress, leave=False)
    for batches_of_task in tasks:
        sums_P, counts_P = prompt_losses(model, batches_of_task)
        sums = [sums_P]
        # Disabled in all modules at once: expert k stands for the experts k of all modules.
        for expert in range(experts[0].num_experts):
            with changed_gates(experts, partial(_without, expert)):
                sums.append(prompt_losses(model, batches_of_task)[0])
        sums_SP = np.stack(sums)
        tokens = counts_P.sum()
        loss_S = sums_SP.sum(axis=1) / tokens
        losses.append(loss_S)

        # The loss per token is a ratio of two sums over prompts. Its error is computed by linear
        # approximation.
        # SE² = P / (P − 1) · Σ_p (Δ_p − Δ n_p)² / (Σ_p n_p)², with Δ_p the change of prompt p's
        # summed loss, n_p its answer tokens and Δ = Σ_p Δ_p / Σ_p n_p.
        change_K1 = (loss_S[1:] - loss_S[0])[:, None]
        residual_KP = sums_SP[1:] - sums_SP[0] - change_K1 * counts_P
        squares_K = np.square(residual_KP).sum(axis=1)
        prompts = len(counts_P)
        errors.append(np.sqrt(squares_K * prompts / max(1, prompts - 1)) / tokens)
    return np.stack(losses), np.stack(errors)


def _without(expert: int, layer: AdaptedLayer, gates: torch.Tensor) -> torch.Tensor:
    """Returns the gates (..., K) of a layer with that of one expert set to 0."""
    # The layer may keep the original for later passes.
    gates = gates.clone()
    gates[..., expert] = 0.0
    return gates


def _losses_frame(tasks: Sequence[str], losses_TS: np.ndarray) -> pd.DataFrame:
    rows = []
    for task, (loss, *losses_without) in zip(tasks, losses_TS, strict=True):
        for expert, without in enumerate(losses_without):
            rows.append((task, expert, loss, without, without - loss))
    return EXPERT_LOSSES.frame(
        rows,
        "Loss of each task with one expert's gates set to 0 in every layer and the other gates "
        "unchanged. If the expert started as a part of the pretrained weight, that part is removed "
        "too.",
    )


def expert_abilities(
    gates: PromptGates, change_TK: np.ndarray, error_TK: np.ndarray
) -> pd.DataFrame:
    """Returns a summary of each expert.

    It is made from the gates, the changes of the loss without it and their standard errors.
    """
    tasks = list(gates.by_task)
    gate_TK = gates.means.mean(axis=1)
    gate_error_TK = np.stack([_mean_error(gates_PMK) for gates_PMK in gates.by_task.values()])
    rows = []
    for expert in range(change_TK.shape[1]):
        gate_T = gate_TK[:, expert]
        spread = np.ptp(gate_T)
        drawn = []
        # With many prompts, differences too small to matter are significant too.
        if spread >= _LEAST_SPREAD:
            drawn = _standing_out(gate_T, gate_error_TK[:, expert])

        change_T = change_TK[:, expert]
        mean = change_T.mean()
        largest = change_T.max()
        hurt = []
        # If all tasks need the expert alike, none stands out.
        if largest >= _NO_CHANGE and largest - mean > _LEAST_LEAD * mean:
            hurt = _standing_out(change_T, error_TK[:, expert])
        names = (", ".join(tasks[t] for t in chosen) for chosen in (drawn, hurt))
        rows.append((expert, *names, gate_T.mean(), spread, mean))
    return ABILITIES.frame(
        rows,
        "Summary of each expert over all modules. Mean gate and change of the loss are means over "
        "all tasks.",
    )


def _mean_error(gates_PMK: np.ndarray) -> np.ndarray:
    """Returns the standard error (K) of a task's mean gates; 0 for a single prompt."""
    # Averaged over modules first: the gates of one prompt are not independent.
    gates_PK = gates_PMK.mean(axis=1)
    prompts = len(gates_PK)
    return gates_PK.std(axis=0, ddof=min(1, prompts - 1)) / np.sqrt(prompts)


def _standing_out(value_T: np.ndarray, error_T: np.ndarray) -> list[int]:
    """Returns at most two tasks that lead the mean by over half of the largest lead.

    Returns none if that lead is noise.
    """
    mean = value_T.mean()
    largest = np.argsort(-value_T, kind="stable")[:2]
    first = largest[0]
    if value_T[first] - mean < _STANDARD_ERRORS * error_T[first]:
        return []
    return [int(t) for t in largest if value_T[t] > (mean + value_T[first]) / 2]


def ability_recovery(
    similarity_TT: np.ndarray, abilities: Sequence[Collection[str]]
) -> pd.DataFrame:
    """Returns how well gates agree with known abilities.

    The p-values are Mantel's (1967), as pairs are not independent.
    """
    sets = [set(names) for names in abilities]
    # Jaccard: |A ∩ B| / |A ∪ B|.
    overlap_TT = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    tasks = np.arange(len(sets))
    # The observed order comes first, and counts as a permutation.
    copies_RT = np.tile(tasks, (_PERMUTATIONS, 1))
    permuted_RT = np.random.default_rng(_SEED).permuted(copies_RT, axis=1)
    order_RT = np.vstack([tasks, permuted_RT])

    first_E, second_E = np.triu_indices(len(tasks), k=1)
    # Mantel's test permutes tasks and not pairs: rows and columns of the overlaps together.
    overlap_RE = overlap_TT[order_RT[:, first_E], order_RT[:, second_E]]
    similarity_1E = similarity_TT[first_E, second_E][None]
    correlation_R = _standardised(overlap_RE) @ _standardised(similarity_1E)[0]

    # A task is not its own neighbour.
    others_TT = np.where(np.eye(len(tasks), dtype=bool), -np.inf, similarity_TT)
    neighbour_RT = order_RT[:, others_TT.argmax(axis=1)]
    related_R = (overlap_TT > 0)[order_RT, neighbour_RT].mean(axis=1)
    # argmax takes NaN for the maximum, so no nearest neighbour is known.
    if np.isnan(others_TT).any():
        related_R = np.full(len(order_RT), np.nan)

    rows = []
    for name, value_R in {"correlation": correlation_R, "nearest_neighbour": related_R}.items():
        value = value_R[0]
        p_value = np.nan
        if not np.isnan(value):
            # Equal values may differ by rounding.
            p_value = (value_R >= value - 1e-9).mean()
        rows.append((name, value, value_R[1:].mean(), p_value))
    return ABILITY_RECOVERY.frame(
        rows,
        f"Whether tasks that share known abilities have similar gates, over {len(tasks)} tasks, "
        f"compared with {_PERMUTATIONS} permutations of the tasks (seed {_SEED}). The "
        "correlation's p-value is from Mantel's test.",
    )


def _standardised(values_RE: np.ndarray, constant: float = 1e-12) -> np.ndarray:
    """Returns rows with mean 0 and norm 1, whose dot products are correlations.

    NaN for constant rows.
    """
    centred_RE = values_RE - values_RE.mean(axis=1, keepdims=True)
    norm_R1 = np.linalg.norm(centred_RE, axis=1, keepdims=True)
    return centred_RE / np.where(norm_R1 > constant, norm_R1, np.nan)
