"""A resolved run: the recipe with every default filled in, its method and its tasks.

Training, evaluation, comparison, analysis and export receive one, and derive no defaults. The
folder of a run has the resolved recipe as config.yaml.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from badit.data.orders import ordered
from badit.data.tasks import Task
from badit.recipe.method import ResolvedMethod, resolve_method
from badit.recipe.saved import differing_keys, dump_recipe
from badit.recipe.schema import Recipe, Split
from badit.runs.folder import ERROR, LOG, RunFolder
from badit.support.console import status
from badit.support.errors import BaditError
from badit.support.files import OWNER, read_json, refuse_links, write_text
from badit.tuner.config import Extension

# With up to this number of mixed tasks, one cluster of prompts per task: more raised the loss
# (benchmarks/experiments/few-tasks.md).
_ONE_CLUSTER_PER_TASK = 8

_LEAST_TO_HOLD_OUT = 4  # hold_out() takes at most a quarter of a task
_SCORE_VALIDATION = (
    "to score held-out training instances: evaluation.split=validation data.validation_per_task=10"
)
_HOLD_OUT = "set data.validation_per_task to hold out some of its training instances"
_TOO_FEW = (
    f"at least {_LEAST_TO_HOLD_OUT} training instances are needed to hold one out; add some, or "
    "leave the task out of data.tasks"
)


@dataclass
class ResolvedRun:
    """A recipe with every default, its method and its tasks, before a model is loaded."""

    folder: RunFolder
    recipe: Recipe
    method: ResolvedMethod

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks, read when they are first used; those of a sequence in training order."""
        return read_tasks(self.recipe)

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

    @property
    def training_instances(self) -> int:
        return sum(len(task.train) for task in self.tasks)

    @property
    def test_instances(self) -> int:
        return sum(len(getattr(task, self.recipe.evaluation.split)) for task in self.tasks)

    def prepare_folder(self) -> None:
        """Creates the folder, or reuses it if it has a run of the same recipe; else BaditError."""
        if self.has_begun():
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        # Left by an attempt that failed, maybe with other data.
        self.folder.environment_path.unlink(missing_ok=True)
        write_text(self.folder.config_path, dump_recipe(self.recipe))

    def has_begun(self) -> bool:
        """Returns whether the folder has a run of this recipe; BaditError if it has other files."""
        folder = self.folder
        refuse_links(folder.path)
        first_files = {folder.config_path, folder.environment_path}
        written = _files_in(folder.path)
        # An attempt that failed before its first step: another recipe may use the folder.
        failed_files = {*first_files, folder.path / ERROR, folder.path / LOG}
        if first_files <= written <= failed_files:
            return False
        if folder.config_path.is_file():
            self._refuse_other_recipe()
            return True
        if folder.path.exists() and (written or not folder.path.is_dir()):
            problem = "exists and is not a run's folder; choose another output=FOLDER"
            raise BaditError(f"{folder.path}: {problem}")
        return False

    def _refuse_other_recipe(self) -> None:
        saved, _ = _with_method_defaults(self.folder.recipe, self.tasks)
        # A run may have been moved, and ignores the section compare.
        excluded = {"output", "compare"}
        keys = differing_keys(
            saved.model_dump(mode="json", exclude=excluded),
            self.recipe.model_dump(mode="json", exclude=excluded),
        )
        if keys:
            problem = f"holds a run of another recipe (it differs in {', '.join(keys[:5])})"
            fix = "choose another output=FOLDER, or remove the folder"
            names = (saved.method["name"], self.recipe.method["name"])
            if names == ("cluster-gates", "badit"):
                former = "write name: cluster-gates, which badit stood for in earlier versions"
                fix = f"{former}, or {fix}"
            raise BaditError(f"{self.folder.path}: {problem}; {fix}")

    def refuse_unscorable(self, split: Split) -> None:
        """Raises BaditError if a task that must be scored has no instances in ``split``.

        If some tasks have no training instances, as in official split lists, the others need no
        test instances.
        """
        some_untrained = not all(task.train for task in self.tasks)
        for task in self.tasks:
            may_lack = not task.train
            if split == "test":
                may_lack = some_untrained and bool(task.train)
            if getattr(task, split) or may_lack:
                continue
            fix = self._fix_of_validation(task)
            if split == "test" and len(task.train) >= _LEAST_TO_HOLD_OUT:
                fix = _SCORE_VALIDATION
            raise BaditError(f"data: task {task.name} has no {split} instances; {fix}")

    def refuse_other_objective(self) -> None:
        """Raises BaditError unless all tasks have the kind of data that the objective needs."""
        pairs = {task.name: task.has_preferences for task in self.tasks}
        with_pairs = next((name for name, has_pairs in pairs.items() if has_pairs), None)
        without = next((name for name, has_pairs in pairs.items() if not has_pairs), None)
        if with_pairs is not None and without is not None:
            raise BaditError(
                f"data: task {with_pairs} has preferences (chosen, rejected), but task {without} "
                "has single answers; train them in two runs, with data.tasks"
            )
        if self.recipe.training.objective == "dpo" and without is not None:
            raise BaditError(
                f"training.objective: dpo needs rows with prompt, chosen and rejected, but task "
                f"{without} has single answers; use training.objective=sft"
            )
        if self.recipe.training.objective == "sft" and with_pairs is not None:
            raise BaditError(
                f"data: task {with_pairs} has preferences; set training.objective=dpo, or train on "
                "the chosen answers alone with data.columns={input: prompt, output: chosen}"
            )

    def refuse_untrainable(self) -> None:
        """Raises BaditError if the tasks cannot be trained as the recipe says."""
        if not any(task.train for task in self.tasks):
            raise BaditError("data: no task has training instances; add some")
        for task in self.tasks:
            measures_loss = self.recipe.training.eval_strategy != "no"
            if measures_loss and task.train and not task.validation:
                problem = f"task {task.name} has no validation instances"
                fix = self._fix_of_validation(task)
                raise BaditError(f"training.eval_strategy: {problem}; {fix}")
            if self.recipe.data.order is not None and not task.train:
                problem = "has no training instances, which data.order needs; add some"
                raise BaditError(f"data: task {task.name} {problem}")
            if self.recipe.extend.run is not None and not task.train:
                fix = "add some, or leave it out with data.tasks"
                raise BaditError(f"data: task {task.name} has no training instances; {fix}")

    def _fix_of_validation(self, task: Task) -> str:
        if self.recipe.data.validation_per_task or len(task.train) < _LEAST_TO_HOLD_OUT:
            return _TOO_FEW
        return _HOLD_OUT


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
    run.refuse_other_objective()
    run.refuse_untrainable()
    run.refuse_unscorable(recipe.evaluation.split)
    return run


