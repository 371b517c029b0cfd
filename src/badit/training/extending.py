"""Adds tasks to a trained run, and says before the training what this changes.

:func:`check_extension` loads the earlier run and compares the prompts of the new tasks with its
clusters. It writes nothing.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from badit.data.examples import AnswerCollator, batches_by_task, encode_tasks
from badit.data.sampling import mixture
from badit.data.tasks import Task
from badit.recipe.method import resolve_method
from badit.recipe.schema import ExtendSection
from badit.runs.fingerprints import base_fingerprints, changed_inputs, tokenizer_fingerprint
from badit.runs.folder import RunFolder
from badit.runs.resolved import ResolvedRun
from badit.support.console import say_once, status
from badit.support.errors import BaditError
from badit.training.loading import load_base
from badit.training.methods import training_method
from badit.tuner.additions import Survey
from badit.tuner.model import TaskBatches, hooks_of

_CONFUSED = 0.05  # of a new task's prompts; smaller shares are not reported
_LISTED = 3  # earlier tasks that lose the largest shares of their prompts


def add_tasks(model: Any, section: ExtendSection, tasks: Sequence[str]) -> None:
    """Adds the tasks of a stage to a trained model."""
    _hooks(model).add_tasks(
        tasks,
        rank=section.rank,
        clusters=section.clusters,
        reused=section.reused,
        start=section.start,
        mixing=section.mixing,
    )


def refuse_new_expert(model: Any, section: ExtendSection) -> None:
    """Raises the errors of :func:`add_tasks` before anything is written."""
    _hooks(model).refuse_new_expert(section.rank, section.mixing)


def compared(model: Any, section: ExtendSection, batches: TaskBatches) -> Survey:
    """Compares the prompts of new tasks with the clusters of a trained model."""
    return _hooks(model).survey(batches, threshold=section.coverage, clusters=section.clusters)


def train_covering(model: Any, batches: TaskBatches) -> None:
    """Trains the experts of the existing clusters that cover the prompts of batches."""
    _hooks(model).merge_tasks(batches)


def _hooks(model: Any) -> Any:
    # Of a resolved run whose method is BADIT, these are a BaditModel.
    return hooks_of(model)


def check_extension(run: ResolvedRun) -> None:
    """Refuses what cannot be added, and says which tasks the new prompts would be confused with.

    The prompts of a run that has begun are not compared again.

    Raises:
        BaditError: the earlier run has no adapter, is of another method, or has a task of the same
            name; the base model or the tokenizer has changed; existing clusters cover a task, or
            the new tasks would take too many prompts from an earlier one.
    """
    if lacks_earlier_scores(run):
        earlier_tasks(run)  # not only after the training
    # A comparison has written the recipe of each cell before it starts.
    if run.has_begun() and run.folder.environment_path.is_file():
        return
    lines = _compare(run)
    # Models have cycles of references; the training loads its own.
    gc.collect()
    for line in lines:
        say_once(f"badit: {line}")


def _compare(run: ResolvedRun) -> list[str]:
    """Compares the new tasks with the earlier run, and returns what this shows."""
    section = run.recipe.extend
    earlier = _earlier_run(run)
    base, tokenizer = load_base(run.recipe)
    inputs = base_fingerprints(base)
    inputs |= tokenizer_fingerprint(tokenizer, run.recipe.prompt.chat_template)
    changed = changed_inputs(earlier, inputs)
    if changed:
        problem = f"{', '.join(changed)} changed since the run was trained"
        raise BaditError(f"{earlier.path}: {problem}; restore it, or train a new run")

    model = training_method(run.method).load(base, earlier.adapter_path)
    names = [task.name for task in run.tasks]
    config = model.peft_config["default"]
    for name in names:
        if name in config.all_tasks and not section.merge:
            fix = "rename it, such as with data.task=NAME"
            raise BaditError(f"task {name}: {earlier.path} has a task of this name; {fix}")
    if not section.merge:
        refuse_new_expert(model, section)
    elif section.mixing is not None:
        problem = "merging adds no expert, so mixing cannot be set"
        raise BaditError(f"extend.merge: {problem}; leave extend.mixing out")
    with status("comparing the prompts"):
        options = run.recipe.prompt.model_dump()
        order = mixture(run.tasks, run.recipe.data.seed)
        examples = encode_tasks(tokenizer, run.tasks, options, order, progress=False)
        size = run.recipe.training.per_device_train_batch_size
        batches = batches_by_task(examples, AnswerCollator(tokenizer.pad_token_id), size)
        result = compared(model, section, batches)
    _refuse(result, section, names)
    if section.merge:
        return [*_report_of_merging(model, result, batches)]
    mixing = config.mixing if section.mixing is None else section.mixing
    return [*report(result), *_report_of_mixing(mixing)]


def lacks_earlier_scores(run: ResolvedRun) -> bool:
    """Returns whether the tasks of ``extend.earlier`` are to be scored."""
    source = run.recipe.extend.earlier
    if source is None:
        return False
    has_scores = run.folder.earlier_scores_path.is_file()
    return not has_scores or run.folder.recipe.extend.earlier != source


def earlier_tasks(run: ResolvedRun) -> list[Task]:
    """Returns the tasks of ``extend.earlier`` to score; BaditError without any."""
    source = run.recipe.extend.earlier
    data = run.recipe.data.model_copy(update={"source": source, "tasks": None, "order": None})
    split = run.recipe.evaluation.split
    new = {task.name for task in run.tasks}
    tasks = [task for task in data.load() if getattr(task, split) and task.name not in new]
    if not tasks:
        raise BaditError(f"extend.earlier: {source}: has no {split} instances of earlier tasks")
    return tasks


def _earlier_run(run: ResolvedRun) -> RunFolder:
    """Returns the run that is extended; BaditError unless it is finished and of BADIT."""
    earlier = RunFolder(run.recipe.extend.run or "")
    method = resolve_method(earlier.recipe.method)
    if not method.adds_tasks:
        reason = "tasks can be added to BADIT with clusters or a router per prompt"
        raise BaditError(f"{earlier.path}: is a run of {method.name}; {reason}, so train one first")
    if not earlier.adapter_path.is_dir():
        raise BaditError(f"{earlier.path}: has no adapter yet; finish its training first")
    return earlier


def _report_of_merging(model: Any, result: Survey, batches: TaskBatches) -> Iterator[str]:
    """Yields which clusters new tasks train, and which tasks change."""
    for task, shares in result.nearest.items():
        yield f"task {task} trains the clusters of {', '.join(shares)}"
    hooks = _hooks(model)
    changed = ", ".join(hooks.changed_tasks(hooks.nearest_extensions(batches)))
    yield f"the answers of {changed} will change, whose clusters or experts are trained"


def report(result: Survey) -> Iterator[str]:
    """Yields what a comparison of new tasks with an adapter shows, a line for each finding."""
    for task, shares in result.confused.items():
        clear = {other: share for other, share in shares.items() if share >= _CONFUSED}
        if clear:
            yield f"task {task} cannot be told apart from {_listed(clear)} of its prompts"
    by_share = sorted(result.taken.items(), key=lambda of_task: of_task[1], reverse=True)
    largest = _listed(dict(by_share[:_LISTED]))
    share = f"about {100 * result.taken_in_all:.1f} % of the earlier prompts"
    yield f"{share} would be nearest to the new tasks; the largest shares: {largest}"


def _report_of_mixing(temperature: float) -> Iterator[str]:
    if temperature:
        mixed = f"with extend.mixing={temperature:g}, prompts mix the experts of two tasks"
        yield f"{mixed}, so answers of earlier tasks may change"


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{task} ({100 * share:.1f} %)" for task, share in shares.items())


def _refuse(result: Survey, section: ExtendSection, names: Sequence[str]) -> None:
    if section.merge:
        uncovered = [name for name in names if name not in result.covered]
        if uncovered:
            problem = f"no cluster of the run covers {', '.join(uncovered)}"
            raise BaditError(f"extend.merge: {problem}; leave merge out, to add new clusters")
        return
    if result.covered:
        task = result.covered[0]
        nearest = next(iter(result.nearest[task]))
        problem = f"the clusters of {nearest} already cover its prompts"
        fix = "train them further with merge=true, or raise extend.coverage"
        raise BaditError(f"task {task}: {problem}; {fix}")
    taken = {task: share for task, share in result.taken.items() if share > section.largest_taken}
    if taken:
        problem = f"too many prompts of {_listed(taken)} would be nearest to the new tasks"
        fix = "give the tasks different instructions, or raise extend.largest_taken"
        raise BaditError(f"extend: {problem}; {fix}")
