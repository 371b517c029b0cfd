"""The frames of figures that show all sources together: losses, scores and differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from badit.metrics.answers import METRICS, Metric
from badit.metrics.statistics import paired_bootstrap
from badit.report.sources import DIFFERENCE_COLUMNS, Source
from badit.support.files import is_number

_LOG = Path("metrics.jsonl")
_ALL_TASKS = "all tasks"


def together(sources: Sequence[Source]) -> Source:
    """Returns the frames for figures of all sources.

    They have losses, scores, and differences to the first run's scores.
    """
    shared = Source("", Path())
    runs = [member for source in sources for member in source.members]
    _add_losses(shared, runs)
    scored = [source for source in sources if source.scores is not None]
    if scored:
        frames = [source.scores.assign(run=source.label) for source in scored]  # pyright: ignore[reportOptionalMemberAccess]
        shared.add("scores", pd.concat(frames, ignore_index=True), "scores.json")
        shared.add("differences", _differences(scored), "predictions/")

    # So that a series has the same colour in all figures.
    order = list(dict.fromkeys(series for series, _ in runs))
    for frame in shared.frames.values():
        frame.attrs["order"] = order
    return shared


def _add_losses(shared: Source, runs: Sequence[tuple[str, Source]]) -> None:
    training, held_out = [], []
    unit = "nats per token"
    for series, source in runs:
        section = source.config.get("training")
        if isinstance(section, Mapping) and section.get("objective") == "dpo":
            unit = "of preferences"
        for line in source.run.log(_LOG):
            # A loss that was not finite is logged as null.
            losses = {key: loss for key, loss in line.items() if is_number(loss)}
            place = (line["step"], series, source.label)
            if not is_number(line["step"]):
                continue
            if "loss" in losses:
                training.append((*place, losses["loss"]))
            for key, loss in losses.items():
                if key == "eval_loss":
                    held_out.append((*place, loss, _ALL_TASKS))
                elif key.startswith("eval_loss/"):
                    held_out.append((*place, loss, key.removeprefix("eval_loss/")))
    columns = ["step", "series", "run", "loss"]
    shared.add("losses", pd.DataFrame(training, columns=columns), _LOG.name)
    held_out_frame = pd.DataFrame(held_out, columns=[*columns, "task"])
    # The mean is the first choice.
    held_out_frame = held_out_frame.sort_values(
        "task", key=lambda tasks: tasks.where(tasks != _ALL_TASKS, ""), kind="stable"
    )
    shared.add("held_out_losses", held_out_frame, _LOG.name)
    for name in ("losses", "held_out_losses"):
        if name in shared.frames:
            shared.frames[name].attrs["unit"] = unit


def _differences(scored: Sequence[Source]) -> pd.DataFrame:
    """Returns paired differences to the first run, over the instances that both answered."""
    reference = scored[0]
    metric = METRICS["preference"]
    reference_scores = _scores_of(reference, metric)
    if reference_scores.isna().all():  # not preference data
        metric = METRICS["rouge_l"]
        reference_scores = _scores_of(reference, metric)
    rows = []
    for source in scored[1:]:
        differences = _scores_of(source, metric).reindex(reference_scores.index) - reference_scores
        differences = differences.dropna()
        # The untuned model is not one of the trained methods that are compared.
        if differences.empty or source.config.get("method") == {"name": "base"}:
            continue
        # One pair of runs: (S = 1, N).
        by_task = {
            str(task): values.to_numpy()[None] for task, values in differences.groupby(level=0)
        }
        mean = paired_bootstrap(by_task)
        rows.append([source.label, mean.mean, mean.low, mean.high, reference.label])
    frame = pd.DataFrame(rows, columns=DIFFERENCE_COLUMNS)
    frame.attrs["metric"] = metric.label
    return frame


def _scores_of(source: Source, metric: Metric) -> pd.Series:
    """Returns the score of each answer by task and instance; NaN for answers without one."""
    scores = {
        (task, instance): metric.score(answer)
        for task, answers in source.predictions.items()
        for instance, answer in answers.items()
    }
    return pd.Series(scores, dtype=float)
