"""Scores of the untuned model on a few instances, next to the run's on the same instances."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from badit.data import Task
from badit.evaluation.answers import score_model
from badit.metrics.answers import METRICS, Prediction, instance_scores, mean_scores, score_text
from badit.runs.predictions import prediction_files, read_predictions, write_predictions
from badit.runs.resolved import ResolvedRun
from badit.support.console import quiet
from badit.support.text import counted, text_table
from badit.training.loading import load_base

FOLDER = "predictions-untuned"  # of a run: the untuned model's answers


class BothScores(NamedTuple):
    """The mean scores of the untuned model and of a run on the same instances of each task."""

    untuned: Mapping[str, Any]
    tuned: Mapping[str, Any]

    def text(self) -> str:
        """Returns a table of both, and the number of tasks whose NLL is lower after tuning."""
        tasks = self.tuned["tasks"]
        metrics = [name for name in METRICS if name in self.untuned and name in self.tuned]
        rows = [
            [title, *(score_text(scores[name], name) for name in metrics)]
            for title, scores in (("untuned model", self.untuned), ("this run", self.tuned))
        ]
        count = max(of_task["instances"] for of_task in tasks.values())
        instances = counted(count, "instance")
        header = [f"the first {instances} per task", *(METRICS[name].label for name in metrics)]
        lines = [text_table(header, rows)]
        if "nll" in metrics:
            lower = sum(
                of_task["nll"] < self.untuned["tasks"][name]["nll"]
                for name, of_task in tasks.items()
            )
            lines.append(f"The NLL is lower in {lower} of {counted(len(tasks), 'task')}.")
        return "\n".join(lines)


def beside_untuned(run: ResolvedRun, *, progress: bool = True) -> BothScores | None:
    """Scores the untuned model on the first ``evaluation.untuned`` instances of each task.

    Its answers are kept in the run's folder, and used again. None if the key is 0, or if the run
    itself is the untuned model.
    """
    count = run.recipe.evaluation.untuned
    if not count or not run.method.trains:
        return None
    tuned = _first(run.folder.predictions_path, count)
    tasks = [task for task in run.tasks if task.name in tuned]
    folder = run.folder.path / FOLDER
    # An interrupted run may have left the folder empty.
    untuned = _first(folder, count) if prediction_files(folder) else {}
    if _instances(untuned) != _instances(tuned):
        with quiet(not progress):
            model, tokenizer = load_base(run.recipe)
            split = run.recipe.evaluation.split
            few = [_shortened(task, split, count) for task in tasks]
            _, answers = score_model(
                model, tokenizer, run.recipe, few, split, progress=progress, reference=model
            )
        write_predictions(folder, answers)
        untuned = _first(folder, count)
    both = [
        mean_scores(instance_scores([answer for task in tasks for answer in answers[task.name]]))
        for answers in (untuned, tuned)
    ]
    return BothScores(*both)


def _shortened(task: Task, split: str, count: int) -> Task:
    return task.model_copy(update={split: getattr(task, split)[:count]})


def _first(folder: Path, count: int) -> dict[str, list[Prediction]]:
    """Returns the first saved answers of each task."""
    by_task = defaultdict(list)
    for answer in read_predictions(folder):
        if len(by_task[answer.task]) < count:
            by_task[answer.task].append(answer)
    return dict(by_task)


def _instances(answers: Mapping[str, list[Prediction]]) -> dict[str, list[Any]]:
    return {
        task: [(answer.instance_id, answer.prompt) for answer in of_task]
        for task, of_task in answers.items()
    }
