"""What to export, and the checks of it that need no torch."""

from dataclasses import dataclass

from badit.presets import NAMES, filled, with_preset
from badit.recipe.options import read_method_table
from badit.runs.folder import AnyPath
from badit.runs.unresolved import UnresolvedRun
from badit.support.errors import BaditError


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


def refuse_varying_gates(run: UnresolvedRun, options: ExportOptions) -> None:
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
