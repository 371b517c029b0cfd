"""Metrics: Rouge-L, exact match, and the negative log-likelihood (NLL) of the reference answer.

Preference data has the accuracy of the preference between two answers too.
The NLL needs no generated answer and has less noise. Rouge-L and exact match range from 0 to 100,
with the maximum over the references. They follow the official evaluation of
Super-NaturalInstructions (Wang et al. 2022, arXiv:2204.07705). Rouge-L is computed by
`rouge-score`, with words of all scripts.
"""

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from badit.support.errors import BaditError
from badit.support.text import number

# Scripts without spaces between words, as a set of characters.
_ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_LETTER = r"[\p{L}\p{N}]\p{M}*"  # a letter or digit with its marks (accents, vowel signs)
_WORD = rf"(?={_ALONE}){_LETTER}|(?:(?!{_ALONE}){_LETTER})+"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Prediction:
    """A model's answer (``prediction``) to one instance, with all that is needed to score it again.

    ``nll`` is the NLL of the first reference given the prompt, in nats per token; None if it was
    not measured. ``margin``, of preference data, is
    :func:`badit.evaluation.losses.reward_margins`.
    """

    task: str
    instance_id: str
    prediction: str
    references: tuple[str, ...]
    prompt: str
    nll: float | None = None
    margin: float | None = None


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Returns the Rouge-L F-measure x 100 with Porter stemming, the maximum over the references.

    Words are sequences of letters and digits after lower-casing. In scripts without spaces between
    words, such as Chinese, each character is a word. The score of ASCII text is the official one,
    whose words have the letters a-z only. Text without letters and digits scores 0 even if equal.
    BaditError if ``references`` is empty or a string.
    """
    # Not at the top: it imports NLTK, which would slow down every command.
    from rouge_score.rouge_scorer import RougeScorer

    _refuse_invalid(references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [scorer.score(reference, prediction)["rougeL"] for reference in references]
    return 100.0 * max(score.fmeasure for score in scores)


class _Words:
    """Splits text into words, with the interface of `rouge-score`."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        import regex

        words: list[str] = regex.findall(_WORD, text.lower())
        # As in the official implementation, which does not stem short words.
        return [self._stemmer.stem(word) if len(word) > 3 else word for word in words]


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Returns 100 if the answer equals a reference after `normalize_answer`, else 0.

    BaditError if ``references`` is empty or a string.
    """
    _refuse_invalid(references)
    answer = normalize_answer(prediction)
    return 100.0 * any(normalize_answer(reference) == answer for reference in references)


def preference(margin: float | None) -> float | None:
    """Returns 100 if the chosen answer of a pair is preferred, 0 if the rejected one is, else 50.

    The untuned model prefers neither: its margins are 0.
    """
    if margin is None:
        return None
    return 50.0 * (1 + (margin > 0) - (margin < 0))


@dataclass(frozen=True)
class Metric:
    """A metric of answers, from 0 to ``maximum``. ``score`` returns None if an answer has no score.

    ``label`` and ``decimals`` are for tables; ``margin`` is for equivalence, see
    :class:`badit.metrics.statistics.Difference`.
    """

    label: str
    score: Callable[[Prediction], float | None]
    maximum: float = 100.0
    margin: float = 0.5
    decimals: int = 1
    lower_is_better: bool = False


#: All metrics, by their names in scores.json and results.json. Every run is scored in each of them,
#: in the first one if its data has preferences.
METRICS: dict[str, Metric] = {
    "preference": Metric("Preference", lambda answer: preference(answer.margin)),
    "rouge_l": Metric("Rouge-L", lambda answer: rouge_l(answer.prediction, answer.references)),
    "exact_match": Metric("EM", lambda answer: exact_match(answer.prediction, answer.references)),
    # An NLL has no maximum: this one only bounds the values that a file of scores may have.
    "nll": Metric(
        "NLL", lambda answer: answer.nll, maximum=1e6, margin=0.01, decimals=3, lower_is_better=True
    ),
}


def normalize_answer(text: str) -> str:
    """Returns lower-case text with single spaces and no ASCII punctuation.

    Unlike in SQuAD's evaluation, articles are kept.
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def instance_scores(predictions: Iterable[Prediction]) -> dict[str, dict[str, list[float]]]:
    """Returns the scores of each instance, `{task: {"rouge_l": [...], …}}`.

    A metric that one of the answers lacks is left out for all tasks.
    """
    scores: dict[str, dict[str, list[Any]]] = {}
    incomplete = set[str]()
    for answer in predictions:
        of_task = scores.setdefault(answer.task, {name: [] for name in METRICS})
        for name, metric in METRICS.items():
            score = metric.score(answer)
            of_task[name].append(score)
            if score is None:
                incomplete.add(name)
    # Also from the other tasks: a mean over fewer tasks would not be comparable.
    for of_task in scores.values():
        for name in incomplete:
            del of_task[name]
    return scores


def mean_scores(instances: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Returns a run's scores, in the format of scores.json, from the scores of each instance.

    These are, per metric, the mean over tasks (``METRIC``) and over all instances
    (``METRIC_instances``), and in ``tasks`` the means and the number of ``instances`` of each task.
    """
    tasks: dict[str, dict[str, float]] = {}
    for task, scores in instances.items():
        tasks[task] = {metric: fmean(values) for metric, values in scores.items()}
        # Every answer has a Rouge-L, but possibly no NLL.
        tasks[task]["instances"] = len(scores["rouge_l"])

    means: dict[str, Any] = {}
    for metric in next(iter(instances.values())):
        means[metric] = fmean(means_of_task[metric] for means_of_task in tasks.values())
        means[f"{metric}_instances"] = fmean(
            score for scores in instances.values() for score in scores[metric]
        )
    return {**means, "tasks": tasks}


def score_text(value: Any, metric: Any, sign: str = "-") -> str:
    """Formats a value of a metric, given by its name, with the metric's number of decimals."""
    return number(value, f".{METRICS[metric].decimals}f", sign)


def _refuse_invalid(references: Sequence[str]) -> None:
    if not references or isinstance(references, str):  # a string would be a sequence of letters
        raise BaditError("references: must be a sequence of at least one accepted answer")