def open_run(folder: RunFolder) -> ResolvedRun:
    """Returns the run in a folder; its tasks are read when they are used.

    BaditError if its model runs its own Python code and the folder was opened without allowing it.
    """
    recipe = folder.trusted_recipe()
    method = resolve_method(recipe.method)
    # In format 4, only the adapter has the default that depends on the data.
    if method.is_badit and "num_clusters" not in recipe.method:
        clusters = _saved_option(folder.adapter_path, "num_clusters")
        if clusters is not None:
            method = resolve_method({**recipe.method, "num_clusters": clusters})
    if method.adds_tasks:
        _read_extensions(method, folder.adapter_path)
    recipe = recipe.model_copy(update={"method": dict(method.section)})
    return ResolvedRun(folder, recipe, method)


def _saved_option(adapter_path: Path, name: str) -> Any:
    """Returns an option of an adapter's configuration, unchecked, or None."""
    config_path = adapter_path / CONFIG_NAME
    if not config_path.is_file():
        return None
    return read_json(config_path).get(name)


def _read_extensions(method: ResolvedMethod, adapter_path: Path) -> None:
    """Reads which tasks were added to an adapter: its gates vary then, also with one expert."""
    extensions = _saved_option(adapter_path, "extensions")
    if not extensions:
        return
    try:
        method.options.extensions = [Extension.of(entry) for entry in extensions]
    except (BaditError, TypeError) as error:
        raise BaditError(f"{adapter_path / CONFIG_NAME}: {error}") from None


def read_tasks(recipe: Recipe) -> list[Task]:
    """Reads a recipe's tasks; those of a sequence in training order."""
    with status("reading the tasks", in_logs=True):
        tasks = recipe.data.load()
    if recipe.data.order is not None:
        tasks = ordered(tasks, recipe.data.order)
    return tasks


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


def _files_in(folder: Path) -> set[Path]:
    """Returns the files in a folder, without those of a process that was killed while writing."""
    if not folder.is_dir():
        return set()
    paths = folder.rglob("*")
    files = {path for path in paths if path.suffix != ".partial" and not path.is_dir()}
    return files - {folder / OWNER}
