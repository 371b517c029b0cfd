"""``badit table``: the four formats of the three tables, what is left out of them, and bad input."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from badit.cli import main
from badit.render import FORMATS
from evaluation.test_results import cell, comparison, mixed, sequential, unscored, write


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["table", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def renamed(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return json.loads(json.dumps(content).replace(json.dumps(old), json.dumps(new)))


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, write(tmp_path, mixed())).splitlines()
    assert lines[0].split("  ")[0] == "method"
    assert "vs lora [95 %]" in lines[0]
    by_method = {line.split()[0]: re.split(r"\s{2,}", line) for line in lines[2:5]}
    assert by_method["lora"] == [
        "lora", "4,800,000", "0.002", "3", "47.7 ± 1.2", "41.7 ± 0.0", "–", "2", "2.0", "101", "2.2",
    ]  # fmt: skip
    assert by_method["badit_x"][6] == "+4.5 [+3.0, +6.0]"
    assert by_method["base"][:5] == ["base", "–", "–", "1", "26.5"]
    assert "goat" not in by_method
    assert "no finished run: goat" in lines
    assert not any("that both have" in line or "one run" in line for line in lines), "all runs are paired"
    assert "not in the table: badit_x, seed 1, learning rate 0.002: failed (out of memory)" in lines
    assert "not in the table: goat, seed 0: missing" in lines
    assert sum(line.startswith("not in the table") for line in lines) == 2, "a lost learning rate is no gap"


def test_text_of_a_usual_comparison_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (renamed(mixed(), "badit_x", "badit-no-regroup"), renamed(sequential(), "badit_x", "task-neurons")):
        assert max(map(len, shown(capsys, write(tmp_path, content)).splitlines())) <= 140


def test_unpaired_runs_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = mixed()
    content["cells"][3]["status"] = "failed"
    lines = shown(capsys, write(tmp_path, content)).splitlines()
    assert "badit_x vs lora: over the 1 of its 2 runs that both have" in lines
    assert "an interval over one run is over instances alone and says nothing of other seeds" in lines


def test_without_the_reference_there_are_no_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = mixed()
    content["cells"] = [entry for entry in content["cells"] if entry["method"] != "lora"]
    assert "no differences, as lora has no scores" in shown(capsys, write(tmp_path, content))


def test_markdown_marks_the_best_and_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, renamed(mixed(), "badit_x", "a|b_c*"))
    lines = shown(capsys, path, "--format", "markdown").splitlines()
    header, rule, *rows = lines[:5]
    cells = [re.split(r"(?<!\\)\|", line) for line in (header, rule, *rows)]
    assert {len(row) for row in cells} == {13}
    assert rows[2].startswith(r"| a\|b\_c\* |")
    assert re.findall(r"\*\*(.*?)\*\*", rows[2]) == ["52.2 ± 3.8", "50.0 ± 11.8"]
    assert "**" not in "".join([*rows[:2], *rows[3:]])
    assert set(rule) <= set("|-: ")
    assert r"- not in the table: a\|b\_c\*, seed 1, learning rate 0.002: failed (out of memory)" in lines


def test_latex_is_a_booktabs_tabular_with_escaped_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, renamed(mixed(), "badit_x", r"50%_a&b#{c}\d"))
    lines = shown(capsys, path, "--format", "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrrrrrr}"
    assert [lines[1], lines[3], lines[7], lines[8]] == [r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]
    for line in (lines[2], *lines[4:7]):
        assert len(re.findall(r"(?<!\\)&", line)) == 10
        assert line.endswith(r" \\")
    assert lines[6].startswith(r"50\%\_a\&b\#\{c\}\textbackslash{}d & ")
    assert r"\textbf{52.2 $\pm$ 3.8}" in lines[6]
    assert "$-$21.2 [$-$22.4" in lines[4]
    body = "".join(lines[:9])
    assert body.isascii()
    assert all(line.startswith("% ") for line in lines[9:])
    assert any("failed" in line for line in lines[9:])


def test_csv_is_precise_and_has_the_omitted_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = mixed()
    rows = rows_of(shown(capsys, write(tmp_path, content), "--format", "csv"))
    assert [row["method"] for row in rows] == ["base", "lora", "badit_x", "badit_x", "goat"]
    badit = rows[2]
    expected = [content["cells"][i]["scores"]["rouge_l"] for i in (5, 6)]
    assert float(badit["rouge_l_mean"]) == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert float(badit["rouge_l_std"]) == pytest.approx(abs(expected[0] - expected[1]) / 2**0.5, abs=1e-12)
    assert float(badit["difference_mean"]) == pytest.approx(4.5)
    assert float(badit["difference_low"]) < float(badit["difference_mean"]) < float(badit["difference_high"])
    assert float(badit["difference_share_not_positive"]) == 0
    assert (badit["difference_runs"], badit["runs"], badit["status"]) == ("2", "2", "")
    assert rows[1]["difference_low"] == ""
    assert (rows[3]["status"], rows[3]["error"], rows[3]["seed"]) == ("failed", "out of\nmemory", "1")
    assert rows[4]["status"] == "missing"


def test_sequences_in_the_standard_and_the_released_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, sequential())
    header, _, lora, badit, *notes = shown(capsys, path).splitlines()
    assert re.split(r"\s{2,}", header)[3:] == ["runs", "AP", "forgetting", "BWT", "FWT", "vs lora [95 %]", "rank"]
    columns = ["4", "38.1 ± 1.4", "6.5 ± 1.3", "−6.5 ± 1.3", "2.5 ± 1.3", "–", "2"]
    assert re.split(r"\s{2,}", lora)[3:] == columns
    assert re.split(r"\s{2,}", badit)[-2:] == ["+5.0 [+5.0, +5.0]", "1"]
    assert "forgetting, BWT, FWT: standard form" in notes
    released = shown(capsys, path, "--released")
    assert "10.5 ± 1.3" in released
    assert "as in released code" in released


def test_all_that_share_the_best_score_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell("lora", 0, 40), cell("badit", 0, 40)]
    cells[1]["scores"]["tasks"]["task_b"]["rouge_l"] += 1e-14
    lines = shown(capsys, write(tmp_path, comparison(*cells, methods=["lora", "badit"])), "--format", "markdown")
    assert lines.count("**46.5**") == 2


def test_less_forgetting_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = sequential()
    for entry in content["cells"]:
        if entry["method"] == "badit_x":
            entry["continual"]["standard"] |= {"forgetting": 3.0, "backward_transfer": -3.0, "forward_transfer": -2.0}
    lines = shown(capsys, write(tmp_path, content), "--format", "markdown").splitlines()
    assert re.findall(r"\*\*(.*?)\*\*", lines[2]) == ["2.5 ± 1.3"]
    assert re.findall(r"\*\*(.*?)\*\*", lines[3]) == ["43.1 ± 1.4", "3.0 ± 0.0", "−3.0 ± 0.0"]


def test_by_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, mixed())
    header, _, *lines = shown(capsys, path, "--by-task").splitlines()
    assert header.split() == ["task", "base", "lora", "badit_x"]
    assert [line.split() for line in lines[:2]] == [
        ["task002_quoref", "22.0", "43.2", "47.7"],
        ["task_b", "31.0", "52.2", "56.8"],
    ]
    assert re.split(r"\s{2,}", lines[2]) == ["mean over tasks", "26.5", "47.7", "52.2"]
    markdown = shown(capsys, path, "--by-task", "--format", "markdown").splitlines()
    assert [re.findall(r"\*\*(.*?)\*\*", line) for line in markdown[2:5]] == [["47.7"], ["56.8"], ["52.2"]]
    rows = rows_of(shown(capsys, path, "--by-task", "--format", "csv", "--metric", "exact_match"))
    assert [row["task"] for row in rows] == ["task002_quoref", "task_b", "mean over tasks", "", ""]
    assert float(rows[0]["base_exact_match"]) == pytest.approx(100 / 3)
    assert rows[3]["status"] == "failed"


def test_by_task_of_a_sequence_takes_either_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, sequential())
    assert "EM, mean over" in shown(capsys, path, "--by-task", "--metric", "exact_match")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("by_task", [[], ["--by-task"]])
def test_a_comparison_without_any_scores(
    form: str, by_task: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, comparison(unscored("lora", 0, status="missing"), methods=["lora"]))
    assert "missing" in shown(capsys, path, "--format", form, *by_task)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (mixed(), ["--released"], "--released: only for the table of a sequential comparison"),
        (sequential(), ["--released", "--by-task"], "--released: only for the table"),
        (sequential(), ["--metric", "exact_match"], "--metric: forgetting and transfer are measured in Rouge-L"),
        ({**mixed(), "reference": "x"}, [], "reference: 'x' is none of the methods"),
        ({**mixed(), "cells": [{"method": "lora"}]}, [], "cells.0.seed: field required"),
        ([], [], "must hold one JSON object"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    content: Any, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(write(tmp_path, content)), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("badit: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
