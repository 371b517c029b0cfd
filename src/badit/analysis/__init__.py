"""Measures a run's experts and the interference between tasks as DataFrames.

``badit analyze`` saves them as tables:

OUTPUT/analysis/       the tables, one .json each
OUTPUT/analysis.json   the settings, the finished parts with their duration and peak memory,
                       versions and hardware

Importing the package registers every table in :data:`badit.analysis.tables.TABLES`.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from badit.analysis.atlas import Prompts, ability_atlas
from badit.analysis.gates import prompt_gates
from badit.analysis.interference import measure_interference
from badit.analysis.learning import (
    component_flow,
    expert_angles,
    held_out_angles,
    task_gap,
    transfer,
)
from badit.analysis.record import Record
from badit.analysis.tables import save_frame
from badit.comparison.results import RESULTS
from badit.data import AnswerCollator, Instance, Task, batches_by_task, hold_out, load_sources
from badit.recipe.loading import build_recipe
from badit.recipe.method import resolve_method
from badit.recipe.schema import DataSection, source_of
from badit.runs.fingerprints import task_fingerprints
from badit.runs.folder import AnyPath, RunFolder, refuse_unanalyzable
from badit.runs.resolved import ResolvedRun, open_run
from badit.support.console import quiet
from badit.support.environment import environment
from badit.support.errors import BaditError
from badit.support.files import exclusive, inside, refuse_links, write_json
from badit.training.checkpoints import checksums
from badit.training.encoding import encoded
from badit.training.loading import load_run
from badit.tuner.experts import active_experts


def analyze(
    target: str,
    data: str | None,
    instances: int,
    output: AnyPath | None,
    progress: bool,
    trust_remote_code: bool,
) -> Path:
    """Implements :func:`badit.analyze`. Returns the folder that contains ``analysis/``.

    A trained run is measured on instances that it was not trained on, if its data has any. An
    interrupted analysis resumes with its first unfinished part.
    """
    if instances < 2:
        reason = "since gradients of two halves are compared"
        raise BaditError(f"instances: must be at least 2, {reason}; got {instances}")
    refuse_unanalyzable(target, data)
    folder = Path(target)
    is_run = (folder / "config.yaml").is_file()
    is_comparison = (folder / RESULTS).is_file()
    default = folder if is_run or is_comparison else "runs/analysis"
    output = Path(output or default)
    # The folder may come from others: through a link, the tables would be written elsewhere.
    refuse_links(inside(output, output / "analysis"))
    with exclusive(output), quiet(not progress):
        if is_comparison:
            _analyze_comparison(folder, data, output)
            return output
        if is_run:
            run = open_run(RunFolder(folder, trust_remote_code=trust_remote_code))
            # Relative to the output folder, so that both can be moved together.
            target = os.path.relpath(folder.resolve(), output.resolve())
            weights = run.folder.adapter_path
        else:
            run = _base_model_run(target, data, output)
            weights = folder
        tasks = _tasks(run, data)
        # Tables of other settings, weights or data are refused and not mixed with new ones.
        settings = {
            "target": target,
            "data": data,
            "instances": instances,
            "weights": checksums(weights, "*safetensors*"),
            "tasks": task_fingerprints(tasks),
        }
        measured = [(task, _measured_split(task, run.method.trains)) for task in tasks]

        def numbers() -> dict[str, dict[str, int]]:
            return {
                "available": {task.name: len(split) for task, split in measured},
                "most_held_out": _most_held_out(run, data),
                "tested": {task.name: len(task.test) for task in tasks},
            }

        record = Record(output, settings, numbers, with_recipe=not is_run)
        prompts = [(task, split[:instances]) for task, split in measured]
        if not record.is_complete:  # only then the model is loaded
            _measure(record, run, prompts, progress)
    return output


def _analyze_comparison(folder: Path, data: str | None, output: Path) -> None:
    if data is not None:
        raise BaditError(f"--data: not used with a comparison such as {folder}; remove it")
    frame = task_gap(folder)
    if frame.empty:
        fix = "list one in compare.single_task"
        raise BaditError(f"{folder}: no method was trained on single tasks; {fix}")
    save_frame(frame, output / "analysis")


def _base_model_run(model: str, data: str | None, output: Path) -> ResolvedRun:
    # As a run of the untuned model, because all measurements receive a resolved run.
    values = {"model": {"name": model}, "data": {"source": data}, "method": {"name": "base"}}
    recipe = build_recipe({**values, "output": str(output)})
    return ResolvedRun(RunFolder.at(output), recipe, resolve_method(recipe.method))


def _tasks(run: ResolvedRun, data: str | None) -> Sequence[Task]:
    if data is None and run.method.trains:
        return run.tasks
    section = run.recipe.data
    if data is not None:
        section = DataSection(source=source_of(data))  # pyright: ignore[reportCallIssue]
    return load_sources(section.sources(), section.tasks)


def _measured_split(task: Task, trains: bool) -> Sequence[Instance]:
    """Returns a task's instances of one split, preferably one that was not trained on."""
    splits = [task.train, task.validation, task.test]
    if trains:
        splits = [task.validation, task.test, task.train]
    for split in splits:
        # Gradients of two halves are compared.
        if len(split) >= 2:
            return split
    problem = "has no split with at least 2 instances"
    raise BaditError(f"data: task {task.name} {problem}; add some or leave the task out")


