"""Reads the sources of a report: runs and comparisons, each read once into frames.

An argument is a run's folder, a folder that contains only analysis/, a comparison's folder, or a results.json. A folder
needs at least one of config.yaml, results.json and analysis/. The report says how to create what is missing.
"""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from badit.analysis.learning import component_flow, expert_angles, task_gap, transfer
from badit.analysis.tables import load_frames
from badit.comparison.results import RESULTS, Results, load_results
from badit.comparison.tables import method_table
from badit.data import own_input
from badit.metrics.answers import Prediction, rouge_l
from badit.metrics.statistics import paired_bootstrap
from badit.recipe.loading import read_values
from badit.runs.folder import RunFolder
from badit.runs.predictions import read_predictions
from badit.support.errors import BaditError
from badit.support.files import inside, is_number, refuse_links

# Tables with pairs of tasks and their column of similarities, and the tables that are shown as matrices in this order.
_ORDERED = {
    ("gradient_overall", "cosine"): ["gradient_cosines"],
    ("coactivation_pairs", "overlap"): ["coactivation_pairs"],
    ("gate_similarity", "similarity"): ["gate_similarity", "gates", "expert_losses"],
}
_PAIR = ["task_a", "task_b"]
_DIFFERENCES = ["method", "mean", "low", "high", "reference"]


@dataclass
class Source:
    """One run (with ``scores`` and ``config``) or one comparison (with ``results``), with a unique label.

    All ``frames`` have rows, and their attribute "file" names the file that they were read from.
    """

    label: str
    folder: Path
    prefix: str = ""  # of names on the page, if there are several sources
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    scores: pd.DataFrame | None = None
    results: Results | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def add(self, name: str, frame: pd.DataFrame, file: str) -> None:
        """Adds a frame if it has rows and no frame has this name."""
        if len(frame):
            self.frames.setdefault(name, frame).attrs.setdefault("file", file)

    @cached_property
    def members(self) -> "list[tuple[str, Source]]":
        """The run itself, or a comparison's scored runs whose folders still exist, each with its method's name."""
        from badit.comparison.compare import Cell

        if self.results is None:
            return [(self.label, self)]
        methods, cells = self.results.methods, self.results.cells
        done = cells.loc[
            (cells["status"] == "done") & cells["selected"],
            ["method", "learning_rate", "seed", "order"],
        ]
        rows = done.astype(object).where(done.notna(), None).to_numpy().tolist()
        runs = [
            (row[0], str(Cell(*row))) for row in sorted(rows, key=lambda row: methods.index(row[0]))
        ]
        folders = [
            (method, Source(at, inside(self.folder, self.folder / at))) for method, at in runs
        ]
        return [
            (self.prefix + method, source) for method, source in folders if source.folder.is_dir()
        ]

    @cached_property
    def predictions(self) -> Mapping[str, Mapping[str, Prediction]]:
        """The answers by task and instance; empty if none are saved. An id alone may be another data's row number."""
        found: dict[str, dict[str, Prediction]] = {}
        folder = RunFolder.at(self.folder).predictions_path
        for answer in read_predictions(folder) if any(folder.glob("[!.]*.jsonl")) else ():
            instance = str(
                (answer.instance_id, own_input(answer.prompt)[:80], answer.references)
            )  # the end may be cut
            found.setdefault(answer.task, {})[instance] = answer
        return found


