"""A resolved run: the recipe with every default filled in, its method and its tasks.

Training, evaluation, comparison, analysis and export receive one, and derive no defaults. The
folder of a run has the resolved recipe as config.yaml.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badit.data.tasks import Task
from badit.presets import Options
from badit.recipe.method import ResolvedMethod, resolve_method
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Recipe
from badit.runs.folder import ADAPTER_CONFIG, RunFolder
from badit.runs.unresolved import UnresolvedRun, read_tasks
from badit.support.errors import BaditError
from badit.support.files import refuse_links, write_text
from badit.tuner.config import Extension

# With up to this number of mixed tasks, one cluster of prompts per task: more raised the loss
# (benchmarks/experiments/few-tasks.md).
_ONE_CLUSTER_PER_TASK = 8


@dataclass(repr=False)
class ResolvedRun(UnresolvedRun):
    """A recipe with every default, its method and its tasks, before a model is loaded."""

    method: ResolvedMethod

    def __repr__(self) -> str:
        counts = f"{self.training_instances} training, {self.test_instances} test instances"
        return f"ResolvedRun({len(self.tasks)} tasks, {counts})"

    @property
    def stages(self) -> list[tuple[RunFolder, list[Task]]]:
        """The parts with their own results: all tasks of a mixed run, or one of a sequence."""
        if not self.recipe.data.order:
            return [(self.folder, self.tasks)]
        width = max(2, len(str(len(self.tasks))))  # sorted names are in training order
        stages = []
        for number, task in enumerate(self.tasks, start=1):
            path = self.folder.path / "stages" / f"{number:0{width}}-{task.name}"
            stages.append((RunFolder.at(path), [task]))
        return stages

    def starts_from(self, number: int) -> Path | None:
        """Returns the adapter that a stage starts from; None for a new one."""
        if number > 0:
            previous, _ = self.stages[number - 1]
            return previous.adapter_path
        if self.recipe.extend.run is not None:
            return RunFolder.at(self.recipe.extend.run).adapter_path
        return None

    def adds_tasks(self, number: int) -> bool:
        """Returns whether a stage adds its tasks to the adapter that it starts from."""
        section = self.recipe.extend
        if section.run is not None:
            return not section.merge
        return number > 0 and section.own_experts and self.method.adds_tasks

    @property
    def mixture(self) -> dict[str, int]:
        """The number of training instances per task in an epoch (of a sequence, of its stage)."""
        sizes = {task.name: len(task.train) for task in self.tasks}
        return self.recipe.data.quotas(self.tasks) or sizes

    def prepare_folder(self) -> None:
        """Creates the folder, or reuses it if it has a run of the same recipe; else BaditError."""
        if self.has_begun():
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        # Left by an attempt that failed, maybe with other data.
        self.folder.environment_path.unlink(missing_ok=True)
        write_text(self.folder.config_path, dump_recipe(self.recipe))

    def _comparable_methods(self, saved: Recipe) -> tuple[Options, Options]:
        saved, _ = _with_method_defaults(saved, self.tasks)
        return saved.method, self.recipe.method


def resolve(recipe: Recipe, tasks: list[Task] | None = None) -> ResolvedRun:
    """Fills in a recipe's defaults, and checks that its tasks can be trained and scored.

    ``tasks`` are the tasks of the recipe, if they are read already. Loads no model.
    """
    method = resolve_method(recipe.method)
    # Before the tasks are read, which may take long.
    method.refuse_recipe(recipe)
    if tasks is None:
        tasks = read_tasks(recipe)
    trusts_code = recipe.model.trust_remote_code
    folder = RunFolder(recipe.output, check=False, trust_remote_code=trusts_code)
    recipe, method = _with_method_defaults(recipe, tasks, _saved_clusters(folder))
    run = ResolvedRun(folder, recipe, method)
    # Fills the cached property, so that the data is not read again.
    run.tasks = tasks
    run.refuse_unusable()
    return run


def open_run(folder: RunFolder, tasks: list[Task] | None = None) -> ResolvedRun:
    """Returns the run in a folder; its tasks are read when they are used, unless they are given.

    BaditError if its model runs its own Python code and the folder was opened without allowing it.
    """
    recipe = folder.trusted_recipe()
    method = resolve_method(recipe.method)
    # In format 4, only the adapter has the default that depends on the data.
    if method.is_badit and "num_clusters" not in recipe.method:
        clusters = folder.adapter_option("num_clusters")
        if clusters is not None:
            method = resolve_method({**recipe.method, "num_clusters": clusters})
    if method.adds_tasks:
        _read_extensions(method, folder)
    recipe = recipe.model_copy(update={"method": dict(method.section)})
    run = ResolvedRun(folder, recipe, method)
    if tasks is not None:
        run.tasks = tasks
    return run


def _read_extensions(method: ResolvedMethod, folder: RunFolder) -> None:
    """Reads which tasks were added to an adapter: its gates vary then, also with one expert."""
    extensions = folder.adapter_option("extensions")
    if not extensions:
        return
    try:
        method.options.extensions = [Extension.of(entry) for entry in extensions]
    except (BaditError, TypeError) as error:
        raise BaditError(f"{folder.adapter_path / ADAPTER_CONFIG}: {error}") from None


def _saved_clusters(folder: RunFolder) -> Any:
    """Returns the number of clusters of the run in a folder, unchecked, or None.

    It stays when the run is resumed, also if tasks were added to the data since.
    """
    if not folder.config_path.is_file():
        return None
    refuse_links(folder.path)
    return folder.recipe.method.get("num_clusters")


def _with_method_defaults(
    recipe: Recipe, tasks: list[Task], saved_clusters: Any = None
) -> tuple[Recipe, ResolvedMethod]:
    """Returns a recipe whose method section has every option, and the method.

    ``saved_clusters`` is the number of clusters that the run was begun with.
    """
    section = dict(recipe.method)
    method = resolve_method(section)
    trained = sum(bool(task.train) for task in tasks)
    is_mixed = recipe.data.order is None
    if method.is_badit and is_mixed and 0 < trained <= _ONE_CLUSTER_PER_TASK:
        # A number in the recipe takes precedence.
        section.setdefault("num_clusters", saved_clusters or trained)
        method = resolve_method(section)
    return recipe.model_copy(update={"method": dict(method.section)}), method
