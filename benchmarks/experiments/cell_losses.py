"""Losses of training instances of an experiment's cells, and differences between cells.

Nothing here imports badit, so that scripts for an earlier commit use it too.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy import stats

SCREENING_STEPS = range(21, 10**6)  # those whose losses count: from the 21st to the last


def instance_means(losses_L: torch.Tensor, row_L: torch.Tensor, rows: int) -> list[float]:
    """Returns the mean loss per answer token of every row of a batch."""
    sums_B = torch.zeros(rows).index_add(0, row_L, losses_L)
    counts_B = torch.bincount(row_L, minlength=rows).clamp_min(1)
    return (sums_B / counts_B).tolist()


def records_of(step: int, tasks: Sequence[str], losses: Sequence[float]) -> list[dict[str, Any]]:
    """Returns the lines of a batch in the log of instances."""
    pairs = zip(tasks, losses, strict=True)
    return [{"step": step, "task": task, "loss": round(loss, 4)} for task, loss in pairs]


def losses_by_task(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Returns, for every task, the steps and losses of its instances, in the order of training."""
    by_task: Any = defaultdict(lambda: {"steps": [], "losses": []})
    for record in records:
        by_task[record["task"]]["steps"].append(record["step"])
        by_task[record["task"]]["losses"].append(record["loss"])
    return dict(sorted(by_task.items()))


def screening_loss(
    tasks: Mapping[str, Mapping[str, list[Any]]], steps: range = SCREENING_STEPS
) -> float:
    """Returns the mean over tasks of the mean loss of the instances of these steps."""
    means = []
    for of_task in tasks.values():
        pairs = zip(of_task["steps"], of_task["losses"], strict=True)
        means.append(fmean(loss for step, loss in pairs if step in steps))
    return fmean(means)


def result_text(result: Mapping[str, Any]) -> str:
    """Returns a result as JSON, with one line per key and one line per task."""
    rows = [f"    {json.dumps(task)}: {json.dumps(of)}" for task, of in result["tasks"].items()]
    parts = {key: json.dumps(value, ensure_ascii=False) for key, value in result.items()}
    parts["tasks"] = "{\n" + ",\n".join(rows) + "\n  }"
    lines = [f'  "{key}": {text}' for key, text in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def difference_columns(differences: Sequence[float], form: str = "+.4f") -> list[str]:
    """Returns paired differences, their mean and its 95 % t interval as text."""
    if not differences:
        return ["", "", ""]
    by_seed = ", ".join(f"{difference:{form}}" for difference in differences)
    mean = float(np.mean(differences))
    interval = ""
    if len(differences) > 1:
        low, high = stats.t.interval(0.95, len(differences) - 1, mean, stats.sem(differences))
        interval = f"[{low:{form}}, {high:{form}}]"
    return [by_seed, f"{mean:{form}}", interval]


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)
