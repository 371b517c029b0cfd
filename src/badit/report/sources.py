"""What a report is made of: run folders and comparisons, each read once.

An argument is a run's folder, a folder that holds analysis/ alone, a comparison's folder, or a results.json. Every part
but one of these may be missing; the report then says how to make it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from badit.analysis.experts import component_flow, expert_angles
from badit.analysis.learning import task_gap, transfer
from badit.analysis.tables import TidyTable
from badit.errors import BaditError
from badit.evaluate import read_predictions
from badit.evaluation.results import RESULTS, MethodSummary, Results, Scores, load_results, read_scores, summarise
from badit.files import read_json, read_jsonl
from badit.metrics import Prediction, group_by_task, instance_scores
from badit.recipe import read_values
from badit.report.contract import TABLES, TASK_COLUMNS, Records, checked_records
from badit.runs import RunFolder


@dataclass(frozen=True)
class Source:
    """One run or one comparison.

    Args:
        label: what the page calls it; no two sources of a report have the same.
        path: its folder.
        tables: those that have rows, of its analysis or what can be had without one.
        files: where each table is from, below the folder.
        analysed: whether there is an analysis.
        config: its resolved recipe.
        environment: where it ran, and what its training took.
        scores: what scores.json holds, checked; None before the run is scored.
        results: of a comparison.
    """

    label: str
    path: Path
    tables: Mapping[str, Records] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    analysed: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    scores: Scores | None = None
    results: Results | None = None

    @property
    def is_run(self) -> bool:
        return self.results is None

    @property
    def method(self) -> str:
        return str(self.section("method").get("name", "badit" if self.config else ""))

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the recipe; empty where it is none."""
        value = self.config.get(name)
        return value if isinstance(value, Mapping) else {}

    @cached_property
    def losses(self) -> Records:
        """Step and loss of each log line; a sequence's stages follow one another."""
        return _losses(self.path)

    @cached_property
    def regroupings(self) -> Records:
        """The lines of DOG's log."""
        return _lines(RunFolder(self.path).regroupings)

    @cached_property
    def predictions(self) -> Mapping[str, list[Prediction]]:
        """Every task's answers; empty where none are kept."""
        folder = RunFolder(self.path).predictions
        return group_by_task(read_predictions(folder)) if any(folder.glob("[!.]*.jsonl")) else {}

    @cached_property
    def instance_scores(self) -> Mapping[str, Mapping[str, list[float]]]:
        """Every answer's scores, by task, in the order of the predictions."""
        return instance_scores(self.predictions) if self.predictions else {}

    @cached_property
    def summaries(self) -> list[MethodSummary]:
        """Of a comparison, one a method that has scores."""
        found = summarise(self.results) if self.results is not None else []
        return [summary for summary in found if summary.rouge_l is not None]

    def names(self) -> Iterator[str]:
        """Every task that it names, perhaps more than once."""
        if self.scores is not None:
            yield from self.scores.tasks
        for cell in self.results.cells if self.results is not None else ():
            yield from cell.scores.tasks if cell.scores else ()
        for records in self.tables.values():
            for record in records:
                yield from (record[column] for column in TASK_COLUMNS if column in record)
        yield from self.predictions


def read_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Reads what the report's arguments name.

    Raises:
        BaditError: none are given, one is given twice or is neither run nor comparison, or a file is damaged.
    """
    if not paths:
        raise BaditError("report: name at least one run's or comparison's folder")
    folders = [_folder(Path(path)) for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise BaditError(f"{folder}: is given more than once")
    return [_read(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def is_source(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what a report can be made of."""
    return any((Path(folder) / name).exists() for name in (RESULTS, "config.yaml", "analysis"))


def _folder(path: Path) -> Path:
    folder = path.parent if path.name == RESULTS and path.is_file() else path
    if not folder.is_dir():
        raise BaditError(f"{path}: is not there; name a run's folder, a comparison's, or a results.json")
    if not is_source(folder):
        raise BaditError(
            f"{path}: holds no config.yaml, results.json or analysis; name a run's folder or a comparison's"
        )
    return folder


def _labels(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as much of it as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-length:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _read(folder: Path, label: str) -> Source:
    run = RunFolder(folder)
    is_comparison = (folder / RESULTS).is_file()
    saved = {name: f"analysis/{name}.json" for name in TABLES if (folder / "analysis" / f"{name}.json").is_file()}
    tables = {name: TidyTable.load(folder / file) for name, file in saved.items()}
    logged = {table.name: (table, file) for table, file in _without_analysis(run) if table.name not in tables}
    files = saved | {name: file for name, (_, file) in logged.items()}
    tables |= {name: table for name, (table, _) in logged.items()}
    records = {name: checked_records(name, table, str(folder / files[name])) for name, table in tables.items()}
    return Source(
        label=label,
        path=folder,
        tables={name: rows for name, rows in records.items() if rows},
        files=files,
        analysed=bool(saved),
        config=_config(run.config),
        environment=read_json(run.environment) if run.environment.is_file() else {},
        scores=Scores.model_validate(read_scores(run.scores)) if run.scores.is_file() and not is_comparison else None,
        results=load_results(folder) if is_comparison else None,
    )


def _without_analysis(run: RunFolder) -> Iterator[tuple[TidyTable, str]]:
    """The tables that only sum up what the run or comparison has written itself, and the file each is from."""
    if (run.path / RESULTS).is_file():
        yield task_gap(run.path), RESULTS
        return
    if run.scores.is_file() and "matrix" in read_json(run.scores):
        yield transfer(run), run.scores.name
    # The log of a run that was kept for its results may have means over modules alone.
    if any("labels" in line for line in _lines(run.regroupings)[:1]):
        yield component_flow(run), run.regroupings.name
        yield expert_angles(run), run.regroupings.name
    elif run.angles.is_file():
        yield expert_angles(run), run.angles.name


def _config(path: Path) -> Mapping[str, Any]:
    """As plain values: a recipe of another version may have other keys, and is still worth showing."""
    if not path.is_file():
        return {}
    return read_values(path)


def _losses(folder: Path) -> Records:
    files = [RunFolder(folder).metrics, *sorted(folder.glob("stages/*/metrics.jsonl"))]
    found: Records = []
    for file in files:
        start = found[-1]["step"] if found else 0
        lines = [line for line in _lines(file) if _is_number(line.get("loss")) and _is_number(line.get("step"))]
        found += [{"step": start + line["step"], "loss": line["loss"]} for line in lines]
    return found


def _lines(path: Path) -> Records:
    return list(read_jsonl(path))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
