"""The scores of a run: the schema of scores.json, and the file as a data frame."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, create_model

from badit.metrics.answers import METRICS, score_text
from badit.metrics.statistics import Form
from badit.support.errors import explained
from badit.support.files import read_json
from badit.support.text import text_table

LARGEST = 10**15  # upper bound of numbers in a file, so that sums and means stay finite
_ROUNDING = 1e-6  # tolerance for the rounding error of means

_Percent = Annotated[float, Field(ge=-_ROUNDING, le=100 + _ROUNDING)]
_Points = Annotated[float, Field(ge=-100 - _ROUNDING, le=100 + _ROUNDING)]
_REQUIRED = ("rouge_l", "exact_match")  # every answer has these; it has no NLL if a server gave it


class Checked(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


def _by_metric(name: str, *, lists: bool = False) -> Any:
    """Returns a model with a field per metric: a mean or, with ``lists``, a score per instance."""
    fields: dict[str, Any] = {}
    for name_of_metric, metric in METRICS.items():
        kind: Any = Annotated[float, Field(ge=-_ROUNDING, le=metric.maximum + _ROUNDING)]
        if lists:
            kind = list[kind]
        fields[name_of_metric] = (kind | None, None)
        if name_of_metric in _REQUIRED:
            fields[name_of_metric] = (kind, ...)
    return create_model(name, __base__=Checked, **fields)


class InstanceScores(_by_metric("_Lists", lists=True)):
    """The score of every instance of a task, in each metric."""


class _TaskScores(_by_metric("_Means")):
    instances: Annotated[int, Field(ge=1, le=LARGEST)]


class Transfer(Checked):
    forgetting: _Points
    backward_transfer: _Points
    forward_transfer: _Points | None = None


class Scores(_by_metric("_Means")):
    tasks: Annotated[dict[str, _TaskScores], Field(min_length=1)]
    order: list[str] | None = None
    matrix: list[list[_Percent | None]] | None = None
    continual: dict[Form, Transfer] | None = None


def read_scores(path: Path) -> dict[str, Any]:
    """Returns the contents of a run's scores.json; BaditError if a score is missing or invalid."""
    content = read_json(path)
    with explained(path, fix="score the run again"):
        Scores.model_validate(content)
    return content


def scores_frame(scores: Mapping[str, Any]) -> pd.DataFrame:
    """Returns a run's scores, one row per task and metric: task, metric, score and n.

    A sequence of tasks has the scores of the final model, with ``order``, ``matrix`` and
    ``continual`` in ``attrs``.
    """
    rows = [
        (task, metric, means[metric], means["instances"])
        for task, means in scores["tasks"].items()
        for metric in METRICS
        if metric in means
    ]
    frame = pd.DataFrame(rows, columns=["task", "metric", "score", "n"])
    frame.attrs = {key: scores[key] for key in ("order", "matrix", "continual") if key in scores}
    return frame


def score_table(scores: pd.DataFrame) -> str:
    """Returns :func:`scores_frame` as text: tasks and their mean in rows, metrics in columns."""
    table = scores.pivot_table("score", "task", "metric", sort=False)
    counts = {str(task): str(n) for task, n in zip(scores["task"], scores["n"], strict=True)}
    table.loc["mean over tasks"] = table.apply(fmean)
    rows = [
        [str(task), counts.get(str(task), ""), *map(score_text, values, table)]
        for task, *values in table.itertuples()
    ]
    labels = [METRICS[metric].label for metric in table]
    return text_table(["task", "instances", *labels], rows)
