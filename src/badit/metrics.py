"""Rouge-L and exact match, and the NLL of the reference answer, which needs no generated answer and has less noise.

Rouge-L and exact match run from 0 to 100, against the reference that suits the answer best. They are those of the
official evaluation of Super-NaturalInstructions (Wang et al. 2022, arXiv:2204.07705), Rouge-L from `rouge-score`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """A model's answer (``prediction``) to one instance, with all that is needed to score it again.

    ``nll`` is that of the first reference given the prompt, in nats per token; None if it was not measured.
    """

    task: str
    instance_id: str
    prediction: str
    references: tuple[str, ...]
    prompt: str
    nll: float | None = None


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure x 100 with Porter stemming, the best over the references.

    Words are runs of `a-z0-9` after lower-casing, so an answer or a reference without any (punctuation, another script)
    scores 0 against everything, itself included.

    Raises:
        BaditError: no references.
    """
    score = _rouge_scorer().score
    return 100.0 * max(score(reference, prediction)["rougeL"].fmeasure for reference in _checked(references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the answer equals some reference after `normalize_answer`, else 0.

    Raises:
        BaditError: no references.
    """
    answer = normalize_answer(prediction)
    return 100.0 * any(normalize_answer(reference) == answer for reference in _checked(references))


@dataclass(frozen=True)
class Metric:
    """A metric of answers, from 0 to ``most``; ``score`` is None where an answer has none.

    ``label`` and ``decimals`` are for tables; ``margin`` makes methods level, see :class:`badit.statistics.Difference`.
    """

    label: str
    score: Callable[[Prediction], float | None]
    most: float = 100.0
    margin: float = 0.5
    decimals: int = 1
    lower_is_better: bool = False


#: By the name that scores.json and results.json have. All that is scored is scored in each of them.
METRICS: dict[str, Metric] = {
    "rouge_l": Metric("Rouge-L", lambda answer: rouge_l(answer.prediction, answer.references)),
    "exact_match": Metric("EM", lambda answer: exact_match(answer.prediction, answer.references)),
    "nll": Metric("NLL", lambda answer: answer.nll, most=1e6, margin=0.01, decimals=3, lower_is_better=True),
}


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, single spaces. Unlike SQuAD's normalisation it keeps the articles."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def group_by_task(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """The predictions of each task, both in their order of appearance."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.task, []).append(prediction)
    return groups


def instance_scores(predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, dict[str, list[float]]]:
    """Every instance's scores in each metric, in the predictions' order: `{task: {"rouge_l": [...], …}}`.

    A metric that some answer has no score in is left out.
    """
    scores: dict[str, dict[str, list[Any]]] = {
        name: {task: [metric.score(answer) for answer in answers] for task, answers in predictions.items()}
        for name, metric in METRICS.items()
    }
    known = [name for name, by_task in scores.items() if not any(None in values for values in by_task.values())]
    return {task: {name: scores[name][task] for name in known} for task in predictions}


def mean_scores(instances: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """A run's scores from those of every instance, as scores.json has them.

    Of each metric the mean over tasks and, as ``METRIC_instances``, over all instances; and ``tasks``: of each task its
    own means and its number of ``instances``.
    """
    means: dict[str, Any] = {}
    for metric in next(iter(instances.values())):
        means[metric] = fmean(fmean(scores[metric]) for scores in instances.values())
        means[f"{metric}_instances"] = fmean(score for scores in instances.values() for score in scores[metric])
    means["tasks"] = {
        task: {metric: fmean(values) for metric, values in scores.items()} | {"instances": len(scores["rouge_l"])}
        for task, scores in instances.items()
    }
    return means


def _checked(references: Sequence[str]) -> Sequence[str]:
    if not references or isinstance(references, str):  # a string would be a sequence of its letters
        raise BaditError("references: give a sequence of at least one accepted answer")
    return references


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
