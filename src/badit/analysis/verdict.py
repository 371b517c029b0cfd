"""The verdict of an analysis: which pairs of tasks conflict beyond noise, and what to do next.

A pair conflicts beyond noise if its gradients are reliable, their cosine, corrected for noise, is
negative, and the 95 % interval of the cosine lies below 0.
"""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from badit.analysis.reliability import RELIABLE
from badit.support.errors import BaditError
from badit.support.files import read_json
from badit.support.text import counted, number

_NAMED_PAIRS = 5
_BELOW_BY_CHANCE = 0.025  # of the 95 % intervals of cosines that are 0
_MOST_INSTANCES = 200  # more are not proposed: the measurement would take too long


class Verdict(NamedTuple):
    """What an analysis shows, in sentences, and the next command, with what it answers."""

    sentences: list[str]
    purpose: str = ""
    command: str = ""


class Measured(NamedTuple):
    """What was analysed: a run or a base model (``target``), its tasks' source and base model."""

    target: str
    data: str = "DATA"
    model: str | None = None
    is_run: bool = True


def measured_in(folder: Path, config: Mapping[str, Any]) -> Measured:
    """Returns what was analysed, from a folder and its recipe, which may be of another version."""

    def text(section: str, key: str) -> str | None:
        values = config.get(section)
        value = values.get(key) if isinstance(values, Mapping) else None
        return value if isinstance(value, str) else None

    model = text("model", "name")
    data = text("data", "source") or "DATA"
    if model and text("method", "name") == "base":
        return Measured(model, data, model, is_run=False)
    return Measured(_measured_run(folder), data, model)


def _measured_run(folder: Path) -> str:
    """Returns the folder of the run that was measured, if its tables are elsewhere."""
    with suppress(BaditError, KeyError, TypeError):
        target = read_json(folder / "analysis.json")["settings"]["target"]
        return os.path.normpath(folder / target)
    return str(folder)


def of_shown_parameters(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the parameters whose gradients are shown.

    These are those of the adapter if there are any, otherwise the weights.
    """
    return frame.query("parameters == parameters.min()")


def beyond_noise(pairs: pd.DataFrame) -> pd.Series:
    """Returns whether each row of gradient_overall is a conflict beyond noise."""
    return (pairs["conflict"] == 1) & (pairs["high"] < 0)


def within_noise(pairs: pd.DataFrame) -> pd.Series:
    """Returns whether the interval of each cosine includes 0, or is not known."""
    return ~((pairs["high"] < 0) | (pairs["low"] > 0))


def conflict_verdict(overall: pd.DataFrame, measured: Measured) -> Verdict | None:
    """Returns the verdict from the table gradient_overall; None without a pair of tasks."""
    pairs = of_shown_parameters(overall)
    if pairs.empty:
        return None
    conflicts = pairs[beyond_noise(pairs)].sort_values("corrected_cosine")
    undecided = pairs[pairs["conflict"].isna()]
    decided = len(pairs) - len(undecided)
    sentences = [_answer(len(pairs), decided, len(conflicts))]
    if len(conflicts):
        sentences += [*map(_pair, conflicts[:_NAMED_PAIRS].to_dict("records"))]
        if len(conflicts) > _NAMED_PAIRS:
            sentences.append(f"And {len(conflicts) - _NAMED_PAIRS} more.")
        chance = number(_BELOW_BY_CHANCE * len(pairs))
        sentences.append(
            f"How sure: without any conflict, about {chance} of {len(pairs)} such intervals would "
            "lie below 0 by chance."
        )
    if len(undecided):
        sentences.append(
            f"{counted(len(undecided), 'pair')} of {len(pairs)} not decided: their gradients are "
            f"too noisy (signal below {RELIABLE})."
        )
        needed = _needed_for_half(undecided)
        if np.isfinite(needed):
            sentences.append(
                f"As predicted, {needed:.0f} instances per task would decide half of these pairs."
            )
    return Verdict(sentences, *_next(measured, conflicts, undecided, decided))


def _needed_for_half(undecided: pd.DataFrame) -> float:
    """Returns the predicted instances per task that decide half of the pairs; NaN if unknown."""
    return undecided["instances_needed"].quantile(0.5, "lower")


def _answer(pairs: int, decided: int, conflicts: int) -> str:
    if not decided:
        return f"This data does not decide which of {counted(pairs, 'pair')} of tasks conflict."
    if not conflicts:
        return f"No conflict beyond noise among {counted(decided, 'decided pair')} of tasks."
    verb = "conflicts" if conflicts == 1 else "conflict"
    return f"{counted(conflicts, 'pair')} of {pairs} {verb} beyond noise."


def _pair(row: Mapping[str, Any]) -> str:
    interval = f"{number(row['low'], '.2f')} to {number(row['high'], '.2f')}"
    return (
        f"{row['task_a']} and {row['task_b']}: cosine {number(row['cosine'], '.2f')}, 95 % "
        f"interval {interval}."
    )


def _next(
    measured: Measured, conflicts: pd.DataFrame, undecided: pd.DataFrame, decided: int
) -> tuple[str, str]:
    """Returns the purpose of the next command, and the command."""
    needed = _needed_for_half(undecided)
    of_data = [f"data.source={measured.data}"]
    if measured.model:
        of_data.append(f"model.name={measured.model}")
    if len(conflicts):
        purpose = "What the conflicts cost: train LoRA and BADIT together and LoRA on each task"
        options = ["data.validation_per_task=10", "compare.single_task=[lora]"]
        return purpose, _command("compare", "own-tasks", *of_data, *options)
    if len(undecided) > decided and np.isfinite(needed) and needed <= _MOST_INSTANCES:
        words = [measured.target, "--instances", f"{needed:.0f}"]
        if not measured.is_run:
            words += ["--data", measured.data]
        words += ["-o", f"runs/analysis-{needed:.0f}"]
        return "Decide half of these pairs, as predicted", _command("analyze", *words)
    if measured.is_run:
        return "Answer a prompt", _command("generate", measured.target, "PROMPT")
    return "Tune on all tasks together", _command("train", "own-tasks", *of_data)


def _command(*words: str) -> str:
    return shlex.join(["badit", *words])
