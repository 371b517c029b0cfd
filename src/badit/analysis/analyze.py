"""``badit analyze``: all measurements that go with a run, a base model or a comparison, into tables in its folder.

A run is measured on instances that it was not trained on, where its data has any. Every part's tables are written as
soon as it is done, so an interrupted analysis goes on with the part that it was at.

OUTPUT/analysis/       the tables, one .json each
OUTPUT/analysis.json   what was measured on what, how long each part took, versions and hardware
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from badit.analysis.atlas import ability_atlas
from badit.analysis.coactivation import coactivation_tables, tidy
from badit.analysis.experts import component_flow, expert_angles
from badit.analysis.gates import PromptGates, has_experts, marked_experts, prompt_gates
from badit.analysis.interference import measure_interference
from badit.analysis.learning import task_gap, transfer
from badit.analysis.tables import TidyTable
from badit.data import AnswerCollator, Instance, Task, batches_by_task, load_tasks
from badit.errors import BaditError
from badit.evaluate import load_run
from badit.evaluation.results import RESULTS
from badit.files import read_json, write_json
from badit.recipe import Recipe, build_recipe, expand_source
from badit.runs import RunFolder, environment, peak_memory
from badit.training.methods import build_method
from badit.training.plan import encoded, make_plan, pad_id

_PARTS = ("interference", "experts", "learning")
_BATCH_SIZE = 4
_LOSS_BATCHES = 1
Part = Callable[[], Sequence[TidyTable]]
Chosen = Sequence[tuple[Task, Sequence[Instance]]]


def analyze(
    target: str | Path,
    *,
    data: str | None = None,
    instances: int = 8,
    output: str | Path | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Measures interference between tasks, what experts do, and what tasks gain or lose together.

    Args:
        target: a run's folder, a comparison's folder, or the name or folder of a base model.
        data: tasks to measure on, as in a recipe's ``data.source``. A base model needs them; a run has its own.
        instances: how many of each task, at least 2.
        output: the folder for the tables; by default the target's own, for a base model ``runs/analysis``.
        progress: show bars on stderr.
        trust_remote_code: run Python code that comes with a run's base model.

    Returns:
        The folder, in which ``analysis/`` has the tables.

    Raises:
        BaditError: no such run or model, bad data, or tables of other settings in the folder.
    """
    if instances < 2:
        raise BaditError(
            f"instances: must be at least 2, one for each half whose gradients are held together: {instances}"
        )
    folder = Path(target)
    if (folder / RESULTS).is_file():
        task_gap(folder).save(Path(output or folder) / "analysis")
        return Path(output or folder)
    is_run = (folder / "config.yaml").is_file()
    recipe = (
        RunFolder(folder).recipe(trust_remote_code=trust_remote_code)
        if is_run
        else _recipe_of_base(str(target), data, output)
    )
    run = RunFolder(folder if is_run else recipe.output)
    trained = build_method(recipe.method).trains
    chosen = [(task, _chosen(task, instances, trained=trained)) for task in _tasks(recipe, data, trained=trained)]
    record = _Record(Path(output or run.path), {"data": data, "instances": instances})
    if not record.has(_PARTS):
        _measure(run, recipe, chosen, record, progress)
    return record.output


