"""The verdict of an analysis: which pairs of tasks conflict beyond noise, and what to do next.

A pair conflicts beyond noise if its gradients are reliable, their cosine, corrected for noise, is
negative, and the 95 % interval of the cosine lies below 0.
"""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from badit.analysis.reliability import RELIABLE
from badit.analysis.tables import span
from badit.models import BUILT_IN
from badit.presets import NAMES
from badit.support.errors import BaditError
from badit.support.files import read_json
from badit.support.text import counted, number

_NAMED_PAIRS = 5
_BELOW_BY_CHANCE = 0.025  # of the 95 % intervals of cosines that are 0
_MOST_INSTANCES = 200  # more are not proposed: the measurement would take too long
_FEW_INSTANCES = 16  # below it, the verdict says how to measure more


class Verdict(NamedTuple):
    """What an analysis shows, in sentences, and the next command, with what it answers."""

    sentences: list[str]
    purpose: str = ""
    command: str = ""


class Measured(NamedTuple):
    """What was analysed: a run or a base model (``target``), its tasks' source and base model.

    ``other_data`` is the source of tasks that are not the run's own; ``instances`` is the number
    per task that was asked for, ``available`` that of the smallest split that was measured,
    ``most_held_out`` the largest validation set that all of a run's tasks can have, and ``tested``
    the smallest number of test instances. Each is None if it is unknown. ``has_experts``: the run's
    method is a form of BADIT.
    """

    target: str
    data: str = "DATA"
    model: str | None = None
    is_run: bool = True
    other_data: str | None = None
    instances: int | None = None
    available: int | None = None
    most_held_out: int | None = None
    tested: int | None = None
    has_experts: bool = False


def measured_in(folder: Path, config: Mapping[str, Any]) -> Measured:
    """Returns what was analysed, from a folder and its recipe, which may be of another version."""

    def text(section: str, key: str) -> str | None:
        values = config.get(section)
        value = values.get(key) if isinstance(values, Mapping) else None
        return value if isinstance(value, str) else None

    model = text("model", "name")
    data = text("data", "source") or "DATA"
    record = _record(folder)
    settings = _mapping(record, "settings")
    count = settings.get("instances")
    numbers = {
        "instances": count if isinstance(count, int) else None,
        "available": _smallest(record, "available"),
        "most_held_out": _smallest(record, "most_held_out"),
        "tested": _smallest(record, "tested"),
    }
    if model and text("method", "name") == "base":
        return Measured(model, data, model, is_run=False, **numbers)
    other_data = settings.get("data")
    if not isinstance(other_data, str):
        other_data = None
    target = settings.get("target")
    # The run that was measured, if its tables are elsewhere.
    run = os.path.normpath(folder / target) if isinstance(target, str) else str(folder)
    has_experts = text("method", "name") in NAMES
    return Measured(run, data, model, other_data=other_data, has_experts=has_experts, **numbers)


def _record(folder: Path) -> Mapping[str, Any]:
    """Returns the record of an analysis; empty if it cannot be read."""
    with suppress(BaditError):
        return read_json(folder / "analysis.json")
    return {}


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}


def _smallest(record: Mapping[str, Any], name: str) -> int | None:
    """Returns the smallest of the numbers by task, which earlier versions did not record."""
    numbers = list(_mapping(_mapping(record, "instances"), name).values())
    if not numbers or not all(isinstance(count, int) for count in numbers):
        return None
    return min(numbers)


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


def conflict_verdict(
    overall: pd.DataFrame, tasks: pd.DataFrame | None, measured: Measured
) -> Verdict | None:
    """Returns the verdict from the table gradient_overall; None without a pair of tasks.

    ``tasks`` is the table gradient_tasks, which has the numbers of instances, if there is one.
    """
    pairs = of_shown_parameters(overall)
    if pairs.empty:
        return None
    conflicts = pairs[beyond_noise(pairs)].sort_values("corrected_cosine")
    undecided = pairs[pairs["conflict"].isna()]
    decided = len(pairs) - len(undecided)
    counts: list[int] = []
    if tasks is not None:
        counts = of_shown_parameters(tasks)["instances"].dropna().astype(int).tolist()
    most = _most_instances(counts, measured)
    needed = _needed_for_half(undecided)
    has_no_more = bool(counts) and most <= min(counts)
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
        which = "Their" if not decided else f"{counted(len(undecided), 'pair')} not decided: their"
        sentences.append(f"{which} gradients are too noisy (signal below {RELIABLE}).")
        if np.isfinite(needed):
            would_be = int((undecided["instances_needed"] <= needed).sum())
            whole = f"{would_be} of them"
            if would_be == len(undecided):
                whole = "it" if would_be == 1 else "all"
            sentences.append(f"Predicted: {needed:.0f} instances per task would decide {whole}.")
    if counts:
        sentences += _basis(counts, measured, needed, most)
    if len(undecided) <= decided or has_no_more or needed > most:
        needed = np.nan
    return Verdict(sentences, *_next(measured, pairs, conflicts, needed))


