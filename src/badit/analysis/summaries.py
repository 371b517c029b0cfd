"""What an expert is for, in a sentence: which tasks draw on it most, and which lose most without it.

A sentence names at most two tasks on either side, those that stand out: beyond the mean over tasks by more than half of
what the first does. Where no task stands out it says so. That is where the tasks' gates lie within 0.02 of one another,
or the first task is ahead of the mean by less than three standard errors: the prompts of one task differ, too.

Shape suffixes: T = tasks, P = prompts, M = adapted modules, K = experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from badit.analysis.gates import PromptGates
from badit.analysis.tables import TidyTable, Value

_NAMED = 2
_ALIKE_GATES = 0.02
_STANDARD_ERRORS = 3
_NO_CHANGE = 0.005  # nats a token
_ALIKE_CHANGES = 0.25  # how far the first may be ahead of the mean, in means


def abilities_table(gates: PromptGates, change_TK: np.ndarray, error_TK: np.ndarray) -> TidyTable:
    """A summary of every expert.

    Args:
        gates: the tasks' prompts.
        change_TK: by task (in the gates' order) and expert, what the loss becomes more by without the expert.
        error_TK: the standard errors of that.
    """
    means_TK = gates.means.mean(axis=1)
    gate_error_TK = np.stack([_standard_errors(gates_PMK) for gates_PMK in gates.by_task.values()])
    rows: list[list[Value]] = []
    for expert in range(means_TK.shape[1]):
        gate_T, change_T = means_TK[:, expert], change_TK[:, expert]
        drawn = _drawing_most(gate_T, gate_error_TK[:, expert])
        hurt = _hurt_most(change_T, error_TK[:, expert])
        tasks, hurt_most = ([gates.tasks[t] for t in chosen] for chosen in (drawn, hurt))
        spread = float(gate_T.max() - gate_T.min())
        summary = f"{_on_gates(tasks, gate_T, drawn)} {_on_losses(hurt_most, change_T, hurt)}"
        rows.append(
            [
                expert,
                ", ".join(tasks),
                ", ".join(hurt_most),
                float(gate_T.mean()),
                spread,
                float(change_T.mean()),
                summary,
            ]
        )
    return TidyTable(
        name="abilities",
        about=(
            "What each expert is for, over all modules together: gates are means over modules, losses those with the "
            "expert switched off in every layer. Where several tasks are named, a number is their mean."
        ),
        columns={
            "expert": "the expert, counted from 0",
            "tasks": "the tasks that draw on it most; empty where none stands out",
            "hurt_most": "the tasks whose loss rises most without it; empty where none stands out",
            "mean_gate": "mean gate over tasks; 1 is neutral",
            "spread": "the largest of the tasks' mean gates minus the smallest",
            "change": "mean over tasks of the loss without it minus the loss, in nats a token",
            "summary": "both in a sentence",
        },
        rows=rows,
    )


def readable(task: str) -> str:
    """A task's name as words: task363_sst2_polarity → 363 sst2 polarity."""
    return re.sub(r"^task(?=\d)", "", task).replace("_", " ")


def _standard_errors(gates_PMK: np.ndarray) -> np.ndarray:
    """(K): of the mean over a task's prompts; 0 for a single prompt, which tells nothing of it."""
    gates_PK = gates_PMK.mean(axis=1)
    if len(gates_PK) < 2:
        return np.zeros(gates_PK.shape[1])
    return gates_PK.std(axis=0, ddof=1) / np.sqrt(len(gates_PK))


def _drawing_most(gate_T: np.ndarray, error_T: np.ndarray) -> list[int]:
    return [] if np.ptp(gate_T) < _ALIKE_GATES or _within_noise(gate_T, error_T) else _standing_out(gate_T)


def _hurt_most(change_T: np.ndarray, error_T: np.ndarray) -> list[int]:
    mean, most = change_T.mean(), change_T.max()
    alike = most < _NO_CHANGE or most - mean <= _ALIKE_CHANGES * mean
    return [] if alike or _within_noise(change_T, error_T) else _standing_out(change_T)


def _within_noise(value_T: np.ndarray, error_T: np.ndarray) -> bool:
    first = int(value_T.argmax())
    return bool(value_T[first] - value_T.mean() < _STANDARD_ERRORS * error_T[first])


def _standing_out(value_T: np.ndarray) -> list[int]:
    """The first few, by value, that are beyond the mean by more than half of what the first is."""
    bound = (value_T.mean() + value_T.max()) / 2
    return [int(t) for t in np.argsort(-value_T, kind="stable")[:_NAMED] if value_T[t] > bound]


def _on_gates(tasks: Sequence[str], gate_T: np.ndarray, drawn: Sequence[int]) -> str:
    mean = f"{gate_T.mean():.2f}"
    if len(gate_T) == 1:
        return f"Its gate is {mean} on the one task."
    if not drawn:
        return f"All tasks draw on it alike (gate {mean}, spread {_amount(np.ptp(gate_T))})."
    return f"Drawn on most by {_joined(tasks)} (gate {gate_T[drawn].mean():.2f} against {mean} on average)."


def _on_losses(tasks: Sequence[str], change_T: np.ndarray, hurt: Sequence[int]) -> str:
    mean = change_T.mean()
    if np.abs(change_T).max() < _NO_CHANGE:
        return f"Without it no task's loss changes by {_NO_CHANGE} nats a token."
    overall = f"{'rises' if mean >= 0 else 'falls'} by {_amount(abs(mean))}"
    if not hurt:
        whose = "that task" if len(change_T) == 1 else "all tasks"
        return f"Without it the loss of {whose} {overall} nats a token{'' if len(change_T) == 1 else ' on average'}."
    rise = _amount(change_T[hurt].mean())
    others = f"of all tasks by {_amount(mean)}" if mean >= 0 else f"while that of all tasks {overall}"
    return f"Without it the loss of {_joined(tasks)} rises by {rise} nats a token, {others}."


def _joined(tasks: Sequence[str]) -> str:
    return " and ".join(readable(task) for task in tasks)


def _amount(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.3f}"
