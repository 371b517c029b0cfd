"""Numbers that captions and findings have in common."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from badit.report.contract import Records, known
from badit.report.sources import Source
from badit.report.wording import UNKNOWN, number
from badit.statistics import Difference, paired_bootstrap


def kinds_of_parameters(source: Source) -> list[str]:
    """What the source's overall cosines are over: the adapter's parameters before the weights that they adapt."""
    kinds = dict.fromkeys(record["parameters"] for record in source.tables.get("gradient_overall", []))
    return sorted(kinds, key=lambda kind: (kind != "adapter", kind))


def overall_of(source: Source, kind: str) -> Records:
    return [record for record in source.tables.get("gradient_overall", []) if record["parameters"] == kind]


def conflict_rate(overall: Records) -> float | None:
    """The share of pairs of tasks whose gradients have a negative cosine."""
    cosines = known(overall, "cosine")
    return sum(cosine < 0 for cosine in cosines) / len(cosines) if cosines else None


def moved_components(flow: Records) -> tuple[float, float]:
    """How many components changed their expert, and how many there were, summed over regroupings."""
    total = sum(record["components"] or 0 for record in flow)
    stayed = sum(record["components"] or 0 for record in flow if record["from_expert"] == record["to_expert"])
    return total - stayed, max(total, 1)


def run_difference(reference: Source, run: Source) -> Difference | None:
    """The paired difference in Rouge-L over the instances that both have answered; None if there are none."""
    if not reference.predictions or not run.predictions:
        return None
    differences = {}
    for task in reference.predictions.keys() & run.predictions.keys():
        ours, theirs = (_by_instance(source, task) for source in (run, reference))
        if shared := [instance for instance in theirs if instance in ours]:
            differences[task] = np.array([[ours[instance] - theirs[instance] for instance in shared]])
    return paired_bootstrap(differences, resample_seeds=False) if differences else None


def difference_text(difference: Difference | None) -> str:
    """``+1.2 [−0.3, +2.7]``."""
    if difference is None:
        return UNKNOWN
    mean, low, high = (number(value, signed=True) for value in (difference.mean, difference.low, difference.high))
    return f"{mean} [{low}, {high}]"


def _by_instance(source: Source, task: str) -> Mapping[str, float]:
    answers, scores = source.predictions[task], source.instance_scores[task]["rouge_l"]
    return {answer.instance_id: score for answer, score in zip(answers, scores, strict=True)}
