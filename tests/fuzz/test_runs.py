"""Broken run folders, through ``badit report``: logs, scores, predictions and tables of an analysis."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fuzz.command import STRESS, cases, ends_well
from fuzz.damage import REPLACEMENTS, as_json, as_lines, as_yaml, damaged
from report.samples import Shape, write_run, write_sequence

SHAPE = Shape(tasks=("task1_a", "task2_b"), layers=2, modules=("mlp.gate_proj",), experts=2, steps=(20,))
REGROUPINGS = [
    {
        "step": 20,
        "module": "model.layers.0.mlp.gate_proj.default",
        "previous_labels": [0, 0, 1, 1],
        "labels": [0, 1, 0, 1],
        "intra_degrees": 70.0,
        "inter_degrees": 91.0,
        "intra_abs_cos": 0.4,
        "inter_abs_cos": 0.1,
        "previous_intra_degrees": None,
        "previous_inter_degrees": 90.5,
    }
]
ANGLES = [{"step": 10, "module": "model.layers.0.mlp.gate_proj.default", "intra_degrees": 70.0, "inter_degrees": 91.0}]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with an analysis, one with logs alone, and one that has learnt its tasks in an order."""
    folder = tmp_path_factory.mktemp("valid")
    write_run(folder / "analysed", SHAPE)
    write_run(folder / "logged", SHAPE, analysed=False)
    (folder / "logged" / "regroupings.jsonl").write_bytes(as_lines(REGROUPINGS))
    write_run(folder / "angles", SHAPE, analysed=False)
    (folder / "angles" / "angles.jsonl").write_bytes(as_lines(ANGLES))
    write_sequence(folder / "sequence", SHAPE)
    return {path.name: path for path in folder.iterdir()}


FILES = [
    *(("logged", name) for name in ("config.yaml", "environment.json", "metrics.jsonl", "scores.json")),
    *(("logged", name) for name in ("predictions/task1_a.jsonl", "regroupings.jsonl")),
    *(("angles", "angles.jsonl"), ("sequence", "scores.json")),
    *(("analysed", f"analysis/{name}.json") for name in ("gradient_overall", "gates", "expert_angles", "abilities")),
]


def parsed(file: Path) -> tuple[Any, Callable[[Any], bytes]]:
    text = file.read_text()
    if file.suffix == ".yaml":
        return yaml.safe_load(text), as_yaml
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()[:4]], as_lines
    return json.loads(text), as_json


def copied(valid: dict[str, Path], kind: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(valid[kind], folder))


def reported(run: Path) -> None:
    page = run.with_name("report.html")
    page.unlink(missing_ok=True)
    done = ends_well("report", str(run), "-o", str(page))
    assert page.exists() == done
    if done:
        assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.parametrize("kind", ["analysed", "logged", "angles", "sequence"])
def test_the_runs_are_valid_before_they_are_broken(valid: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert ends_well("report", str(valid[kind]), "-o", str(tmp_path / "report.html"))


@pytest.mark.parametrize(("kind", "file"), FILES)
@cases(3)
@given(data=st.data())
def test_broken_files(valid: dict[str, Path], tmp_path: Path, kind: str, file: str, data: st.DataObject) -> None:
    run = copied(valid, kind, tmp_path / "run")
    value, form = parsed(run / file)
    (run / file).write_bytes(data.draw(damaged(value, form)))
    reported(run)


@pytest.mark.parametrize("number", range(len(FILES)))
def test_something_else_in_a_files_place(valid: dict[str, Path], tmp_path: Path, number: int) -> None:
    kind, file = FILES[number]
    for replace in REPLACEMENTS if STRESS > 1 else [REPLACEMENTS[number % len(REPLACEMENTS)]]:
        run = copied(valid, kind, tmp_path / "run")
        replace(run / file)
        reported(run)
