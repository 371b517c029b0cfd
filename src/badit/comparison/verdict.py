"""The verdict of a comparison: which methods are ahead of the reference, by one rule.

The rule is in docs/benchmark.md. It is asked of two differences to the reference, that of the NLL
and that of a score, because the NLL alone can be lower without better answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from badit.comparison.results import Results, differences
from badit.metrics.answers import METRICS

Standing = Literal["ahead of", "behind", "level with", "not decided against"]
#: What a difference to the reference shows; "" if neither.
Sign = Literal["better", "worse", "level", ""]


def sign_of(difference: Mapping[str, Any], metric: str) -> Sign:
    """Returns what a difference to the reference shows.

    It is better or worse if its 95 % interval excludes 0, and level if its 90 % interval is within
    the metric's margin. A difference that is both is small: level.
    """
    if difference["level"]:
        return "level"
    is_lower = difference["high"] < 0
    is_higher = difference["low"] > 0
    if not (is_lower or is_higher):
        return ""
    return "better" if is_lower == METRICS[metric].lower_is_better else "worse"


def standing(nll: Sign, score: Sign) -> Standing:
    """Returns the verdict on a method: NLL and score must show the same."""
    if nll != score or not nll:
        return "not decided against"
    standings: dict[Sign, Standing] = {
        "better": "ahead of",
        "worse": "behind",
        "level": "level with",
    }
    return standings[nll]


def verdict(results: Results, metric: str | None = None) -> list[str]:
    """Returns the verdict on all trained methods, one sentence per standing.

    ``metric`` is the score; by default, and for "nll", it is ``results.metric``. On preferences the
    verdict is theirs alone: their training need not make the chosen answers more likely.
    """
    score = results.metric if metric in (None, "nll") else metric
    judged = [score] if score == "preference" else ["nll", score]
    groups: dict[Standing, list[str]] = {standing: [] for standing in get_args(Standing)}
    for method, signs, runs in _judged(results, judged):
        found = standing(signs[judged[0]], signs[score])
        remarks = []
        if found == "not decided against":
            remarks = [f"{METRICS[name].label} {sign}" for name, sign in signs.items() if sign]
        if runs < 2:
            remarks.append("one run")
        groups[found].append(f"{method} ({', '.join(remarks)})" if remarks else method)
    sentences = []
    for found, methods in groups.items():
        basis = f" in {' and '.join(METRICS[name].label for name in judged)}"
        if found == "not decided against":
            basis = ""
        if methods:
            sentences.append(f"Verdict: {found} {results.reference}{basis}: {', '.join(methods)}")
    return sentences


def _judged(results: Results, metrics: Sequence[str]) -> Iterator[tuple[str, dict[str, Sign], int]]:
    """Yields each trained method with its signs in the metrics, and the pairs of runs."""
    frames = {name: differences(results, name).to_dict("index") for name in metrics}
    # An untuned model is no method that is compared.
    trained = set(results.cells.dropna(subset="learning_rate")["method"])
    for method in results.scored_methods:
        if method == results.reference or method not in trained:
            continue
        rows = {name: frame.get(method) for name, frame in frames.items()}
        signs: dict[str, Sign] = {
            name: sign_of(row, name) if row else "" for name, row in rows.items()
        }
        runs = min((row["runs"] for row in rows.values() if row), default=0)
        if runs:
            yield method, signs, runs
