"""Reading results.json, and the summaries against the numbers that they are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from badit.errors import BaditError
from badit.results import load_results, read_scores, scores_frame, summarise, task_means

TASKS = {"task002_quoref": 3, "task_b": 2}


def cell(method: str, seed: int | None, level: float, *, order: str | None = None, **fields: Any) -> dict[str, Any]:
    """A finished cell whose scores lie around `level`; its seed is None for a method that does not train."""
    shift = seed or 0
    instances = {
        task: {
            "rouge_l": [level + 2 * k + 0.5 * shift * (k % 2) + 10 * (task == "task_b") for k in range(size)],
            "exact_match": [100.0 * ((k + shift + int(level)) % 2) for k in range(size)],
        }
        for task, size in TASKS.items()
    }
    tasks = {
        task: {**{metric: fmean(values) for metric, values in each.items()}, "instances": TASKS[task]}
        for task, each in instances.items()
    }
    means = {metric: fmean(scores[metric] for scores in tasks.values()) for metric in ("rouge_l", "exact_match")}
    training = {
        "trainable_parameters": 4_800_000,
        "seconds": 100.0 + shift,
        "peak_memory_gib": 2 + shift / 10,
        "steps": 9,
    }
    return {
        "method": method, "seed": seed, "order": order, "learning_rate": 0.002, "status": "done", "error": None,
        "selected": True, "validation_loss": 1.9, "config": {"model": {}}, "environment": {"training": training},
        "scores": {**means, "tasks": tasks}, "instances": instances, **fields,
    }  # fmt: skip


def unscored(method: str, seed: int, **fields: Any) -> dict[str, Any]:
    return {**cell(method, seed, 0), "environment": None, "scores": None, "instances": None, **fields}


def comparison(*cells: dict[str, Any], methods: list[str], protocol: str = "mixed") -> dict[str, Any]:
    return {"format": 1, "protocol": protocol, "reference": "lora", "methods": methods, "cells": list(cells)}


def mixed() -> dict[str, Any]:
    return comparison(
        cell("base", None, 20, environment={"commit": None}, learning_rate=None),
        *(cell("lora", seed, 40 + seed) for seed in range(3)),
        unscored("lora", 0, learning_rate=0.01, selected=False),
        cell("badit_x", 0, 43),
        cell("badit_x", 2, 48),
        unscored("badit_x", 1, status="failed", error="out of\nmemory"),
        unscored("goat", 0, status="missing", selected=False, learning_rate=None),
        methods=["base", "lora", "badit_x", "goat"],
    )


def sequential() -> dict[str, Any]:
    cells = []
    for method, level in (("lora", 30), ("badit_x", 35)):
        for i, (seed, order) in enumerate([(0, "1"), (0, "2"), (1, "1"), (1, "2")]):
            standard = {"average_performance": 1, "forgetting": 5.0 + i, "backward_transfer": -5.0 - i}
            released = {**standard, "forgetting": 9.0 + i, "forward_transfer": None}
            continual = {"standard": {**standard, "forward_transfer": 1.0 + i}, "released": released}
            cells.append(cell(method, seed, level + i, order=order, continual=continual))
    return comparison(*cells, methods=["lora", "badit_x"], protocol="sequential")


def write(folder: Path, content: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    return path


def summary_of(folder: Path, content: Any, **options: Any) -> Any:
    """A row for each method, by name, as plain values; what is missing is None."""
    frame = summarise(load_results(write(folder, content)), **options)
    rows = frame.set_index("method").astype(object)
    return {method: SimpleNamespace(**row) for method, row in rows.where(rows.notna(), None).to_dict("index").items()}


def test_the_frames_hold_what_counts(tmp_path: Path) -> None:
    content = mixed()
    path = write(tmp_path, content)
    results = load_results(path)
    assert (results.protocol, results.reference, results.methods) == (
        "mixed",
        "lora",
        ["base", "lora", "badit_x", "goat"],
    )
    assert len(results.cells) == len(content["cells"])
    assert results.cells["error"].dropna().tolist() == ["out of\nmemory"]
    assert results.scored_methods == ["base", "lora", "badit_x"]
    keys = ["method", "seed", "order", "task", "metric"]
    assert list(results.scores) == [*keys, "score", "n"]
    assert list(results.instances) == [*keys, "instance", "score"]
    assert len(results.scores) == 6 * 2 * len(TASKS)
    means = results.instances.groupby(keys, dropna=False)["score"].mean()
    assert means.tolist() == pytest.approx(results.scores.set_index(keys)["score"].sort_index().tolist())
    assert results.continual.empty
    pd.testing.assert_frame_equal(results.scores, load_results(tmp_path).scores)


def test_summaries_of_a_partial_comparison(tmp_path: Path) -> None:
    content = mixed()
    base, lora, badit, goat = summary_of(tmp_path, content).values()
    runs = [entry["scores"]["rouge_l"] for entry in content["cells"][1:4]]
    assert (lora.rouge_l_mean, lora.rouge_l_std) == (pytest.approx(fmean(runs)), pytest.approx(stdev(runs)))
    assert (lora.runs, lora.learning_rate, lora.trainable_parameters) == (3, "0.002", 4_800_000)
    assert (lora.seconds, lora.peak_memory_gib) == (101, 2.2)
    assert lora.difference_mean is None
    assert base.rouge_l_mean is not None
    assert (base.rouge_l_std, base.learning_rate, base.trainable_parameters, base.seconds) == (None,) * 4
    assert (base.rank, lora.rank, badit.rank) == (3, 2, 1)
    assert (base.task_rank, lora.task_rank, badit.task_rank) == (3, 2, 1)
    assert (goat.runs, goat.rouge_l_mean, goat.rank, goat.difference_runs) == (0, None, None, None)
    # Paired by run: 43 - 40 with seed 0 and 48 - 42 with seed 2; the instances add the same to both methods.
    assert (badit.difference_runs, badit.difference_mean) == (2, pytest.approx(4.5))
    assert (badit.difference_low, badit.difference_high) == (pytest.approx(3), pytest.approx(6))


def test_a_method_that_does_not_train_is_paired_with_every_run(tmp_path: Path) -> None:
    content = mixed()
    base = summary_of(tmp_path, content)["base"]
    scores = [entry["scores"]["rouge_l"] for entry in content["cells"][:4]]
    assert (base.runs, base.difference_runs) == (1, 3)
    assert base.difference_mean == pytest.approx(scores[0] - fmean(scores[1:]))
    lora = summary_of(tmp_path, {**content, "reference": "base"})["lora"]
    assert (lora.difference_mean, lora.difference_runs) == (pytest.approx(-base.difference_mean), 3)


def test_a_method_without_task_order_is_paired_by_seed(tmp_path: Path) -> None:
    content = sequential()
    content["methods"].append("joint")
    content["cells"] += [cell("joint", 0, 50), cell("joint", 1, 60)]
    joint = summary_of(tmp_path, content)["joint"]
    assert joint.forgetting_mean is None
    # lora's levels are 30 and 31 in the two orders of seed 0, 32 and 33 in those of seed 1.
    assert (joint.difference_mean, joint.difference_runs) == (pytest.approx(fmean([20, 19, 28, 27])), 4)


def test_the_order_of_cells_and_of_tasks_does_not_matter(tmp_path: Path) -> None:
    content = mixed()
    expected = summarise(load_results(write(tmp_path, content)))
    content["cells"].reverse()
    for entry in content["cells"]:
        if entry["scores"]:
            entry["scores"]["tasks"] = dict(reversed(entry["scores"]["tasks"].items()))
            entry["instances"] = dict(reversed(entry["instances"].items()))
    drawn = ["difference_low", "difference_high"]  # the random draws are others
    found = summarise(load_results(write(tmp_path, content)))
    pd.testing.assert_frame_equal(found.drop(columns=drawn), expected.drop(columns=drawn))
    assert found[drawn].notna().equals(expected[drawn].notna())


def test_ranks_and_differences_are_taken_in_the_metric_and_rounding_breaks_no_tie(tmp_path: Path) -> None:
    results = load_results(write(tmp_path, mixed()))
    by_exact_match = summarise(results, "exact_match").set_index("method")
    means = task_means(results, "exact_match")
    assert list(means.index) == list(TASKS)
    scores = by_exact_match["exact_match_mean"].iloc[:3]
    assert scores.tolist() == pytest.approx(means.mean().tolist())
    expected = [1 + sum(scores > score) + (sum(scores == score) - 1) / 2 for score in scores]
    assert by_exact_match["rank"].iloc[:3].tolist() == expected
    assert by_exact_match.difference_mean["badit_x"] != summarise(results).difference_mean[2]

    cells = [cell(method, 0, level) for method, level in (("lora", 40), ("b", 40), ("c", 30))]
    cells[1]["scores"]["tasks"]["task_b"]["rouge_l"] += 1e-14
    ranks = summarise(load_results(write(tmp_path, comparison(*cells, methods=["lora", "b", "c"]))))
    assert ranks["rank"].tolist() == ranks["task_rank"].tolist() == [1.5, 1.5, 3]


def test_a_sequence_is_summarised_over_seeds_and_orders(tmp_path: Path) -> None:
    lora, badit = summary_of(tmp_path, sequential()).values()
    assert (lora.runs, badit.runs) == (4, 4)
    std = pytest.approx(stdev([5, 6, 7, 8]))
    assert (lora.forgetting_mean, lora.forgetting_std) == (6.5, std)
    assert (lora.backward_transfer_mean, lora.backward_transfer_std) == (-6.5, std)
    assert (lora.forward_transfer_mean, lora.forward_transfer_std) == (2.5, std)
    assert (badit.difference_mean, badit.difference_runs) == (pytest.approx(5), 4)
    released = summary_of(tmp_path, sequential(), form="released")["lora"]
    assert (released.forgetting_mean, released.forward_transfer_mean) == (10.5, None)


def test_without_instances_there_are_means_and_no_difference(tmp_path: Path) -> None:
    content = mixed()
    content["cells"][5]["instances"] = content["cells"][6]["instances"] = None
    badit = summary_of(tmp_path, content)["badit_x"]
    assert badit.rouge_l_mean is not None
    assert badit.difference_mean is None


def test_nothing_run_yet_and_several_learning_rates(tmp_path: Path) -> None:
    content = comparison(unscored("lora", 0, status="missing"), methods=["lora"])
    results = load_results(write(tmp_path, content))
    assert task_means(results).empty
    assert summarise(results)[["runs", "rank"]].fillna(-1).to_numpy().tolist() == [[0, -1]]
    content = comparison(cell("lora", 0, 40), cell("lora", 1, 40, learning_rate=5e-5), methods=["lora"])
    assert summary_of(tmp_path, content)["lora"].learning_rate == "0.002 / 5e-05"


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


BROKEN = [
    (_set("format", to=2), "format: is 2, this badit reads 1: pip install --upgrade badit"),
    (_set("protocol", to="mixd"), "protocol: input should be 'mixed' or 'sequential'"),
    (_set("reference", to="lroa"), "reference: 'lroa' is none of the methods (did you mean 'lora'?)"),
    (_set("methods", to=[]), "methods: list should have at least 1 item"),
    (_set("cells", 1, "method", to="x"), "cells.1.method: 'x' is none of the methods"),
    (_set("cells", 1, "status", to="lost"), "cells.1.status: "),
    (_set("cells", 1, "scores", to=None), "cells.1.scores: is missing"),
    (_set("cells", 1, "scores", "rouge_l", to=float("nan")), "cells.1.scores.rouge_l: input should be a finite number"),
    (_set("cells", 2, "seed", to=0), "cells.2: repeats method, seed and order of cells.1"),
    (_set("cells", 2, "scores", "tasks", "task_b", "instances", to=9), "cells.2.scores.tasks: other tasks or"),
    (_set("cells", 2, "instances", "task_b", "rouge_l", to=[1.0]), "cells.2.instances: needs one rouge_l"),
    (_set("cells", 2, "instances", to={}), "cells.2.instances: needs one rouge_l"),
    (_set("cells", 2, "continual", to={"standard": {"forgetting": 1}}), "cells.2.continual.standard.backward_"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_file_is_refused_by_field(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    content = mixed()
    change(content)
    path = write(tmp_path, content)
    with pytest.raises(BaditError) as refusal:
        load_results(path)
    assert str(refusal.value).startswith(f"{path}: {message}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "one JSON object"), ("{", "invalid JSON"), (None, "cannot be read")]
)
def test_a_damaged_or_missing_file_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(BaditError, match=message):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rouge_l": 101}, "rouge_l: input should be less than or equal to 100"),
        ({"rouge_l": -1}, "rouge_l: input should be greater than or equal to"),
        ({"rouge_l": None}, "rouge_l: input should be a valid number"),
        ({"tasks": {}}, "tasks: dictionary should have at least 1 item"),
        ({"tasks": {"a": {"rouge_l": 1, "exact_match": 1, "instances": 0}}}, "tasks.a.instances: input should be"),
    ],
)
def test_damaged_scores_of_a_run(tmp_path, change, message):
    path = tmp_path / "scores.json"
    good = {"rouge_l": 1.0, "exact_match": 2.0, "tasks": {"a": {"rouge_l": 1, "exact_match": 2, "instances": 3}}}
    path.write_text(json.dumps({**good, "matrix": [[1.0]]}))
    assert read_scores(path)["matrix"] == [[1.0]]
    frame = scores_frame(read_scores(path))
    assert frame.to_numpy().tolist() == [["a", "rouge_l", 1, 3], ["a", "exact_match", 2, 3]]
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(BaditError, match=re.escape(message)):
        read_scores(path)
