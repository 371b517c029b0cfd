"""Reads the sources of a report: runs and comparisons, each read once into frames.

An argument is a run's folder, a folder that contains only analysis/, a comparison's folder, or a
results.json. A folder needs at least one of config.yaml, results.json and analysis/. The report
says how to create what is missing.
"""

# pandas' type stubs declare every selection as a frame, a series or a scalar.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from badit.analysis.learning import (
    component_flow,
    expert_angles,
    task_gap,
    transfer,
    transfer_of_chain,
)
from badit.analysis.tables import load_frames
from badit.comparison.grid import Cell
from badit.comparison.results import RESULTS, Results, load_results
from badit.comparison.tables import method_table
from badit.data import own_input
from badit.metrics.answers import METRICS, Prediction
from badit.recipe.loading import read_values
from badit.report.charts import ALL
from badit.report.task_order import order_tasks
from badit.runs.folder import RunFolder
from badit.runs.predictions import prediction_files, read_predictions
from badit.support.errors import BaditError
from badit.support.files import inside, refuse_links

DIFFERENCE_COLUMNS = ["method", "mean", "low", "high", "reference"]
_COSINE_COLUMNS = ["task_a", "task_b", "parameters", "layer", "module", "cosine", "low", "high"]
_OF_EXPERTS = ("expert_losses", "abilities", "nearest_prompts")
_SHOWN_END = 80  # characters of an input that identify an instance; its end may be cut


@dataclass
class Source:
    """One run (with ``scores`` and ``config``) or one comparison (with ``results``).

    The label is unique. All ``frames`` have rows, and their attribute "file" names the file that
    they were read from.
    """

    label: str
    folder: Path
    prefix: str = ""  # of names on the page, if there are several sources
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    scores: pd.DataFrame | None = None
    results: Results | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> RunFolder:
        return RunFolder.at(self.folder)

    def add(self, name: str, frame: pd.DataFrame, file: str) -> None:
        """Adds a frame if it has rows and no frame has this name."""
        if len(frame):
            self.frames.setdefault(name, frame).attrs.setdefault("file", file)

    @cached_property
    def members(self) -> "list[tuple[str, Source]]":
        """The run itself, or a comparison's scored runs, each with its method's name.

        A comparison's runs whose folders do not exist any more are left out.
        """
        if self.results is None:
            return [(self.label, self)]
        cells = self.results.cells
        methods = self.results.methods
        is_scored = (cells["status"] == "done") & cells["selected"]
        scored = cells.loc[is_scored, ["method", "learning_rate", "seed", "order"]]
        # Cell has None for a missing rate, seed or order.
        rows = scored.astype(object).where(scored.notna(), None).to_numpy().tolist()
        # Figures and samples show methods in the order of the table.
        rows.sort(key=lambda row: methods.index(row[0]))
        runs = []
        for row in rows:
            label = str(Cell(*row))
            folder = inside(self.folder, self.folder / label)
            if folder.is_dir():
                runs.append((self.prefix + row[0], Source(label, folder)))
        return runs

    @cached_property
    def predictions(self) -> Mapping[str, Mapping[str, Prediction]]:
        """The answers by task and instance; empty if none are saved."""
        folder = self.run.predictions_path
        if not prediction_files(folder):
            return {}
        by_task: dict[str, dict[str, Prediction]] = {}
        for answer in read_predictions(folder):
            # An id alone may be the row number of other data.
            start = own_input(answer.prompt)[:_SHOWN_END]
            instance = str((answer.instance_id, start, answer.references))
            by_task.setdefault(answer.task, {})[instance] = answer
        return by_task


