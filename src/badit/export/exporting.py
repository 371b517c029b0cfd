"""``badit export``: writes a run as a plain LoRA adapter or a merged model.

An export's folder has the files that PEFT or transformers loads without badit, the model card
``README.md``, ``export.json`` (the run, the SHA-256 of its weights, the options, the error and the
files), ``gates.json`` (the fixed gates: for each module, one per expert) and, if it was scored,
``scores.json``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm

from badit.analysis.gates import GATES_FILE, PROMPTS_PER_TASK, Gates, read_gates, task_gates
from badit.data.orders import resolve_names
from badit.export.adapter import write_adapter
from badit.export.factors import (
    NOT_A_LORA,
    VLLM_RANKS,
    beyond_lora,
    compressed,
    lora_factors,
    merged_model,
    mixture_factors,
)
from badit.export.options import SCORES, ExportOptions, refuse_export
from badit.hub.card import CARD, hub_id, model_card
from badit.runs.folder import RECORD, AnyPath
from badit.runs.resolved import ResolvedRun
from badit.support.console import status
from badit.support.errors import BaditError, explained
from badit.support.files import exclusive, remove, replace_folder, write_json, write_text
from badit.support.text import counted
from badit.training.checkpoints import checksums
from badit.training.loading import load_run
from badit.tuner import ExpertConfig


@dataclass(frozen=True)
class Export:
    """A written export."""

    folder: Path
    #: The content of its ``export.json`` without the list of files. For a compressed LoRA,
    #: ``relative_error`` has ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius norm) of the adapter's update ΔW by
    #: ``modules``, and of all together in ``total``.
    record: Mapping[str, Any]
    #: For an export of all tasks, the export of each task. The record then has the ranks and errors
    #: of the worst one.
    tasks: Mapping[str, "Export"] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """The rank of the adapter; None for a merged model."""
        return self.record.get("rank")

    @property
    def max_lora_rank(self) -> int | None:
        """The value for vLLM's ``--max-lora-rank``; None for a merged model."""
        if self.rank is None:
            return None
        return next(rank for rank in VLLM_RANKS if rank >= self.rank)

    @property
    def total_error(self) -> float:
        """The relative error of all modules together; 0 if the export is exact."""
        return self.record.get("relative_error", {"total": 0.0})["total"]


@dataclass(frozen=True)
class _Mixture:
    """The fixed gates of one adapter; None if the method has no gates that depend on the prompt."""

    task: str | None = None
    description: str | None = None
    gates: Gates | None = None


def export(
    run: ResolvedRun,
    output: AnyPath,
    options: ExportOptions = ExportOptions(),
    *,
    progress: bool = True,
) -> Export:
    """Writes a run's adapter as a plain LoRA or a merged model; see :meth:`badit.Run.export`.

    ``output`` must be new, empty or an earlier export. The LoRA equals the adapter with fixed gates
    exactly, unless ``rank`` is below the exact rank or the exact rank is above 512, vLLM's maximum.
    It is then compressed by SVD.
    """
    output = Path(output)
    # Everything that can be refused is refused before the model is loaded.
    _refuse_options(run, options)
    refuse_export(run, output, options)
    if options.all_tasks:
        _refuse_reserved_names(run)
    chosen_task = _chosen_task(run, options)
    model, tokenizer = load_run(run)
    if options.gates is not None:
        path = Path(options.gates)
        mixtures = [_Mixture(None, f"gates of {path.name}", read_gates(path, model))]
    elif _mixes_experts(run):
        mixtures = _mean_gates(run, model, tokenizer, chosen_task, options, progress)
    else:
        mixtures = [_Mixture(chosen_task)]

    exporter = _Exporter(run, output, options, model, tokenizer)
    # Written next to the folder and renamed, so that a reader never sees an incomplete export.
    unfinished = output.with_name(f".{output.name}.badit.partial")  # no user's folder has this name
    with status("exporting", in_logs=True), explained(output, action="written"), exclusive(output):
        try:
            remove(unfinished)
            if options.all_tasks:
                done = exporter.write_tasks(mixtures, unfinished)
            else:
                done = exporter.write(mixtures[0], unfinished)
            replace_folder(unfinished, output)
        finally:
            remove(unfinished)
    return done


