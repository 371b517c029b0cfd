"""A run before its method is resolved: what can be checked without importing torch.

The import takes seconds, so a command does these checks first.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from badit.data.orders import ordered
from badit.data.tasks import Task
from badit.presets import NAMES, Options, preset_name, with_preset
from badit.recipe.options import refuse_method
from badit.recipe.saved import differing_keys
from badit.recipe.schema import Recipe, Split
from badit.runs.folder import ERROR, LOG, RunFolder, adoption
from badit.support.console import is_main_process, status
from badit.support.errors import BaditError, refuse_unknown
from badit.support.files import OWNER, exclusive, refuse_links
from badit.support.text import counted

_SINGLE = (str, int, float)

_LEAST_TO_HOLD_OUT = 4  # hold_out() takes at most a quarter of a task
TO_SCORE_ADOPTED = (
    "adopt the adapter with data that has test instances (split: test) unseen in its training"
)
_SCORE_VALIDATION = (
    "add some, or score held-out training instances with evaluation.split=validation "
    "data.validation_per_task=10"
)
_HOLD_OUT = "set data.validation_per_task to hold out some of its training instances"
_TOO_FEW = (
    f"at least {_LEAST_TO_HOLD_OUT} training instances are needed to hold one out; add some, or "
    "leave the task out of data.tasks"
)


@dataclass
class UnresolvedRun:
    """A recipe with its folder and its tasks."""

    folder: RunFolder
    recipe: Recipe

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks, read when they are first used; those of a sequence in training order."""
        return read_tasks(self.recipe)

    @property
    def training_instances(self) -> int:
        return sum(len(task.train) for task in self.tasks)

    @property
    def test_instances(self) -> int:
        return sum(len(getattr(task, self.recipe.evaluation.split)) for task in self.tasks)

    @property
    def counts(self) -> str:
        """The numbers of tasks and of training, held-out and scored instances, as text."""
        scored = self.recipe.evaluation.split
        counts = f"{self.training_instances:,} training"
        held_out = sum(len(task.validation) for task in self.tasks)
        if held_out and scored != "validation":
            counts += f", {held_out:,} held-out"
        tasks = counted(len(self.tasks), "task")
        return f"{tasks}, {counts} and {self.test_instances:,} {scored} instances"

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

    def refuse_other_run(self) -> None:
        """Raises BaditError if the folder is in use, or has other files or another recipe's run."""
        # Other ranks: rank 0 may be writing the folder.
        if not is_main_process():
            return
        # First: the files of a folder in use change, and its user must not remove it.
        if self.folder.path.is_dir():
            with exclusive(self.folder.path):
                pass
        self.has_begun()

    def _refuse_other_recipe(self) -> None:
        saved = self.folder.recipe
        methods = self._comparable_methods(saved)
        # A run may have been moved, and ignores the section compare. Earlier tasks are only scored.
        ignored: Any = {"output": True, "compare": True, "extend": {"earlier"}}
        first, second = (
            recipe.model_copy(update={"method": method}).model_dump(mode="json", exclude=ignored)
            for recipe, method in zip((saved, self.recipe), methods, strict=True)
        )
        keys = differing_keys(first, second)
        if keys:
            problem = f"holds a run of another recipe (it differs in {', '.join(keys[:5])})"
            fix = "choose another output=FOLDER, or remove the folder"
            if tuple(method["name"] for method in methods) == ("cluster-gates", "badit"):
                former = "write name: cluster-gates, which badit stood for in earlier versions"
                fix = f"{former}, or {fix}"
            raise BaditError(f"{self.folder.path}: {problem}; {fix}")

    def _comparable_methods(self, saved: Recipe) -> tuple[Options, Options]:
        """Returns the parts of the saved and of this method section that can be compared."""
        # Only single values that both have: the saved section has every option, and resolving can
        # fill in, sort or nest others.
        names = [
            name
            for name in saved.method.keys() & self.recipe.method.keys()
            if isinstance(saved.method[name], _SINGLE)
            and isinstance(self.recipe.method[name], _SINGLE)
        ]
        saved_part, part = (
            {**{name: section[name] for name in names}, "name": _name_of(section)}
            for section in (saved.method, self.recipe.method)
        )
        return saved_part, part

    def refuse_task_of_earlier_run(self, name: str) -> None:
        """Raises BaditError for a task that an earlier run has, which this run extends.

        An extended run has the data of its own tasks only.
        """
        earlier = self.recipe.extend.run
        has_data = self.recipe.data.source is not None
        if earlier is None or (has_data and name in [task.name for task in self.tasks]):
            return
        extensions = self.folder.adapter_option("extensions") or []
        known = [self.folder.adapter_option("tasks") or [], *(one["tasks"] for one in extensions)]
        if any(name in tasks for tasks in known):
            fix = f"give {earlier} instead, which answers it as this run does"
            merges = self.recipe.extend.merge
            if merges or self.folder.adapter_option("mixing"):  # may have changed the answers
                before = f"{earlier} answers it as before {'merge=true' if merges else 'this task'}"
                fix = f"{before}; for this run's answers: {adoption(self.folder.adapter_path)}"
            raise BaditError(f"--task: {name} is a task of an earlier run; {fix}")

    def refuse_unusable(self) -> None:
        """Raises BaditError if the tasks cannot be trained and scored as the recipe says."""
        self.refuse_other_objective()
        self.refuse_untrainable()
        self.refuse_unscorable(self.recipe.evaluation.split)

    def refuse_unscorable(self, split: Split) -> None:
        """Raises BaditError if a task that must be scored has no instances in ``split``.

        If some tasks have no training instances, as in official split lists, the others need no
        test instances.
        """
        refuse_unknown("split", split, get_args(Split))
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
                if self.folder.is_adopted:
                    fix = TO_SCORE_ADOPTED
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


def _name_of(section: Options) -> str:
    """Returns the name that the resolved section has."""
    name = section.get("name", "badit")
    if name not in NAMES:
        return name
    return preset_name({"regroup": None, **with_preset(section), "name": name})


def read_run(recipe: Recipe) -> UnresolvedRun:
    """Reads the tasks of a recipe; BaditError with a line for each reason not to train it.

    What only the model and the method's classes can refuse is checked later, with torch.
    """
    run = UnresolvedRun(RunFolder.at(recipe.output), recipe)
    problems = []
    for check in (lambda: refuse_method(recipe.method), run.refuse_unusable, run.refuse_other_run):
        try:
            check()
        except BaditError as error:
            problems.append(str(error))
    if problems:
        raise BaditError(*problems)
    return run


def read_tasks(recipe: Recipe) -> list[Task]:
    """Reads a recipe's tasks; those of a sequence in training order."""
    with status("reading the tasks", in_logs=True):
        tasks = recipe.data.load()
    if recipe.data.order is not None:
        tasks = ordered(tasks, recipe.data.order)
    return tasks


def _files_in(folder: Path) -> set[Path]:
    """Returns the files in a folder, without those of a process that was killed while writing."""
    if not folder.is_dir():
        return set()
    paths = folder.rglob("*")
    files = {path for path in paths if path.suffix != ".partial" and not path.is_dir()}
    return files - {folder / OWNER}