def read_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Reads the report's arguments.

    BaditError if one is not a run or comparison, is damaged or is given twice.
    """
    if not paths:
        raise BaditError("report: no runs; name at least one folder of a run or a comparison")
    folders = [_folder_of(Path(path)) for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise BaditError(f"{folder}: is given more than once; name each folder once")
        refuse_links(folder)
    labels = _labels(folders)
    sources = [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]
    if len(sources) > 1:
        for source in sources:
            source.prefix = f"{source.label}: "
    order_tasks([source.frames for source in sources])
    return sources


def _folder_of(path: Path) -> Path:
    folder = path.parent if path.name == RESULTS else path
    if not any((folder / name).exists() for name in (RESULTS, "config.yaml", "analysis")):
        problem = "has no config.yaml, results.json or analysis"
        raise BaditError(f"{path}: {problem}; name a run or comparison folder")
    return folder


def _labels(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest path endings that differ between all folders."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(names[-length:]) for names in paths]
        # Labels name the runs in legends, so they are short.
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _read(folder: Path, label: str) -> Source:
    source = Source(label, folder)
    run = source.run
    for name, frame in load_frames(run.analysis_path).items():
        source.add(name, frame, f"analysis/{name}.json")
    _leave_out_experts(source)
    if run.config_path.is_file():
        # Not validated: recipes of other versions may have other keys.
        source.config = read_values(run.config_path)
    source.environment = run.known_environment
    if "adopted" in source.environment:
        # Defaults, which its training by a script may not have had.
        source.config = {**source.config, "training": {}}
    if (folder / RESULTS).is_file():
        _add_comparison(source)
    elif run.scores_path.is_file():
        _add_scores(source, run)
    # After the tables of an analysis, whose angles also have held-out data, and which are kept.
    _add_regroupings(source, run)
    _add_gradient_cosines(source)
    return source


def _leave_out_experts(source: Source) -> None:
    """Leaves out tables of experts that do not mean the same in all layers.

    No option makes them: every layer has its own router or its own codes, and numbers its experts
    by itself, also with one key for all layers and with codes from gradients. So "expert 3" is one
    thing only in an adapter of a single module. With clusters, tasks are shown by cluster.
    """
    gates = source.frames.get("gates")
    if gates is None:
        return
    if len(gates[["layer", "module"]].drop_duplicates()) > 1:
        for name in _OF_EXPERTS:
            source.frames.pop(name, None)
    if "clusters" in source.frames:
        source.frames.pop("gates")


def _add_comparison(source: Source) -> None:
    results = load_results(source.folder)
    source.results = results
    table = method_table(results)
    texts = table.texts
    texts.attrs["strong"] = [(row, texts.columns[column]) for row, column in table.best]
    texts.attrs["notes"] = table.notes
    source.add("methods", texts, RESULTS)

    # An untrained model is never among the differences.
    trained = results.cells.dropna(subset="learning_rate")["method"]
    numbers = table.numbers[table.numbers["method"].isin(trained)]
    differences = numbers.rename(columns=lambda name: name.removeprefix("difference_"))
    differences = differences.assign(reference=results.reference)[DIFFERENCE_COLUMNS]
    differences = differences.dropna()
    differences.attrs["metric"] = METRICS[results.metric].label
    source.add("differences", differences, RESULTS)

    scores = results.scores
    # Categories keep the order of the methods in the groups.
    methods = pd.Categorical(scores["method"], results.scored_methods)
    groups = scores.assign(run=methods).groupby(["run", "task", "metric"], observed=True)
    means = groups[["score", "n"]].mean().reset_index()
    source.add("scores", means.astype({"run": str}), RESULTS)
    source.add("task_gap", task_gap(source.folder), RESULTS)


def _add_scores(source: Source, run: RunFolder) -> None:
    source.scores = run.scores
    of_chain = transfer_of_chain(run)
    if len(of_chain):
        # Instead of an analysis of the last run alone.
        source.frames.pop("transfer", None)
        files = f"{run.scores_path.name}, {run.earlier_scores_path.name}"
        source.add("transfer", of_chain, files)
    elif "matrix" in source.scores.attrs:
        source.add("transfer", transfer(run), run.scores_path.name)


def _add_regroupings(source: Source, run: RunFolder) -> None:
    first_line = next(run.log(run.regroupings_path), None)
    # The log of a committed result has only means over modules, without labels.
    if first_line is not None and "labels" not in first_line:
        return
    flow = component_flow(run)
    source.add("component_flow", flow, run.regroupings_path.name)
    source.add("expert_angles", expert_angles(run), run.regroupings_path.name)


def _add_gradient_cosines(source: Source) -> None:
    """Adds the cosines of each module, with those of all modules together, as one frame."""
    frames = []
    if "gradient_overall" in source.frames:
        frames.append(source.frames["gradient_overall"].assign(layer=ALL, module=ALL))
    if "gradient_pairs" in source.frames:
        pairs = source.frames["gradient_pairs"]
        of_adapter = ("." + pairs["module"]).str.endswith(".adapter")
        frames.append(pairs.assign(parameters=np.where(of_adapter, "adapter", "weights")))
    if frames:
        files = ", ".join(frame.attrs["file"] for frame in reversed(frames))
        # The pairs of a single module have no intervals.
        cosines = pd.concat([frame.reindex(columns=_COSINE_COLUMNS) for frame in frames])
        source.add("gradient_cosines", cosines, files)
