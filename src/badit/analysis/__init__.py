"""Measures a run's experts and the interference between tasks as DataFrames; ``badit analyze`` saves them as tables.

OUTPUT/analysis/       the tables, one .json each
OUTPUT/analysis.json   the settings, the finished parts with their duration and peak memory, versions and hardware

Importing the package registers every table in :data:`badit.analysis.tables.TABLES`.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from badit.analysis.atlas import Prompts, ability_atlas
from badit.analysis.gates import active_experts, prompt_gates
from badit.analysis.interference import measure_interference
from badit.analysis.learning import (
    component_flow,
    expert_angles,
    held_out_angles,
    task_gap,
    transfer,
)
from badit.analysis.tables import TABLES, save_frame
from badit.comparison.results import RESULTS
from badit.data import AnswerCollator, Instance, Task, batches_by_task, load_sources
from badit.recipe.loading import build_recipe
from badit.recipe.method import resolve_method
from badit.recipe.schema import DataSection
from badit.runs.fingerprints import task_fingerprints
from badit.runs.folder import AnyPath, RunFolder
from badit.runs.resolved import ResolvedRun, open_run
from badit.support.environment import environment, peak_memory
from badit.support.errors import BaditError, explained
from badit.support.files import exclusive, inside, read_json, refuse_links, write_json
from badit.training.checkpoints import checksums
from badit.training.encoding import encoded
from badit.training.loading import load_run


def analyze(
    target: str,
    data: str | None,
    instances: int,
    output: AnyPath | None,
    progress: bool,
    trust_remote_code: bool,
) -> Path:
    """Implements :func:`badit.analyze`. Returns the folder that contains ``analysis/`` with the tables.

    A trained run is measured on instances that it was not trained on, if its data has any. An interrupted analysis
    resumes with its first unfinished part.
    """
    if instances < 2:
        raise BaditError(
            f"instances: must be at least 2, since gradients of two halves are compared; got {instances}"
        )
    folder = Path(target)
    is_run, is_comparison = (folder / "config.yaml").is_file(), (folder / RESULTS).is_file()
    output = Path(output or (folder if is_run or is_comparison else "runs/analysis"))
    path = inside(output, output / "analysis.json")
    refuse_links(inside(output, output / "analysis"))
    if is_comparison:
        if data is not None:
            raise BaditError(f"--data: not used with a comparison such as {target}; remove it")
        if not len(frame := task_gap(folder)):
            raise BaditError(
                f"{target}: no method was trained on single tasks; list one in compare.single_task"
            )
        save_frame(frame, output / "analysis")
        return output
    if is_run:
        run = open_run(RunFolder(folder, trust_remote_code=trust_remote_code))
    elif data is None:
        raise BaditError(
            f"{target}: not a run's folder; to analyze a base model, set its tasks with --data"
        )
    else:
        values = {"model": {"name": target}, "data": {"source": data}, "method": {"name": "base"}}
        recipe = build_recipe({**values, "output": str(output)})
        run = ResolvedRun(RunFolder.at(output), recipe, resolve_method(recipe.method))
    trained = run.method.trains
    section = run.recipe.data if data is None else DataSection(source=data)  # pyright: ignore[reportCallIssue]
    tasks = (
        run.tasks if data is None and trained else load_sources(section.sources(), section.tasks)
    )
    chosen = [(task, _chosen(task, instances, trained=trained)) for task in tasks]
    # The run's folder relative to the output folder, so that both can be moved together.
    measured = os.path.relpath(folder.resolve(), output.resolve()) if is_run else target
    settings = {"target": measured, "data": data, "instances": instances}
    weights = checksums(RunFolder.at(folder).adapter_path if is_run else folder, "*safetensors*")
    settings |= {"weights": weights, "tasks": task_fingerprints(tasks)}
    record = (
        read_json(path)
        if path.is_file()
        else {"settings": settings, "environment": environment(), "parts": {}}
    )
    others = f"it and {path.name}" if is_run else f"it, {path.name} and config.yaml"
    fix = f"delete {others} to measure again, or choose another --output"
    with explained(output / "analysis", action="resumed", fix=fix, any_error=True):
        if settings | record["settings"] != settings:  # earlier releases did not record the target
            problem = "belongs to another run, model or data, or to other settings"
            raise BaditError(f"{output / 'analysis'}: {problem}; {fix}")
        kept = {name for name in TABLES if (output / "analysis" / f"{name}.json").is_file()}
        done = {
            part: about
            for part, about in record["parts"].items()
            if kept.issuperset(about["tables"])
        }
    if done.keys() >= {"interference", "experts", "learning"}:
        return output
    with exclusive(output):
        for part, measure in _parts(run, chosen, progress).items():
            if part in done:
                continue
            began = time.monotonic()
            frames = [frame for frame in measure() if len(frame)]
            for frame in frames:
                save_frame(frame, output / "analysis")
            # Recorded after the tables are written, so that an interrupted part is measured again.
            done[part] = {
                "tables": [frame.attrs["name"] for frame in frames],
                "seconds": round(time.monotonic() - began, 1),
                "peak_memory_gib": peak_memory(),
            }
            write_json(path, {**record, "parts": done})
    return output


def _parts(
    resolved: ResolvedRun, chosen: Prompts, progress: bool
) -> dict[str, Callable[[], list[pd.DataFrame]]]:
    """Loads the model and returns, by part, the function that measures the part's tables."""
    run, recipe = resolved.folder, resolved.recipe
    model, tokenizer = load_run(resolved)
    if not resolved.method.trains:  # so that the report finds a base model's recipe and environment
        resolved.prepare_folder()
        if not run.environment_path.is_file():
            write_json(run.environment_path, environment())
    pairs = [(task, instance) for task, instances in chosen for instance in instances]
    examples = encoded(tokenizer, recipe, pairs, model)
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, batch_size=4)
    gates = prompt_gates(model, batches) if active_experts(model) else None
    one_by_one = batches_by_task(examples, collate, batch_size=1)

    def experts() -> list[pd.DataFrame]:
        if gates is None:
            return []
        atlas = ability_atlas(model, batches, gates, chosen, progress=progress)
        unseen = all(instances[0] not in task.train[:1] for task, instances in chosen)
        held_out = held_out_angles(model, batches, progress=progress) if unseen else None
        return [expert_angles(run, held_out), component_flow(run), *atlas]

    parts = {
        "interference": lambda: measure_interference(model, one_by_one, gates, progress=progress),
        "experts": experts,
    }
    if (
        recipe.data.order is None or run.scores_path.is_file()
    ):  # otherwise measured once the run is scored
        parts["learning"] = lambda: [] if recipe.data.order is None else [transfer(run)]
    return parts


def _chosen(task: Task, count: int, *, trained: bool) -> Sequence[Instance]:
    for split in (
        (task.validation, task.test, task.train)
        if trained
        else (task.train, task.validation, task.test)
    ):
        if len(split) >= 2:
            return split[:count]
    raise BaditError(
        f"data: task {task.name} has no split with at least 2 instances; add some or leave the task out"
    )
