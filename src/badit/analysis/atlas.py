"""The atlas of abilities: which experts the tasks draw on, what is lost without each, and whose prompts it answers to.

An expert stands for an ability, and there is one of each number in every adapted module. What is said of expert k here
is said of all modules' expert k together: their mean gate, and the loss when all of them are switched off. For BADIT
they have in common that they start from the same stretch of their weights' spectra, and what training makes of that.

* similarity of two tasks: Pearson's correlation of their mean gates, each gate first centred over tasks, or what all
  tasks have in common would make every pair alike. T unrelated tasks are then at −1/(T − 1) on average, not at 0.
* losses without an expert: its gates are 0. The other gates are not raised to make up for it, and the initial factors
  of a method that starts from the pretrained weight stay subtracted, so that with the expert goes its share of that
  weight.
* nearest prompts: every gate standardised over all prompts, then averaged over modules.
* abilities: for every expert, a sentence that names at most two tasks that draw on it most and two that lose most
  without it, those beyond the mean over tasks by more than half of what the first is. It names none where the tasks'
  gates lie within 0.02 of one another, or where the first task is ahead of the mean by less than three standard errors.
* recovery: whether gates find the abilities that tasks are known to share, which only the built-in suite can tell.

Shape suffixes: T = tasks, P = prompts (of one task), M = adapted modules, K = experts, L = answer tokens, S = states of
the model (with all experts, then without each of them), R = permutations, E = pairs of tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from badit.analysis.gates import Batches, Experts, PromptGates, active_experts, changed_gates, gates_frame
from badit.analysis.tables import EXPERT_NUMBER, INDEX, TASK, TASK_A, TASK_B, TEXT, Column, Table
from badit.data import Task, on_device
from badit.trainer import answer_losses

NEAREST = 5
SHOWN_CHARACTERS = 300
# A gate whose deviation is smaller than this over all prompts or tasks counts as constant.
_CONSTANT = 1e-6

Texts = Mapping[str, Sequence[tuple[str, str]]]

GATE_SIMILARITY = Table(
    "gate_similarity",
    task_a=TASK_A,
    task_b=TASK_B,
    similarity=Column("correlation, −1 to 1; null where a task's gates do not differ from the mean"),
)
EXPERT_LOSSES = Table(
    "expert_losses",
    task=TASK,
    expert=EXPERT_NUMBER._replace(meaning="the expert switched off, counted from 0"),
    loss=Column("mean loss over the task's answer tokens with all experts, in nats"),
    loss_without=Column("the same without the expert"),
    change=Column("loss_without minus loss, in nats per token"),
)
NEAREST_PROMPTS = Table(
    "nearest_prompts",
    expert=EXPERT_NUMBER,
    rank=Column("1 for the prompt with the highest score", INDEX),
    task=TASK._replace(meaning="the prompt's task"),
    instance=Column("the instance's id in the task", TEXT),
    score=Column("mean over modules of the standardised gate"),
    prompt=Column(f"the first {SHOWN_CHARACTERS} characters of the instance's own input", TEXT),
)
ABILITIES = Table(
    "abilities",
    expert=EXPERT_NUMBER,
    tasks=Column("the tasks that draw on it most; empty where none stands out", TEXT),
    hurt_most=Column("the tasks whose loss rises most without it; empty where none stands out", TEXT),
    mean_gate=Column("mean gate over tasks; 1 is neutral"),
    spread=Column("the largest of the tasks' mean gates minus the smallest"),
    change=Column("mean over tasks of the loss without it minus the loss, in nats per token"),
    summary=Column("both in a sentence", TEXT),
)
ABILITY_RECOVERY = Table(
    "ability_recovery",
    measure=Column(
        "correlation: of gate similarity with the Jaccard overlap of abilities, over pairs of tasks; "
        "nearest_neighbour: share of tasks whose nearest neighbour by gates shares an ability",
        TEXT,
    ),
    value=Column("the measure; null where it is not defined"),
    chance=Column("its mean over the permutations"),
    p_value=Column("share of permutations that reach the value (one-sided, the observed one counted as well)"),
)


def ability_atlas(
    model: Any, batches: Batches, gates: PromptGates, texts: Texts, tasks: Sequence[Task], *, progress: bool = False
) -> list[pd.DataFrame]:
    """All tables of the atlas, from as many forward passes over the batches as there are experts, and one.

    Args:
        model: in evaluation mode, with one active adapter.
        batches: what losses are measured on: by task, batches of ``input_ids``, ``attention_mask``, ``labels`` and
            ``tasks``.
        gates: of the same tasks in the same order, perhaps of more prompts.
        texts: by task, the id and the text of the gates' prompts, in their order.
        tasks: what is known of the tasks; ability_recovery is measured where all have their abilities written down.
        progress: show a bar on stderr.

    Raises:
        BaditError: a model without experts.
    """
    losses_TS, errors_TK = expert_losses(model, batches, progress=progress)
    frames = [
        gates_frame(gates),
        gate_similarity(gates),
        losses_frame(gates.tasks, losses_TS),
        nearest_prompts(gates, texts),
        expert_abilities(gates, losses_TS[:, 1:] - losses_TS[:, :1], errors_TK),
    ]
    known = {task.name: task.abilities for task in tasks}
    if all(known.get(task) for task in gates.tasks):
        frames.append(ability_recovery(similarity(gates), [known[task] for task in gates.tasks]))
    return frames


# --- similarity of tasks, and the prompts nearest to an expert ---


def similarity(gates: PromptGates) -> np.ndarray:
    """(T, T), the correlation of the tasks' gates; NaN for a task whose gates are those of the tasks' mean."""
    profiles = gates.means.reshape(len(gates.tasks), -1).astype(np.float64)
    centred = profiles - profiles.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    norm_T = np.linalg.norm(centred, axis=1)
    unit = centred / np.where(norm_T > _CONSTANT, norm_T, np.nan)[:, None]
    return np.clip(unit @ unit.T, -1.0, 1.0)


def gate_similarity(gates: PromptGates) -> pd.DataFrame:
    """How alike every two tasks draw on the experts."""
    similarity_TT = pd.DataFrame(similarity(gates), gates.tasks, gates.tasks)
    tasks = len(gates.tasks)
    return GATE_SIMILARITY.frame(
        [(a, b, similarity_TT.at[a, b]) for a, b in combinations(sorted(gates.tasks), 2)],
        "How alike two tasks draw on the experts: Pearson's correlation of their mean gates over all modules and "
        f"experts, after each gate's mean over the {tasks} tasks is taken off. Tasks without anything in common are at "
        f"{-1 / max(1, tasks - 1):.2f} on average.",
    )


def nearest_prompts(gates: PromptGates, texts: Texts) -> pd.DataFrame:
    """The prompts that draw on each expert most, above what the other prompts do."""
    prompts = [(task, *text) for task in gates.tasks for text in texts[task]]
    rows = []
    for expert, scores_P in enumerate(prompt_scores(gates).T):
        # An expert that all prompts draw on alike has none that is nearest.
        order = np.argsort(-scores_P, kind="stable")[:NEAREST] if scores_P.any() else ()
        for rank, p in enumerate(order, start=1):
            task, instance, text = prompts[p]
            rows.append((expert, rank, task, instance, scores_P[p], text[:SHOWN_CHARACTERS]))
    return NEAREST_PROMPTS.frame(
        rows,
        f"The {NEAREST} prompts that draw on each expert most, of {len(prompts)}. A prompt's score is its gate in "
        "standard deviations over all prompts, averaged over the modules.",
    )


def prompt_scores(gates: PromptGates) -> np.ndarray:
    """(P, K), all tasks' prompts one after another: their gates standardised over prompts, averaged over modules."""
    gates_PMK = np.concatenate(list(gates.by_task.values())).astype(np.float64)
    deviation_PMK, std_MK = gates_PMK - gates_PMK.mean(axis=0), gates_PMK.std(axis=0)
    return np.where(std_MK > _CONSTANT, deviation_PMK / np.where(std_MK > _CONSTANT, std_MK, 1.0), 0.0).mean(axis=1)


