"""What to export, and the checks of it that need no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badit.data.orders import resolve_names
from badit.presets import NAMES, filled, with_preset
from badit.recipe.options import read_method_table
from badit.runs.folder import RECORD, AnyPath, read_export
from badit.runs.unresolved import UnresolvedRun
from badit.support.errors import BaditError
from badit.support.files import OWNER, read_json, refuse_links

SCORES = "scores.json"


@dataclass(frozen=True)
class ExportOptions:
    """What to export; see :meth:`badit.Run.export`."""

    task: str | None = None
    all_tasks: bool = False
    gates: AnyPath | None = None
    rank: int | None = None
    merged: bool = False

    @property
    def fixes_gates(self) -> bool:
        return self.task is not None or self.all_tasks or self.gates is not None


def refuse_export(run: UnresolvedRun, output: AnyPath, options: ExportOptions) -> None:
    """Raises BaditError for the folder, the file of gates, and gates that are not fixed."""
    _refuse_other_files(Path(output))
    if options.gates is not None:
        read_export(Path(options.gates))
    if options.task is not None:
        run.refuse_task_of_earlier_run(options.task)
        resolve_names([options.task], [task.name for task in run.tasks], field="--task")
    _refuse_varying_gates(run, options)


def _refuse_varying_gates(run: UnresolvedRun, options: ExportOptions) -> None:
    """Raises BaditError if a run's gates vary, and no option says to what they are fixed."""
    name = run.recipe.method.get("name", "badit")
    needs_task = name in read_method_table()["need_task"]
    if needs_task and options.task is None and not options.all_tasks:
        raise BaditError(f"{name} learns each task separately: choose one with --task")
    # Such a LoRA's NLL was 0.38 per token above the run's (benchmarks/experiments/fixed-gates.md).
    if not options.fixes_gates and _varies_by_cluster(run):
        trained = [task.name for task in run.tasks if task.train]
        if len(trained) > 1:
            problem = "with clusters of prompts, the mean gates of several tasks fit no prompt"
            fix = "use --all-tasks, for a LoRA per task, or --task"
            raise BaditError(f"{run.folder.path}: {problem}; {fix}")


def _varies_by_cluster(run: UnresolvedRun) -> bool:
    section = run.recipe.method
    if section.get("name", "badit") not in NAMES:
        return False
    options = filled(with_preset(section))
    has_several = options.get("num_experts") != 1 or run.folder.adapter_option("extensions")
    return options["gates"] == "clusters" and bool(has_several)


def _refuse_other_files(folder: Path) -> None:
    """Raises BaditError unless the folder is new, empty, or has only an earlier export."""
    fix = "choose another folder with -o"
    if folder.exists() and not folder.is_dir():
        raise BaditError(f"{folder}: is a file; {fix}")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise BaditError(f"{folder}: contains the current folder and would be replaced; {fix}")
    written: list[Any] = [OWNER]
    if (folder / RECORD).is_file():
        refuse_links(folder)
        files = read_json(folder / RECORD).get("files")
        if isinstance(files, list):
            # The scores are measured after the record is written.
            written += [RECORD, SCORES, *files]
    for path in sorted(folder.glob("*")):
        if path.name.removesuffix(".partial") not in written:  # left by a killed process
            raise BaditError(f"{folder}: holds {path.name}, which badit did not write; {fix}")
        # An export of all tasks has an export of each task.
        if path.is_dir():
            _refuse_other_files(path)
