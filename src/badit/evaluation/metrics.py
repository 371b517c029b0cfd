"""Rouge-L and exact match as Super-NaturalInstructions defines them, for one answer and for a set of tasks.

All scores run from 0 to 100, and an answer is scored against the reference that suits it best. The metrics are those of
the benchmark's official evaluation (Wang et al. 2022, arXiv:2204.07705); Rouge-L comes from the `rouge-score` package.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any

from badit.errors import BaditError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one instance, with all that is needed to score it again.

    Attributes:
        task: the task's name.
        instance_id: the instance's id within the task.
        prediction: the decoded answer.
        references: the accepted answers.
        prompt: the text that the model was given.
    """

    task: str
    instance_id: str
    prediction: str
    references: tuple[str, ...]
    prompt: str


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure x 100 with Porter stemming, the best over the references.

    Words are runs of `a-z0-9` after lower-casing, so an answer or a reference without any (punctuation, another script)
    scores 0 against everything, itself included.

    Raises:
        BaditError: no references.
    """
    _require_references(references)
    scorer = _rouge_scorer()
    return 100.0 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the answer equals some reference after `normalize_answer`, else 0.

    Raises:
        BaditError: no references.
    """
    _require_references(references)
    answer = normalize_answer(prediction)
    return 100.0 * any(normalize_answer(reference) == answer for reference in references)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, single spaces. Unlike SQuAD's normalisation it keeps the articles."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def score_tasks(predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, Any]:
    """Score each task's predictions and average them in both customary ways.

    Returns:
        `rouge_l` and `exact_match`, the means over tasks, in which every task counts the same; `rouge_l_instances` and
        `exact_match_instances`, the means over all instances; and `tasks`, which maps each task's name to its own
        `rouge_l`, `exact_match` and number of `instances`.

    Raises:
        BaditError: no tasks, a task without predictions, or a prediction without references.
    """
    return mean_scores(instance_scores(predictions))


def instance_scores(predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, dict[str, list[float]]]:
    """Every instance's scores, in the predictions' order: `{task: {"rouge_l": [...], "exact_match": [...]}}`.

    Raises:
        BaditError: no tasks, a task without predictions, or a prediction without references.
    """
    if not predictions:
        raise BaditError("predictions: no tasks to score")
    scores = {}
    for task, answers in predictions.items():
        if not answers:
            raise BaditError(f"predictions: task {task} has none")
        scores[task] = {
            "rouge_l": [rouge_l(answer.prediction, answer.references) for answer in answers],
            "exact_match": [exact_match(answer.prediction, answer.references) for answer in answers],
        }
    return scores


def mean_scores(instances: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """The means of `instance_scores`, as `score_tasks` gives them."""
    means: dict[str, Any] = {}
    for metric in ("rouge_l", "exact_match"):
        means[metric] = fmean(fmean(scores[metric]) for scores in instances.values())
        means[f"{metric}_instances"] = fmean(score for scores in instances.values() for score in scores[metric])
    tasks = {
        task: {metric: fmean(values) for metric, values in scores.items()} | {"instances": len(scores["rouge_l"])}
        for task, scores in instances.items()
    }
    return {**means, "tasks": tasks}


def _require_references(references: Sequence[str]) -> None:
    # A bare string is a sequence of its letters, each of which would quietly become a reference.
    if not references or isinstance(references, str):
        raise BaditError("references: give a sequence of at least one accepted answer")


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
