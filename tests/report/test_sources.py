"""What a report is made of: folders, tables and their errors, names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.analysis.tables import TidyTable
from badit.errors import BaditError
from badit.report.contract import TABLES
from badit.report.members import first_members, members
from badit.report.sources import read_sources
from badit.report.wording import TaskNames, counted, duration, listed, number, percent
from report.samples import SMALL, SUPERNI, TASKS, table, tables, write_comparison, write_run, write_sequence


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    (run,) = read_sources([write_run(tmp_path / "run")])
    assert (run.label, run.method, run.analysed) == ("run", "badit", True)
    assert run.tables.keys() == TABLES.keys() - {"task_gap", "transfer"}
    assert run.files["gates"] == "analysis/gates.json"
    assert run.scores is not None
    assert set(run.scores.tasks) == set(run.predictions) == set(TASKS)
    assert [point["step"] for point in run.losses] == list(range(10, 380, 10)), "the last line has no loss"


def test_an_analysis_without_a_run_is_enough(tmp_path: Path) -> None:
    tables()["gates"].save(tmp_path / "analysis")
    (source,) = read_sources([tmp_path])
    assert list(source.tables) == ["gates"]
    assert (source.scores, source.losses, source.predictions, source.method) == (None, [], {}, "")


def test_a_comparison_is_its_folder_or_its_file(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compared")
    for path in (folder, folder / "results.json"):
        (source,) = read_sources([path])
        assert source.results is not None
        assert [summary.method for summary in source.summaries][:3] == ["base", "lora", "badit"]
        assert {gap["method"] for gap in source.tables["task_gap"]} == {"lora"}, "without any analysis"
        assert source.files["task_gap"] == "results.json"


def test_the_runs_of_a_comparison(tmp_path: Path) -> None:
    (source,) = read_sources([write_comparison(tmp_path / "compared")])
    assert [member.method for member in members(source)] == ["base", *["lora"] * 3, *["badit"] * 3]
    assert [member.run.label for member in first_members(source)] == [
        "base",
        "lora/lr-0.0005/seed-0",
        "badit/lr-0.0005/seed-0",
    ]


def test_a_sequence_has_a_matrix_and_the_losses_of_all_stages(tmp_path: Path) -> None:
    (run,) = read_sources([write_sequence(tmp_path / "run")])
    assert len(run.tables["transfer"]) == len(TASKS) ** 2
    assert run.files["transfer"] == "scores.json"
    assert [point["step"] for point in run.losses] == [10 * i for i in range(1, 2 * len(TASKS) + 1)]


def test_regroupings_are_read_without_an_analysis(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", analysed=False)
    line = {"step": 20, "module": "model.layers.1.mlp.gate_proj.default", "previous_labels": [0, 1], "labels": [1, 0]}
    angles = {"intra_degrees": 78.0, "inter_degrees": 91.0}
    (run / "regroupings.jsonl").write_text(json.dumps({**line, **angles}) + "\n")
    (source,) = read_sources([run])
    assert {record["components"] for record in source.tables["component_flow"]} == {1}
    assert [record["within_degrees"] for record in source.tables["expert_angles"]] == [78.0]
    assert not source.analysed


def test_the_means_that_a_kept_run_has_are_no_log(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", analysed=False)
    (run / "regroupings.jsonl").write_text('{"step": 20, "modules": 30, "objective_before": 1.0}\n')
    assert not read_sources([run])[0].tables


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, analysed=False) for name in ("a/badit", "b/badit", "b/lora")]
    assert [source.label for source in read_sources(paths)] == ["a/badit", "b/badit", "b/lora"]
    assert [source.label for source in read_sources(paths[1:])] == ["badit", "lora"]


@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_of_the_contract_is_checked(name: str, tmp_path: Path) -> None:
    path = tables()[name].save(tmp_path / "analysis")
    assert read_sources([tmp_path])[0].tables[name] == TidyTable.load(path).records()
    content = json.loads(path.read_text())
    for column in content["columns"]:
        damaged = {**content, "columns": {key: value for key, value in content["columns"].items() if key != column}}
        place = list(content["columns"]).index(column)
        damaged["rows"] = [[value for i, value in enumerate(row) if i != place] for row in content["rows"]]
        path.write_text(json.dumps(damaged))
        with pytest.raises(BaditError, match=f"has no column '{column}'.*badit analyze"):
            read_sources([tmp_path])


@pytest.mark.parametrize(
    ("name", "column", "value", "kind"),
    [
        ("gates", "mean", "1.0", "a number"),
        ("gates", "expert", 1.5, "an expert's number"),
        ("gates", "expert", -1, "an expert's number"),
        ("component_flow", "to_expert", 10**9, "an expert's number, from 0 to 1023"),
        ("coactivation", "tasks", 2, "a number of tasks that has its row"),
        ("gates", "layer", None, "a whole number"),
        ("gates", "std", True, "a number"),
        ("gates", "mean", float("nan"), "a number"),
        ("abilities", "summary", None, "text"),
    ],
)
def test_wrong_values_are_named(name: str, column: str, value: Any, kind: str, tmp_path: Path) -> None:
    good = {"text": "x", "a number": 0.5}
    row = {key: good.get(wanted, 1) for key, wanted in TABLES[name].items()}
    path = table(name, [list(row.values())]).save(tmp_path / "analysis")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "rows": [list({**row, column: value}.values())]}))
    with pytest.raises(BaditError, match=rf"{name}\.json: {column} of row 1 must be {kind}"):
        read_sources([tmp_path])


def test_a_pair_of_one_task_is_refused(tmp_path: Path) -> None:
    table("gate_similarity", [["a", "b", 0.1], ["a", "a", 1.0]]).save(tmp_path / "analysis")
    with pytest.raises(BaditError, match="row 2 pairs a task with itself"):
        read_sources([tmp_path])


Damage = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl: invalid JSON at line 1"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl: must hold one JSON object"),
        (lambda run: (run / "scores.json").write_text('{"rouge_l": 1}'), "scores.json: exact_match"),
        (lambda run: (run / "environment.json").write_text("[]"), "environment.json: must hold one JSON object"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "config.yaml: must hold 'key: value' lines"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff"), "config.yaml: not UTF-8"),
        (lambda run: (run / "analysis" / "gates.json").write_text("{}"), "gates.json: format"),
        (lambda run: tables()["gates"].save(run).rename(run / "analysis/abilities.json"), "holds the table 'gates'"),
        (lambda run: (run / "predictions" / "x.jsonl").write_text("{}\n"), "x.jsonl: line 1: task: field required"),
    ],
)
def test_damaged_files_are_named(damage: Damage, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    damage(run)
    with pytest.raises(BaditError, match=message):
        [(source.losses, source.predictions) for source in read_sources([run])]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", analysed=False)
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([], "name at least one"),
        ([tmp_path / "none"], "is not there"),
        ([tmp_path / "empty"], "holds no config.yaml, results.json or analysis"),
        ([run, run], "is given more than once"),
        ([run / "config.yaml"], "is not there"),
    ):
        with pytest.raises(BaditError, match=message):
            read_sources(paths)


def test_short_names() -> None:
    names = TaskNames(SUPERNI)
    assert names["task1590_diplomacy_text_generation"] == "1590 diplomacy"
    assert len(set(names.values())) == len(SUPERNI)
    assert names.within("task002_quoref_answer_generation loses") == "002 quoref loses"
    assert TaskNames(["who_has_more"])["who_has_more"] == "who has more"
    alike = ["a_long_name_of_a_task_number_one", "a_long_name_of_a_task_number_two"]
    assert TaskNames(alike)[alike[0]] == alike[0], "where short names would be the same, they stay whole"


@given(st.lists(st.text(alphabet="ab_t1", min_size=1, max_size=40), unique=True, max_size=8))
def test_short_names_stay_apart(names: list[str]) -> None:
    short = TaskNames(names)
    assert set(short) == set(names)
    assert len(set(short.values())) == len(names)


def test_wording() -> None:
    assert number(-0.25, 2) == "−0.25"
    assert number(-0.001) == "0.0"
    assert number(1.25, signed=True, unit=" points") == "+1.2 points"
    assert number(None) == percent(None) == duration(None) == "–"
    assert percent(0.123) == "12\u00a0%"
    assert [duration(seconds) for seconds in (90, 2285, 9000)] == ["90 s", "38 min", "2 h 30 min"]
    assert [counted(count, "run") for count in (0, 1, 1200)] == ["0 runs", "1 run", "1,200 runs"]
    assert [listed(parts) for parts in ([], ["a"], ["a", "b", "c"])] == ["", "a", "a, b and c"]
    assert SMALL.pairs[0] == (sorted(TASKS)[0], sorted(TASKS)[1])
