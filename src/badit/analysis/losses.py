"""What is lost without an expert: the tasks' losses with it switched off, in all layers at once.

Switched off means that its gates are 0. The other gates are not raised to make up for it, and the initial factors of a
method that starts from the pretrained weight stay subtracted, so that with the expert goes its share of that weight.

Shape suffixes: T = tasks, P = prompts of one task, L = answer tokens, K = experts, S = states of the model: with all
experts, then without each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from badit.analysis.gates import Batches, Experts, active_experts, changed_gates
from badit.analysis.tables import TidyTable
from badit.data import on_device
from badit.trainer import answer_losses

# The number that no expert has: without it, all are there.
_NONE = -1


@dataclass(frozen=True)
class ExpertLosses:
    """Each task's mean loss over its answer tokens, in nats: with all experts, and without each of them.

    ``error_TK`` is the standard error of the change, as far as it comes from the choice of prompts.
    """

    tasks: Sequence[str]
    loss_T: np.ndarray
    without_TK: np.ndarray
    error_TK: np.ndarray

    @property
    def change_TK(self) -> np.ndarray:
        return self.without_TK - self.loss_T[:, None]


@torch.no_grad()
def expert_losses(model: Any, batches: Batches, *, progress: bool = False) -> ExpertLosses:
    """What every task's loss is without each expert.

    Args:
        model: in evaluation mode, with one active adapter.
        batches: as for :func:`badit.analysis.gates.prompt_gates`.
        progress: show a bar on stderr.
    """
    experts = active_experts(model)
    states = range(_NONE, experts[0].number)
    sums: dict[str, list[np.ndarray]] = {task: [] for task in batches}
    counts: dict[str, np.ndarray] = {}
    steps = [(task, state) for task in batches for state in states]
    for task, state in tqdm(steps, desc="Experts", unit="pass", disable=not progress, leave=False):
        with changed_gates(experts, _without(state)):
            sums_P, counts[task] = _prompt_losses(model, batches[task])
        sums[task].append(sums_P)
    estimates = [_ratios(np.stack(sums[task]), counts[task]) for task in batches]
    losses_TS, errors_TK = (np.stack(values) for values in zip(*estimates, strict=True))
    return ExpertLosses(list(batches), losses_TS[:, 0], losses_TS[:, 1:], errors_TK)


def losses_table(losses: ExpertLosses) -> TidyTable:
    """What every task loses without each expert."""
    values = zip(losses.tasks, losses.loss_T, losses.without_TK, losses.change_TK, strict=True)
    return TidyTable(
        name="expert_losses",
        about=(
            "What each task's loss becomes when an expert is switched off: its gates are 0 in every layer, the other "
            "gates stay as the routers have them. Of an expert that started as a part of the pretrained weight, that "
            "part goes too."
        ),
        columns={
            "task": "the task's name",
            "expert": "the expert switched off, counted from 0",
            "loss": "mean loss over the task's answer tokens with all experts, in nats",
            "loss_without": "the same without the expert",
            "change": "loss_without minus loss, in nats a token",
        },
        rows=[
            [task, expert, float(loss), float(without), float(change)]
            for task, loss, without_K, change_K in values
            for expert, (without, change) in enumerate(zip(without_K, change_K, strict=True))
        ],
    )


def _prompt_losses(model: Any, of_task: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(P) each: the sum of the losses of a prompt's answer tokens, and their number."""
    sums, counts = [], []
    for batch in of_task:
        losses_L, row_L, _ = answer_losses(model, on_device(batch, model.device), model)
        row_L, rows = row_L.cpu(), len(batch["input_ids"])
        sums.append(row_L.bincount(losses_L.cpu().double(), minlength=rows))
        counts.append(row_L.bincount(minlength=rows))
    return torch.cat(sums).numpy(), torch.cat(counts).numpy()


def _ratios(sums_SP: np.ndarray, counts_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The losses a token (S) of all states, and the standard errors (K) of the changes from the first state.

    A loss a token is a ratio of two sums over prompts; the error is that of its linear approximation. A single prompt
    tells nothing of it, and gets 0.
    """
    tokens, prompts = counts_P.sum(), len(counts_P)
    loss_S = sums_SP.sum(axis=1) / tokens
    change_K = loss_S[1:] - loss_S[0]
    residual_KP = sums_SP[1:] - sums_SP[0] - change_K[:, None] * counts_P
    return loss_S, np.sqrt(np.square(residual_KP).sum(axis=1) * prompts / max(1, prompts - 1)) / tokens


def _without(expert: int) -> Callable[[Experts, torch.Tensor], torch.Tensor]:
    def switched_off(one: Experts, gates: torch.Tensor) -> torch.Tensor:
        return gates.masked_fill(one.expert_of_N == expert, 0.0)

    return switched_off