def _most_held_out(run: ResolvedRun, data: str | None) -> dict[str, int]:
    """Returns the validation instances of each task with the largest data.validation_per_task.

    Empty unless a trained run is measured on its own tasks.
    """
    if data is not None or not run.method.trains:
        return {}
    section = run.recipe.data
    # Without the run's own split and limits.
    tasks = load_sources(section.sources(), section.tasks)
    largest = max((len(task.train) for task in tasks), default=0)
    return {task.name: len(task.validation) for task in hold_out(tasks, largest, section.seed)}


def _measure(record: Record, run: ResolvedRun, prompts: Prompts, progress: bool) -> None:
    """Loads the model, and measures and saves the parts that are not finished."""
    folder = run.folder
    model, tokenizer = load_run(run)
    if not run.method.trains:
        # So that the report finds a base model's recipe and environment.
        run.prepare_folder()
        if not folder.environment_path.is_file():
            write_json(folder.environment_path, environment())
    pairs = [(task, instance) for task, instances in prompts for instance in instances]
    examples = encoded(tokenizer, run.recipe, pairs, model)
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, batch_size=4)
    # A batch's gradient does not have the squared gradients of single instances.
    one_by_one = batches_by_task(examples, collate, batch_size=1)
    # A base model and plain LoRA have no gates, and then no tables of experts.
    gates = prompt_gates(model, batches) if active_experts(model) else None

    def interference() -> list[pd.DataFrame]:
        return measure_interference(model, one_by_one, gates, progress=progress)

    def experts() -> list[pd.DataFrame]:
        if gates is None:
            return []
        atlas = ability_atlas(model, batches, gates, prompts, progress=progress)
        # A grouping fits the gradients it was computed from, so trained instances are not measured.
        # All instances of a task are from one split, so the first one decides.
        held_out = None
        if all(instances[0] not in task.train[:1] for task, instances in prompts):
            held_out = held_out_angles(model, batches, progress=progress)
        return [expert_angles(folder, held_out), component_flow(folder), *atlas]

    measurements = {"interference": interference, "experts": experts}
    if run.recipe.data.order is None:
        measurements["learning"] = list  # no tables
    elif folder.scores_path.is_file():
        # Otherwise a later analysis measures it, once the run is scored.
        measurements["learning"] = lambda: [transfer(folder)]
    # Each part is recorded when it ends, so an interrupted analysis repeats at most one.
    for name, measure in measurements.items():
        if name not in record.finished:
            began = time.monotonic()
            frames = measure()
            record.add(name, frames, time.monotonic() - began)
