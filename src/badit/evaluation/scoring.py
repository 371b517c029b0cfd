"""Trains and scores runs, and scores runs again.

A run's scores are in ``scores.json``. The scored answers are in ``predictions/``, one file per
task.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from badit.data import Task
from badit.evaluation.answers import score_model
from badit.hub.card import write_run_card
from badit.metrics.statistics import both_forms
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Split
from badit.runs.fingerprints import changed_inputs, task_fingerprints
from badit.runs.folder import RunFolder
from badit.runs.predictions import write_predictions
from badit.runs.resolved import ResolvedRun
from badit.runs.scores import read_scores
from badit.support.console import is_main_process, quiet, say
from badit.support.errors import BaditError, explained
from badit.support.files import copy_folder, exclusive, write_json, write_text
from badit.training.extending import earlier_tasks, lacks_earlier_scores
from badit.training.fit import fit
from badit.training.loading import load_run


def train_and_score(
    run: ResolvedRun, *, progress: bool = True, allow_changed_inputs: bool = False
) -> None:
    """Trains a run and scores it, or resumes it; finished work is not repeated.

    With several processes all of them train, and only rank 0 scores. Errors as of
    :func:`badit.train`.
    """
    folder = run.folder
    is_main = is_main_process()
    lock = exclusive(folder.path) if is_main else nullcontext()  # rank 0 locks it for all
    with explained(folder.path), lock:
        fit(run, progress=progress and is_main, allow_changed_inputs=allow_changed_inputs)
        if torch.distributed.is_initialized():
            # The other processes end here and take no part in the scoring.
            torch.distributed.destroy_process_group()
        if not is_main:
            return
        if folder.scores_path.is_file():
            write_run_card(folder)  # an interrupted run may have scores but no card
        else:
            evaluate(run, progress=progress, resume=True)
        score_earlier(run, progress=progress)


def evaluate(
    run: ResolvedRun, *, split: Split | None = None, progress: bool = True, resume: bool = False
) -> dict[str, Any]:
    """Scores a run on its tasks, and writes the scores and predictions to its folder.

    The recipe's own split is written to ``scores.json`` and ``predictions/``, another split to
    ``scores-SPLIT.json`` and ``predictions-SPLIT/``. On its own split, a sequence of tasks is
    scored after each task, and the scores include the matrix of these scores. On another split,
    only the final model is scored. With ``resume``, stages that already have scores are not scored
    again. Errors as of :meth:`badit.Run.evaluate`.
    """
    own_split = run.recipe.evaluation.split
    split = split or own_split
    run.refuse_unscorable(split)
    _warn_of_changed_tasks(run, split)

    scoring = _Scoring(run, split, progress, resume)
    with exclusive(run.folder.path), quiet(not progress):
        if split != own_split:
            return scoring.score(run.folder, run.tasks)
        # The untuned model has no stages.
        if run.recipe.data.order and run.method.trains:
            scores = scoring.score_stages()
        else:
            scores = scoring.score(run.folder, run.tasks)
        write_run_card(run.folder)
    return scores


def score_earlier(run: ResolvedRun, *, progress: bool = True) -> dict[str, Any] | None:
    """Scores the tasks of ``extend.earlier``, which other runs trained; None without that source.

    Written to ``scores-earlier.json``, and not scored again if the file exists, unless the source
    has changed.
    """
    if run.recipe.extend.run is None or run.recipe.extend.earlier is None:
        return None
    path = run.folder.earlier_scores_path
    if lacks_earlier_scores(run):
        tasks = earlier_tasks(run)
        split = run.recipe.evaluation.split
        model, tokenizer = load_run(run)
        scores, _ = score_model(model, tokenizer, run.recipe, tasks, split, progress=progress)
        write_json(path, scores)
        # After the scores, which are missing until the recipe names their source.
        saved = run.folder.recipe
        section = saved.extend.model_copy(update={"earlier": run.recipe.extend.earlier})
        saved = saved.model_copy(update={"extend": section})
        write_text(run.folder.config_path, dump_recipe(saved))
    return read_scores(path)


def _warn_of_changed_tasks(run: ResolvedRun, split: Split) -> None:
    changed = ", ".join(changed_inputs(run.folder, task_fingerprints(run.tasks)))
    if not changed:
        return
    if split == "validation":  # drawn again from the changed data
        problem = f"{changed} changed, so trained instances may be held out"
        fix = "restore them, or train again with another output=FOLDER"
        raise BaditError(f"{run.folder.path}: {problem}; {fix}")
    say(f"badit: {changed} changed since the run was trained")


@dataclass
class _Scoring:
    """The scoring of a run's instances in ``split``."""

    run: ResolvedRun
    split: Split
    progress: bool
    resume: bool  # keep scores that exist

    def score(self, folder: RunFolder, tasks: Sequence[Task]) -> dict[str, Any]:
        """Scores the weights in a folder, the run's own or a stage's; returns the scores."""
        is_own = self.split == self.run.recipe.evaluation.split
        suffix = "" if is_own else f"-{self.split}"
        path = folder.path / f"scores{suffix}.json"
        if not self.resume or not path.is_file():
            model, tokenizer = load_run(self.run, folder)
            scores, predictions = score_model(
                model,
                tokenizer,
                self.run.recipe,
                tasks,
                self.split,
                progress=self.progress,
                reference=None if self.run.method.trains else model,
            )
            write_predictions(folder.path / f"predictions{suffix}", predictions)
            # After the predictions: the file of scores marks a stage as finished.
            write_json(path, scores)
        return read_scores(path)

    def score_stages(self) -> dict[str, Any]:
        """Scores a sequence after each of its tasks; returns the last scores with all others."""
        run = self.run
        scores_by_stage = []
        for number, (folder, _) in enumerate(run.stages, start=1):
            tasks = run.tasks
            # Scores of tasks not trained yet are optional; the matrix has None for them.
            if not run.recipe.evaluation.unseen_tasks:
                tasks = tasks[:number]
            scores_by_stage.append(self.score(folder, tasks))

        names = [task.name for task in run.tasks]
        matrix = []
        for stage_scores in scores_by_stage:
            by_task = stage_scores["tasks"]
            matrix.append([by_task.get(name, {}).get("rouge_l") for name in names])
        # The run's own predictions and scores are those of its last stage.
        last_folder, _ = run.stages[-1]
        copy_folder(last_folder.predictions_path, run.folder.predictions_path)
        scores = scores_by_stage[-1]
        scores |= {"order": names, "matrix": matrix, "continual": both_forms(matrix)}
        write_json(run.folder.scores_path, scores)
        return scores