def read_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Reads the report's arguments; BaditError if one is not a run or comparison, is damaged or is given twice."""
    if not paths:
        raise BaditError("report: no runs; name at least one folder of a run or a comparison")
    folders = [Path(path).parent if Path(path).name == RESULTS else Path(path) for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if not any((folder / name).exists() for name in (RESULTS, "config.yaml", "analysis")):
            raise BaditError(
                f"{path}: has no config.yaml, results.json or analysis; name a run or comparison folder"
            )
        if folders.count(folder) > 1:
            raise BaditError(f"{folder}: is given more than once; name each folder once")
        refuse_links(folder)
    # The shortest path endings that differ between all folders.
    parts = [folder.resolve().parts for folder in folders]
    ends = (
        ["/".join(each[-length:]) for each in parts]
        for length in range(1, max(map(len, parts)) + 1)
    )
    labels = next(
        (labels for labels in ends if len(set(labels)) == len(labels)), [*map(str, folders)]
    )
    sources = [
        _read(folder, label, len(labels) > 1) for folder, label in zip(folders, labels, strict=True)
    ]
    _order_tasks(sources)
    return sources


def together(sources: Sequence[Source]) -> Source:
    """Returns the frames for figures of all sources: losses, scores, and differences to the first run's scores."""
    shared = Source("", Path())
    runs = [member for source in sources for member in source.members]
    logs = []
    for series, run in runs:
        logs += [
            {**line, "series": series, "run": run.label}
            for line in RunFolder.at(run.folder).log(Path("metrics.jsonl"))
        ]
    for name, key in (("losses", "loss"), ("held_out_losses", "eval_loss")):
        losses = [
            {**line, "loss": line[key]}
            for line in logs
            if is_number(line["step"]) and is_number(line.get(key))
        ]
        shared.add(
            name, pd.DataFrame(losses, columns=["step", "loss", "series", "run"]), "metrics.jsonl"
        )
    if scored := [source for source in sources if source.scores is not None]:
        frames = [cast(pd.DataFrame, source.scores).assign(run=source.label) for source in scored]
        shared.add("scores", pd.concat(frames, ignore_index=True), "scores.json")
        first, rows = _rouge_l(scored[0]), []
        for run in scored[
            1:
        ]:  # paired differences to the first run, over the instances that both answered
            pairs = (_rouge_l(run).reindex(first.index) - first).dropna()
            if len(pairs) and run.config.get("method") != {"name": "base"}:
                found = paired_bootstrap(
                    {str(task): each.to_numpy()[None] for task, each in pairs.groupby(level=0)}
                )
                rows.append([run.label, found.mean, found.low, found.high, scored[0].label])
        shared.add("differences", pd.DataFrame(rows, columns=_DIFFERENCES), "predictions/")
    for frame in shared.frames.values():  # so that a series has the same colour in all figures
        frame.attrs["order"] = list(dict.fromkeys(series for series, _ in runs))
    return shared


def shown_parameters(frame: pd.DataFrame) -> str:
    """Returns the parameters whose gradients are shown: "adapter" if the frame has it, otherwise "weights"."""
    return min(frame["parameters"])


def _read(folder: Path, label: str, several: bool) -> Source:
    source, run = Source(label, folder, f"{label}: " if several else ""), RunFolder.at(folder)
    for name, frame in load_frames(run.analysis_path).items():
        source.add(name, frame, f"analysis/{name}.json")
    if run.config_path.is_file():
        source.config = read_values(
            run.config_path
        )  # not validated: recipes of other versions may have other keys
    source.environment = run.known_environment
    if (folder / RESULTS).is_file():
        source.results = results = load_results(folder)
        table = method_table(results)
        table.texts.attrs = {
            "strong": [(i, table.texts.columns[j]) for i, j in table.best],
            "notes": table.notes,
        }
        source.add("methods", table.texts, RESULTS)
        numbers = table.numbers.rename(columns=lambda name: name.removeprefix("difference_"))
        trained = numbers["method"].isin(
            results.cells.loc[results.cells["learning_rate"].notna(), "method"]
        )
        source.add(
            "differences",
            numbers[trained].assign(reference=results.reference)[_DIFFERENCES].dropna(),
            RESULTS,
        )
        scores = results.scores.assign(
            run=pd.Categorical(results.scores["method"], results.scored_methods)
        )
        means = (
            scores.groupby(["run", "task", "metric"], observed=True)[["score", "n"]]
            .mean()
            .reset_index()
        )
        source.add("scores", means.astype({"run": str}), RESULTS)
        source.add("task_gap", task_gap(folder), RESULTS)
    elif run.scores_path.is_file():
        scores = run.scores
        source.scores = scores
        if "matrix" in scores.attrs:
            source.add("transfer", transfer(run), run.scores_path.name)
    # The log of a committed result has only means over modules, without labels.
    if "labels" in next(run.log(run.regroupings_path), {"labels": []}):
        flow = component_flow(run)
        source.add("component_flow", flow, run.regroupings_path.name)
        source.add(
            "expert_angles",
            expert_angles(run),
            (run.regroupings_path if len(flow) else run.angles_path).name,
        )
    pairs, overall = (source.frames.get(name) for name in ("gradient_pairs", "gradient_overall"))
    cosines = [] if overall is None else [overall.assign(layer="all", module="all")]
    if pairs is not None:
        of_adapter = ("." + pairs["module"]).str.endswith(".adapter")
        cosines.append(pairs.assign(parameters=np.where(of_adapter, "adapter", "weights")))
    if cosines:
        columns = [*_PAIR, "parameters", "layer", "module", "cosine"]
        files = ", ".join(each.attrs["file"] for each in cosines[::-1])
        source.add("gradient_cosines", pd.concat([each[columns] for each in cosines]).copy(), files)
    return source


def _rouge_l(run: Source) -> pd.Series:
    answers = {
        (task, instance): each
        for task, own in run.predictions.items()
        for instance, each in own.items()
    }
    scores = {
        place: rouge_l(answer.prediction, answer.references) for place, answer in answers.items()
    }
    return pd.Series(scores, dtype=float)


def _order_tasks(sources: Sequence[Source]) -> None:
    """Makes the tasks of matrices categories; all sources use the order of the first source with similarities."""
    for (similarities, column), matrices in _ORDERED.items():
        found = [source.frames[similarities] for source in sources if similarities in source.frames]
        order = by_similarity(found[0], column) if found else []
        for source, name in product(sources, matrices):
            if (frame := source.frames.get(name)) is not None:
                columns = [each for each in ("task", *_PAIR) if each in frame]
                tasks = list(dict.fromkeys(task for each in columns for task in frame[each]))
                known = sorted(tasks, key=[*order, *tasks].index)
                source.frames[name] = frame.assign(
                    **{each: pd.Categorical(frame[each], known) for each in columns}
                )


def by_similarity(pairs: pd.DataFrame, column: str) -> list[str]:
    """Returns the tasks as leaves of an average-linkage tree over max − similarity, with the optimal branch order."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    shown = (
        pairs[pairs["parameters"] == shown_parameters(pairs)] if "parameters" in pairs else pairs
    )
    tasks = sorted({*shown["task_a"], *shown["task_b"]})
    if len(tasks) < 3:
        return tasks
    # If a pair has several kinds, the first is used. A damaged file may contain values outside −1 to 1.
    half = (
        shown.drop_duplicates(_PAIR)
        .pivot(index="task_a", columns="task_b", values=column)
        .clip(-1, 1)
    )
    similarity = half.combine_first(half.T).reindex(index=tasks, columns=tasks)
    similarity_TT = similarity.fillna(np.nan_to_num(half.stack().mean())).to_numpy()
    distance_TT = similarity_TT.max() - similarity_TT
    np.fill_diagonal(distance_TT, 0.0)
    tree = linkage(squareform(distance_TT, checks=False), method="average", optimal_ordering=True)
    return [tasks[int(i)] for i in leaves_list(tree)]