class _Exporter:
    """Writes the parts of an export to a temporary folder."""

    def __init__(
        self,
        run: ResolvedRun,
        output: Path,
        options: ExportOptions,
        model: Any,  # a PeftModel, except for methods that train the base weights
        tokenizer: Any,
    ) -> None:
        self.run = run
        self.output = output
        self.options = options
        self.model = model
        self.tokenizer = tokenizer
        # push and serve refuse an export of earlier weights by these checksums.
        weights = checksums(run.folder.adapter_path, "*.safetensors")
        self.common = {"method": run.method.name, "weights": weights}
        # A whole path, because AutoPeftModel loads the base model by the name in the adapter.
        model_name = Path(run.recipe.model.name).expanduser().resolve()
        self.base_name = hub_id(run.recipe) or str(model_name)

    def write(self, mixture: _Mixture, folder: Path, below: str = "") -> Export:
        """Writes the adapter with these gates, or the merged model, to ``folder / below``."""
        place = folder / below
        place.mkdir(parents=True)
        factors = {}  # stays empty if PEFT merges, or if the base weights were trained
        if isinstance(self.run.method.config, ExpertConfig):
            factors = mixture_factors(self.model, mixture.gates, mixture.task)
        ranks: dict[str, Any] = {}
        if self.options.merged:
            self._write_merged(factors, place)
        else:
            factors = factors or lora_factors(self.model, self.run)
            factors, ranks = compressed(factors, self.options.rank)
            base = self.model.get_base_model()
            revision = self.run.recipe.model.revision
            write_adapter(place, factors, base, self.base_name, revision)
        if mixture.gates is not None:
            write_json(place / GATES_FILE, mixture.gates)
        record = {
            "run": self._origin(self.output / below),
            **self.common,
            "mixture": mixture.description,
            "task": mixture.task,
            **ranks,
        }
        write_text(place / CARD, model_card(self.run.folder, export=record))
        # Last, because it lists the folder's files.
        _write_record(place, record)
        return Export(self.output / below, record)

    def write_tasks(self, mixtures: list[_Mixture], folder: Path) -> Export:
        """Writes an adapter per task, in subfolders."""
        tasks = {str(mixture.task): mixture for mixture in mixtures}
        exports = {task: self.write(mixture, folder, task) for task, mixture in tasks.items()}
        worst = max(exports.values(), key=lambda exported: exported.total_error)
        record = {
            **worst.record,
            "run": self._origin(self.output),
            "mixture": f"mean gates of each of {len(exports)} tasks",
            "task": None,
        }
        _write_record(folder, record)
        return Export(self.output, record, exports)

    def _write_merged(self, factors: Any, place: Path) -> None:
        merged = merged_model(self.model, factors)
        merged.save_pretrained(place)
        # Several templates would be files in a subfolder.
        has_one_template = not isinstance(self.tokenizer.chat_template, dict)
        self.tokenizer.save_pretrained(place, save_jinja_files=has_one_template)

    def _origin(self, folder: Path) -> str:
        # A relative path names none of the user's folders, and both folders can be moved together.
        return os.path.relpath(self.run.folder.path.resolve(), folder.resolve())


def _mixes_experts(run: ResolvedRun) -> bool:
    """Returns whether the gates of the experts vary, by prompt or by task."""
    config = run.method.config
    return isinstance(config, ExpertConfig) and not config.has_fixed_gates