# --- losses without an expert ---


@torch.no_grad()
def expert_losses(model: Any, batches: Batches, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What every task's loss is without each expert.

    Args:
        model: in evaluation mode, with one active adapter.
        batches: as for :func:`badit.analysis.gates.prompt_gates`.
        progress: show a bar on stderr.

    Returns:
        Each task's mean loss over its answer tokens, in nats, with all experts and then without each of them (T, S);
        and the standard errors of the changes (T, K), as far as they come from the choice of prompts.
    """
    experts = active_experts(model)
    states = (None, *range(experts[0].number))
    estimates = []
    with tqdm(total=len(batches) * len(states), desc="Experts", unit="pass", disable=not progress, leave=False) as bar:
        for of_task in batches.values():
            passes = []
            for expert in states:
                with changed_gates(experts, _without(expert)):
                    passes.append(_prompt_losses(model, of_task))
                bar.update()
            estimates.append(_per_token(np.stack([sums_P for sums_P, _ in passes]), passes[0][1]))
    losses_TS, errors_TK = (np.stack(values) for values in zip(*estimates, strict=True))
    return losses_TS, errors_TK


def losses_frame(tasks: Sequence[str], losses_TS: np.ndarray) -> pd.DataFrame:
    """What every task loses without each expert."""
    experts = pd.DataFrame({"expert": range(losses_TS.shape[1] - 1)})
    rows = pd.DataFrame({"task": tasks, "loss": losses_TS[:, 0]}).merge(experts, how="cross")
    rows["loss_without"] = losses_TS[:, 1:].ravel()
    return EXPERT_LOSSES.frame(
        rows.assign(change=rows["loss_without"] - rows["loss"]),
        "What each task's loss becomes when an expert is switched off: its gates are 0 in every layer, the other gates "
        "stay as the routers have them. Of an expert that started as a part of the pretrained weight, that part goes "
        "too.",
    )


def _without(expert: int | None) -> Callable[[Experts, torch.Tensor], torch.Tensor]:
    def switched_off(one: Experts, gates: torch.Tensor) -> torch.Tensor:
        return gates if expert is None else gates.masked_fill(one.expert_of_N == expert, 0.0)

    return switched_off


def _prompt_losses(model: Any, of_task: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(P) each: the sum of the losses of a prompt's answer tokens, and their number."""
    sums, counts = [], []
    for batch in of_task:
        losses_L, row_L, _ = answer_losses(model, on_device(batch, model.device), model)
        row_L, rows = row_L.cpu(), len(batch["input_ids"])
        sums.append(row_L.bincount(losses_L.cpu().double(), minlength=rows))
        counts.append(row_L.bincount(minlength=rows))
    return torch.cat(sums).numpy(), torch.cat(counts).numpy()


def _per_token(sums_SP: np.ndarray, counts_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The losses per token (S) of all states, and the standard errors (K) of the changes from the first state.

    A loss per token is a ratio of two sums over prompts; the error is that of its linear approximation. A single prompt
    tells nothing of it, and gets 0.
    """
    tokens, prompts = counts_P.sum(), len(counts_P)
    loss_S = sums_SP.sum(axis=1) / tokens
    change_K = loss_S[1:] - loss_S[0]
    residual_KP = sums_SP[1:] - sums_SP[0] - change_K[:, None] * counts_P
    return loss_S, np.sqrt(np.square(residual_KP).sum(axis=1) * prompts / max(1, prompts - 1)) / tokens


# --- what an expert is for, in a sentence ---

_NAMED = 2
_ALIKE_GATES = 0.02
_STANDARD_ERRORS = 3
_NO_CHANGE = 0.005  # nats per token
_ALIKE_CHANGES = 0.25  # how far the first may be ahead of the mean, in means


def expert_abilities(gates: PromptGates, change_TK: np.ndarray, error_TK: np.ndarray) -> pd.DataFrame:
    """A summary of every expert.

    Args:
        gates: the tasks' prompts.
        change_TK: by task (in the gates' order) and expert, by how much the loss rises without the expert.
        error_TK: the standard errors of that.
    """
    gate_TK, gate_error_TK = gates.means.mean(axis=1), np.stack([*map(_standard_errors, gates.by_task.values())])
    rows = []
    for expert, (gate_T, change_T) in enumerate(zip(gate_TK.T, change_TK.T, strict=True)):
        drawn, hurt = _standing_out(gate_T, gate_error_TK[:, expert]), _standing_out(change_T, error_TK[:, expert])
        if np.ptp(gate_T) < _ALIKE_GATES:
            drawn = drawn[:0]
        mean, most = change_T.mean(), change_T.max()
        if most < _NO_CHANGE or most - mean <= _ALIKE_CHANGES * mean:
            hurt = hurt[:0]
        names = [[gates.tasks[t] for t in chosen] for chosen in (drawn, hurt)]
        numbers = (gate_T.mean(), np.ptp(gate_T), mean)
        summary = f"{_on_gates(names[0], gate_T, drawn)} {_on_losses(names[1], change_T, hurt)}"
        rows.append((expert, *map(", ".join, names), *numbers, summary))
    return ABILITIES.frame(
        rows,
        "What each expert is for, over all modules together: gates are means over modules, losses those with the "
        "expert switched off in every layer. Where several tasks are named, a number is their mean.",
    )


def _standard_errors(gates_PMK: np.ndarray) -> np.ndarray:
    """(K): of the mean over a task's prompts; 0 for a single prompt, which tells nothing of it."""
    gates_PK = gates_PMK.mean(axis=1)
    return gates_PK.std(axis=0, ddof=min(1, len(gates_PK) - 1)) / np.sqrt(len(gates_PK))


def _standing_out(value_T: np.ndarray, error_T: np.ndarray) -> np.ndarray:
    """The first few tasks, by value, that are beyond the mean by more than half of what the first is.

    None, if the first is ahead of the mean by less than a few standard errors.
    """
    first, mean = np.argsort(-value_T, kind="stable")[:_NAMED], value_T.mean()
    if value_T[first[0]] - mean < _STANDARD_ERRORS * error_T[first[0]]:
        return first[:0]
    return first[value_T[first] > (mean + value_T[first[0]]) / 2]


def _on_gates(tasks: Sequence[str], gate_T: np.ndarray, drawn: np.ndarray) -> str:
    mean = f"{gate_T.mean():.2f}"
    if len(gate_T) == 1:
        return f"Its gate is {mean} on the one task."
    if not tasks:
        return f"All tasks draw on it alike (gate {mean}, spread {_amount(np.ptp(gate_T))})."
    return f"Drawn on most by {_joined(tasks)} (gate {gate_T[drawn].mean():.2f} against {mean} on average)."


def _on_losses(tasks: Sequence[str], change_T: np.ndarray, hurt: np.ndarray) -> str:
    mean = change_T.mean()
    if np.abs(change_T).max() < _NO_CHANGE:
        return f"Without it no task's loss changes by {_NO_CHANGE} nats a token."
    overall = f"{'rises' if mean >= 0 else 'falls'} by {_amount(abs(mean))}"
    if not tasks:
        whose, end = ("that task", "") if len(change_T) == 1 else ("all tasks", " on average")
        return f"Without it the loss of {whose} {overall} nats a token{end}."
    others = f"of all tasks by {_amount(mean)}" if mean >= 0 else f"while that of all tasks {overall}"
    rise = _amount(change_T[hurt].mean())
    return f"Without it the loss of {_joined(tasks)} rises by {rise} nats a token, {others}."


def _joined(tasks: Sequence[str]) -> str:
    """The tasks' names as words: task363_sst2_polarity → 363 sst2 polarity."""
    return " and ".join(re.sub(r"^task(?=\d)", "", task).replace("_", " ") for task in tasks)


def _amount(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.3f}"


# --- whether gates recover the abilities that tasks are known to share ---


def ability_recovery(
    similarity_TT: np.ndarray, abilities: Sequence[Collection[str]], *, permutations: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """How well the similarity of the tasks' gates agrees with the abilities that they are known to need.

    Two measures, each against what it would be if abilities were given to the tasks at random (abilities stay together
    as sets, so that their sizes and overlaps are those of the suite):

    * correlation, over pairs of tasks, of the gates' similarity with the Jaccard overlap of the tasks' abilities. Pairs
      that share a task are no independent measurements, so the p-value is that of Mantel's test (Mantel 1967, Cancer
      Research 27), which permutes tasks and not pairs;
    * the share of tasks whose nearest neighbour by gates shares an ability with them.

    Args:
        similarity_TT: symmetric; the diagonal is not read.
        abilities: of every task, at least one.
        permutations: of the tasks, from which chance and p-value are taken.
        seed: of the permutations.
    """
    tasks = len(abilities)
    overlap_TT = np.array([[len(set(a) & set(b)) / len(set(a) | set(b)) for b in abilities] for a in abilities])
    orders_RT = np.random.default_rng(seed).permuted(np.tile(np.arange(tasks), (permutations, 1)), axis=1)
    measures = {
        "correlation": _correlations(similarity_TT, overlap_TT, orders_RT),
        "nearest_neighbour": _neighbour_shares(similarity_TT, overlap_TT, orders_RT),
    }
    return ABILITY_RECOVERY.frame(
        [(measure, *_tested(values)) for measure, values in measures.items()],
        f"Whether tasks that are known to share abilities draw on the experts alike, over {tasks} tasks. Chance and p "
        f"come from {permutations} permutations of the tasks (seed {seed}); the correlation's p is Mantel's test.",
    )


def _correlations(similarity_TT: np.ndarray, overlap_TT: np.ndarray, orders_RT: np.ndarray) -> np.ndarray:
    """Pearson's, over pairs: as observed, then for every permutation of the abilities (1 + R)."""
    first_E, second_E = np.triu_indices(len(similarity_TT), k=1)
    if len(first_E) < 2:
        return np.full(1 + len(orders_RT), np.nan)
    similarity_E = _standardised(similarity_TT[first_E, second_E])
    # Permuting tasks only reorders the pairs, so mean and deviation of the overlaps stay.
    standard_TT = np.zeros_like(overlap_TT)
    standard_TT[first_E, second_E] = _standardised(overlap_TT[first_E, second_E])
    standard_TT += standard_TT.T
    permuted_RE = standard_TT[orders_RT[:, first_E], orders_RT[:, second_E]]
    observed = standard_TT[first_E, second_E] @ similarity_E
    return np.concatenate([[observed], permuted_RE @ similarity_E])


def _standardised(values_E: np.ndarray) -> np.ndarray:
    """With mean 0 and sum of squares 1, so that a product of two is their correlation; NaN where all are equal."""
    centred_E = values_E - values_E.mean()
    norm = np.linalg.norm(centred_E)
    return centred_E / norm if norm > 1e-12 else np.full_like(values_E, np.nan)


def _neighbour_shares(similarity_TT: np.ndarray, overlap_TT: np.ndarray, orders_RT: np.ndarray) -> np.ndarray:
    """The share of tasks with a related nearest neighbour: as observed, then for every permutation (1 + R)."""
    tasks = len(similarity_TT)
    if tasks < 2 or not np.isfinite(similarity_TT[~np.eye(tasks, dtype=bool)]).all():
        return np.full(1 + len(orders_RT), np.nan)
    others_TT = similarity_TT.copy()
    np.fill_diagonal(others_TT, -np.inf)
    nearest_T = others_TT.argmax(axis=1)
    related_TT = overlap_TT > 0
    observed = related_TT[np.arange(tasks), nearest_T].mean()
    return np.concatenate([[observed], related_TT[orders_RT, orders_RT[:, nearest_T]].mean(axis=1)])


def _tested(values: np.ndarray) -> tuple[float, float, float]:
    """Value, chance and p-value; equal values may differ by rounding."""
    observed, permuted_R = values[0], values[1:]
    if not np.isfinite(values).all():
        return np.nan, np.nan, np.nan
    reached = (permuted_R >= observed - 1e-9).sum()
    return observed, permuted_R.mean(), (1 + reached) / (1 + len(permuted_R))
