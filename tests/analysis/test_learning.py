"""The gap between one model a task and one for all, and a sequence's score matrix."""

import json

import pytest

from badit.analysis.learning import task_gap, transfer
from badit.errors import BaditError
from badit.run import Run


def cell(method, seed, scores, **fields):
    tasks = {task: {"rouge_l": score, "exact_match": 0, "instances": 2} for task, score in scores.items()}
    mean = sum(scores.values()) / len(scores)
    return {
        "method": method, "seed": seed, "status": "done",
        "scores": {"rouge_l": mean, "exact_match": 0, "tasks": tasks}, **fields,
    }  # fmt: skip


def results(tmp_path, cells, protocol="mixed"):
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    content = {"format": 1, "protocol": protocol, "reference": methods[0], "methods": methods, "cells": cells}
    (tmp_path / "results.json").write_text(json.dumps(content))
    return tmp_path


def test_the_gap_is_over_the_seeds_that_have_both(tmp_path):
    folder = results(
        tmp_path,
        [
            cell("lora", 0, {"a": 40, "b": 60}),
            cell("lora", 1, {"a": 50, "b": 70}),
            cell("lora", 2, {"a": 0, "b": 0}),  # without single-task runs
            cell("badit", 0, {"a": 45, "b": 65}),
            cell("lora, one model a task", 0, {"a": 60, "b": 60}),
            cell("lora, one model a task", 1, {"a": 62, "b": 64}),
        ],
    )
    table = task_gap(folder)
    assert list(table.columns) == ["method", "task", "single", "multi", "gap"]
    assert table.rows == [["lora", "a", 61, 45, 16], ["lora", "b", 62, 65, -3]]
    assert task_gap(folder / "results.json") == table
    assert "all tasks mixed" in table.about


def test_every_order_of_a_sequence_counts(tmp_path):
    folder = results(
        tmp_path,
        [
            cell("lora", 0, {"a": 40}, order="one"),
            cell("lora", 0, {"a": 20}, order="two"),
            cell("lora, one model a task", 0, {"a": 60}),
        ],
        protocol="sequential",
    )
    table = task_gap(folder)
    assert table.rows == [["lora", "a", 60, 30, 30]]
    assert "one after another" in table.about


def test_a_comparison_without_single_task_runs_has_no_gaps(tmp_path):
    assert task_gap(results(tmp_path, [cell("lora", 0, {"a": 40})])).rows == []
    with pytest.raises(BaditError, match="cannot be read"):
        task_gap(tmp_path / "elsewhere")


def scored(tmp_path, **scores):
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    return Run(tmp_path)


def test_transfer_is_the_score_matrix(tmp_path):
    table = transfer(scored(tmp_path, order=["b", "a"], matrix=[[50, None], [40, 70.5]], rouge_l=55))
    assert list(table.columns) == ["stage", "trained_task", "task", "rouge_l"]
    assert table.rows == [[1, "b", "b", 50], [1, "b", "a", None], [2, "a", "b", 40], [2, "a", "a", 70.5]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"rouge_l": 55}, "order: field required"),
        ({"order": ["a"], "matrix": [["x"]]}, "matrix: 0: 0: input should be a valid number"),
        ({"order": ["a", "b"], "matrix": [[1, 2]]}, "matrix must have a row and a column for every task"),
        ({"order": ["a", "b"], "matrix": [[1, 2], [1]]}, "matrix must have a row and a column for every task"),
    ],
)
def test_a_run_without_a_matrix_is_refused(tmp_path, scores, message):
    with pytest.raises(BaditError, match=message) as caught:
        transfer(scored(tmp_path, **scores))
    assert str(caught.value).startswith(str(tmp_path / "scores.json"))
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_scored_is_refused(tmp_path):
    with pytest.raises(BaditError, match="cannot be read"):
        transfer(Run(tmp_path))