def _refuse_options(run: ResolvedRun, options: ExportOptions) -> None:
    """Raises BaditError for options that exclude each other, or that the method does not have."""
    path = run.folder.path
    method = run.method
    chosen = (options.task is not None, options.all_tasks, options.gates is not None)
    largest = VLLM_RANKS[-1]
    mixes = _mixes_experts(run)
    if sum(chosen) > 1:
        raise BaditError("give only one of --task, --all-tasks and --gates")
    if options.merged and (options.all_tasks or options.rank):
        raise BaditError("--merged: writes a model without a rank; remove --all-tasks and --rank")
    if options.rank is not None and not 1 <= options.rank <= largest:
        raise BaditError(f"--rank: must be between 1 and {largest}, not {options.rank}")
    if not method.trains:
        problem = "is a run of the unchanged base model; there is nothing to export"
        raise BaditError(f"{path}: {problem}")
    if method.config is None and not options.merged:
        problem = f"{method.name} trains the base weights; export it with --merged"
        raise BaditError(f"{path}: {problem}")
    if options.merged and run.recipe.model.quantisation is not None:
        problem = "the base weights are quantised, and rounding would lose the adapter"
        raise BaditError(f"--merged: {problem}; remove --merged")
    if options.fixes_gates and not mixes:
        problem = f"{method.name} has no gates that vary; remove these options"
        raise BaditError(f"--task, --all-tasks, --gates: {problem}")
    if not options.merged:
        for name in beyond_lora(method.config):
            raise BaditError(f"method.{name}: {NOT_A_LORA}; export with --merged")


def _refuse_reserved_names(run: ResolvedRun) -> None:
    """Raises BaditError for a task whose folder would have the name of a file of the export."""
    for task in run.tasks:
        if task.name.removesuffix(".partial") in (RECORD, SCORES):
            problem = "its folder would have the name of a file of the export"
            fix = f"use --task {task.name}, or rename the task"
            raise BaditError(f"task {task.name}: {problem}; {fix}")


def _chosen_task(run: ResolvedRun, options: ExportOptions) -> str | None:
    """Returns the full name of the chosen task; BaditError if gates cannot be fixed to it."""
    if options.gates is not None or not _mixes_experts(run):
        return options.task
    task = options.task
    trained = [task.name for task in run.tasks if task.train]
    if task is not None:
        names = [task.name for task in run.tasks]
        (task,) = resolve_names([task], names, field="--task")
        if task not in trained:
            problem = "has no training prompts for mean gates; use --gates FILE"
            raise BaditError(f"task {task}: {problem}")
    return task


def _mean_gates(
    run: ResolvedRun,
    model: PeftModel,
    tokenizer: Any,
    chosen_task: str | None,
    options: ExportOptions,
    progress: bool,
) -> list[_Mixture]:
    """Returns the mean gates of training prompts: by task, of one task, or of all together."""
    tasks = {task.name: task for task in run.tasks}
    trained = [name for name in tasks if tasks[name].train]
    if options.all_tasks:
        groups: dict[str | None, list[str]] = {name: [name] for name in trained}
    elif chosen_task is not None:
        groups = {chosen_task: [chosen_task]}
    else:
        groups = {None: trained}
    names = list(chain(*groups.values()))
    # Cached in the run's folder, for exports with other options and for the studio.
    measured = task_gates(run.folder, model, tokenizer, run.recipe, tasks, names)
    bar = tqdm(measured, desc="Gates", unit="task", total=len(names), disable=not progress)
    gates_by_task = {name: gates.means for name, gates in bar}

    mixtures = []
    for task, group in groups.items():
        prompts = sum(len(tasks[name].train[:PROMPTS_PER_TASK]) for name in group)
        source = f"task {task}"
        if task is None:  # equally weighted
            source = f"{counted(len(group), 'task')}, averaged over tasks,"
        mean = {}
        for module in gates_by_task[group[0]]:
            gates_TK = torch.tensor([gates_by_task[name][module] for name in group])
            mean[module] = gates_TK.mean(dim=0).tolist()
        description = f"mean gates of {source} on {prompts} training prompts"
        mixtures.append(_Mixture(task, description, mean))
    return mixtures


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    files = sorted(path.name for path in folder.iterdir())
    write_json(folder / RECORD, {**record, "files": files})