def _measure(run: RunFolder, recipe: Recipe, chosen: Chosen, record: _Record, progress: bool) -> None:
    model, tokenizer = load_run(run, recipe)
    model.eval()
    if not build_method(recipe.method).trains:
        # A report then finds a base model's configuration as it does any run's.
        RunFolder.prepare(recipe)
        if not run.environment.is_file():
            write_json(run.environment, environment())
    examples = [encoded(tokenizer, recipe, task, instance) for task, instances in chosen for instance in instances]
    batches = batches_by_task(examples, AnswerCollator(pad_id(tokenizer), with_tasks=True), _BATCH_SIZE)

    def experts() -> Sequence[TidyTable]:
        if not has_experts(model):
            return []
        gates = prompt_gates(model, batches)
        texts = {task.name: [(instance.id, instance.input) for instance in found] for task, found in chosen}
        tasks = [task for task, _ in chosen]
        # Switching off every expert takes as many passes as there are experts, so only a part of the data goes through.
        some = {task: of_task[:_LOSS_BATCHES] for task, of_task in batches.items()}
        atlas = ability_atlas(model, some, gates, texts, tasks, progress=progress)
        angles = expert_angles(run, model, batches, progress=progress)
        return [angles, component_flow(run), *atlas, *_with_experts(record, gates)]

    def learning() -> Sequence[TidyTable]:
        return [transfer(run)] if recipe.data.order is not None and run.scores.is_file() else []

    parts: dict[str, Part] = {
        "interference": lambda: measure_interference(model, batches, progress=progress),
        "experts": experts,
        "learning": learning,
    }
    for name in _PARTS:
        record.keep(name, parts[name])


def _with_experts(record: _Record, gates: PromptGates) -> list[TidyTable]:
    """The co-activation tables with what experts tasks share added to what neurons and parameters they do."""
    about = "Experts: those whose mean gate over a task's prompts is above neutral."
    tables = []
    for table in tidy([coactivation_tables("experts", marked_experts(gates))], about):
        known = TidyTable.load(record.folder / f"{table.name}.json")
        others = [row for row, entry in zip(known.rows, known.records(), strict=True) if entry.get("kind") != "experts"]
        tables.append(TidyTable(table.name, f"{known.about} {about}", table.columns, [*others, *table.rows]))
    return tables


def _recipe_of_base(model: str, data: str | None, output: str | Path | None) -> Recipe:
    if data is None:
        raise BaditError(f"{model}: is no run's folder; to measure on a base model, name its tasks with --data")
    section = {"model": {"name": model}, "data": {"source": data}, "method": {"name": "base"}}
    return build_recipe({**section, "output": str(output or "runs/analysis")})


def _tasks(recipe: Recipe, data: str | None, *, trained: bool) -> list[Task]:
    if data is None and trained:
        return make_plan(recipe).tasks
    return load_tasks(expand_source(data or recipe.data.source))


def _chosen(task: Task, count: int, *, trained: bool) -> Sequence[Instance]:
    """The first instances of the split that tells most: for a trained model one that it has not seen."""
    splits = (task.validation, task.test, task.train) if trained else (task.train, task.validation, task.test)
    found = next((split for split in splits if len(split) >= 2), None)
    if found is None:
        raise BaditError(f"data: task {task.name} has no two instances of one split to measure on")
    return found[:count]


class _Record:
    """Which parts are done, in ``analysis.json``; a part's tables are there before it says so."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = output
        self.folder = output / "analysis"
        self._path = output / "analysis.json"
        self._content: dict[str, Any] = {"settings": dict(settings), "environment": environment(), "parts": {}}
        if self._path.is_file():
            self._content = read_json(self._path)
            if not isinstance(self._content.get("parts"), dict):
                raise BaditError(f"{self._path}: parts: is missing; remove the file to measure anew")
            if self._content.get("settings") != dict(settings):
                raise BaditError(
                    f"{self.folder}: holds an analysis with other settings; remove it and {self._path.name} to measure "
                    "anew, or choose another --output"
                )

    def has(self, parts: Sequence[str]) -> bool:
        return all(part in self._content["parts"] for part in parts)

    def keep(self, part: str, measure: Part) -> None:
        """Measures, unless that has been done, and writes the tables."""
        if self.has([part]):
            return
        began = time.monotonic()
        tables = [table for table in measure() if table.rows]
        for table in tables:
            table.save(self.folder)
        self._content["parts"][part] = {
            "tables": [table.name for table in tables],
            "seconds": round(time.monotonic() - began, 1),
            "peak_memory_gib": round(peak_memory() / 2**30, 2),
        }
        write_json(self._path, self._content)