def _most_instances(counts: Sequence[int], measured: Measured) -> float:
    """Returns the instances per task that can be measured; infinite if the number is unknown."""
    if measured.available is not None:
        return measured.available
    # A task with fewer than were asked for has no more.
    if counts and min(counts) < (measured.instances or 0):
        return min(counts)
    return np.inf


def _basis(counts: Sequence[int], measured: Measured, needed: float, most: float) -> list[str]:
    """Returns sentences with the number of instances per task and, if they are few, what to set.

    ``needed`` is the number that would decide more pairs, NaN if unknown, and ``most`` that of the
    split that was measured.
    """
    noun = "instance" if max(counts) == 1 else "instances"
    sentence = f"The gradients rest on {span(counts)} {noun} per task."
    is_few = min(counts) < _FEW_INSTANCES
    is_short = needed > most  # False if unknown
    if not is_few and not is_short:
        return [sentence]
    if most > min(counts) and not is_short:
        fix = f"--instances {min(_FEW_INSTANCES, most)} -o FOLDER measures more"
        return [sentence, f"These are few: {fix}."]
    problem = "The split that was measured has no more"
    if most > min(counts):
        problem = f"The split that was measured has only {most}"
    if not measured.is_run or measured.other_data is not None:
        return [sentence, f"{problem}: add some to {measured.other_data or measured.data}."]
    wanted = needed if is_short else _FEW_INSTANCES
    held_out = min(wanted, measured.most_held_out or 0)
    training = "with more instances per task"
    # A larger validation set that is still too small would decide no more.
    if held_out > most and not needed > held_out:
        training = f"with data.validation_per_task={held_out:.0f}"
    fix = f"give others with --data FILE -o FOLDER, or train again {training}"
    return [sentence, f"{problem}: {fix}."]


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
    measured: Measured, pairs: pd.DataFrame, conflicts: pd.DataFrame, needed: float
) -> tuple[str, str]:
    """Returns the purpose of the next command, and the command.

    ``needed`` is the number of instances that may be proposed, NaN for none.
    """
    of_data = [f"data.source={measured.data}"]
    if measured.model:
        of_data.append(f"model.name={measured.model}")
    if len(conflicts):
        purpose = "What the conflicts cost: train LoRA and BADIT together and LoRA on each task"
        options = ["data.validation_per_task=10", "compare.single_task=[lora]"]
        if measured.tested == 0:
            options.append("evaluation.split=validation")
        return purpose, _command("compare", "own-tasks", *of_data, *options)
    if np.isfinite(needed) and needed <= _MOST_INSTANCES:
        words = [measured.target, "--instances", f"{needed:.0f}"]
        data = measured.other_data if measured.is_run else measured.data
        if data is not None:
            words += ["--data", data]
        words += ["-o", f"runs/analysis-{needed:.0f}"]
        return "Decide half of these pairs, as predicted", _command("analyze", *words)
    if not measured.is_run:
        purpose = "Write a recipe to tune on all tasks together"
        if measured.model != BUILT_IN:
            purpose += f", and set its model.name to {measured.model}"
        return purpose, _command("init", measured.data)
    words = ["generate", measured.target]
    if measured.other_data is not None:  # the run has other tasks
        return "Answer a prompt", _command(*words, "PROMPT")
    if measured.has_experts:
        purpose = "Export a LoRA per task for vLLM and llama.cpp"
        return purpose, _command("export", measured.target, "--all-tasks", "-o", "exports")
    task = str(pairs["task_a"].iloc[0])
    return "Answer an input", _command(*words, "--task", task, "INPUT")


def _command(*words: str) -> str:
    return shlex.join(["badit", *words])
