"""Reading results.json, and summaries compared with the numbers they are computed from."""

import json
from statistics import fmean, stdev
from types import SimpleNamespace

import pandas as pd
import pytest

from badit.comparison.results import load_results, summarise, task_means
from badit.runs.scores import read_scores, scores_frame
from materials import comparison, results_cell, write_results
from refusals import refuses

TASKS = {"task002_quoref": 3, "task_b": 2}


def cell(method, seed, level, **fields):
    """Returns a finished cell with scores around `level`; `seed` is None without training."""
    shift = seed or 0
    instances = {}
    for task, size in TASKS.items():
        rouge_l = [
            level + 2 * k + 0.5 * shift * (k % 2) + 10 * (task == "task_b") for k in range(size)
        ]
        exact_match = [100.0 * ((k + shift + int(level)) % 2) for k in range(size)]
        instances[task] = {"rouge_l": rouge_l, "exact_match": exact_match}
    training = {
        "trainable_parameters": 4_800_000,
        "seconds": 100.0 + shift,
        "peak_memory_gib": 2 + shift / 10,
    }
    environment = {"training": {**training, "steps": 9}}
    return results_cell(
        method, seed, instances, **{"environment": environment, "learning_rate": 0.002, **fields}
    )


def unscored(method, seed, **fields):
    return {
        **cell(method, seed, 0),
        "environment": None,
        "scores": None,
        "instances": None,
        **fields,
    }


def mixed():
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


def sequential():
    cells = []
    for method, level in (("lora", 30), ("badit_x", 35)):
        for i, (seed, order) in enumerate([(0, "1"), (0, "2"), (1, "1"), (1, "2")]):
            standard = {
                "average_performance": 1,
                "forgetting": 5.0 + i,
                "backward_transfer": -5.0 - i,
            }
            released = {**standard, "forgetting": 9.0 + i, "forward_transfer": None}
            continual = {
                "standard": {**standard, "forward_transfer": 1.0 + i},
                "released": released,
            }
            cells.append(cell(method, seed, level + i, order=order, continual=continual))
    return comparison(*cells, methods=["lora", "badit_x"], protocol="sequential")


def summary_of(folder, content, **options):
    """Returns a row for each method, by name, as plain values; missing values are None."""
    rows = (
        summarise(load_results(write_results(folder, content)), **options)
        .set_index("method")
        .astype(object)
    )
    return {
        method: SimpleNamespace(**row)
        for method, row in rows.where(rows.notna(), None).to_dict("index").items()
    }


def test_frames_contain_cells_scores_and_instances(tmp_path):
    content = mixed()
    results = load_results(write_results(tmp_path, content))
    assert (results.protocol, results.reference, results.methods) == (
        "mixed",
        "lora",
        content["methods"],
    )
    assert len(results.cells) == len(content["cells"])
    assert results.cells["error"].dropna().tolist() == ["out of\nmemory"]
    assert results.scored_methods == ["base", "lora", "badit_x"]
    keys = ["method", "seed", "order", "task", "metric"]
    assert list(results.scores) == [*keys, "score", "n"]
    assert list(results.instances) == [*keys, "instance", "score"]
    assert len(results.scores) == 6 * 2 * len(TASKS)
    means = results.instances.groupby(keys, dropna=False)["score"].mean()
    assert means.tolist() == pytest.approx(
        results.scores.set_index(keys)["score"].sort_index().tolist()
    )
    assert results.continual.empty
    pd.testing.assert_frame_equal(results.scores, load_results(tmp_path).scores)


def test_summary_of_a_partial_comparison(tmp_path):
    content = mixed()
    base, lora, badit, goat = summary_of(tmp_path, content).values()
    scores = [entry["scores"]["rouge_l"] for entry in content["cells"][:4]]
    assert (lora.rouge_l_mean, lora.rouge_l_std) == pytest.approx(
        (fmean(scores[1:]), stdev(scores[1:]))
    )
    assert (lora.trainable_parameters, lora.difference_mean) == (4_800_000, None)
    assert (base.rouge_l_std, base.learning_rate, base.trainable_parameters, base.seconds) == (
        None,
    ) * 4
    assert (
        (base.rank, lora.rank, badit.rank)
        == (base.task_rank, lora.task_rank, badit.task_rank)
        == (3, 2, 1)
    )
    assert (goat.runs, goat.rouge_l_mean, goat.rank, goat.difference_runs) == (0, None, None, None)
    # Paired by run: 43 - 40 for seed 0 and 48 - 42 for seed 2.
    assert badit.difference_runs == 2
    assert (badit.difference_mean, badit.difference_low, badit.difference_high) == pytest.approx(
        (4.5, 3, 6)
    )
    # A method without training is paired with every run.
    assert (base.runs, base.difference_runs) == (1, 3)
    assert base.difference_mean == pytest.approx(scores[0] - fmean(scores[1:]))
    lora = summary_of(tmp_path, {**content, "reference": "base"})["lora"]
    assert (lora.difference_mean, lora.difference_runs) == (pytest.approx(-base.difference_mean), 3)


def test_sequential_summary_over_seeds_and_orders(tmp_path):
    content = sequential()
    content["methods"].append("joint")
    content["cells"] += [cell("joint", 0, 50), cell("joint", 1, 60)]
    lora, badit, joint = summary_of(tmp_path, content).values()
    assert (lora.runs, badit.runs) == (4, 4)
    for name, mean in (("forgetting", 6.5), ("backward_transfer", -6.5), ("forward_transfer", 2.5)):
        assert getattr(lora, f"{name}_mean") == mean
        assert getattr(lora, f"{name}_std") == pytest.approx(stdev([5, 6, 7, 8]))
    assert (badit.difference_mean, badit.difference_runs) == (pytest.approx(5), 4)
    # A method without task order is paired by seed; lora has 30 and 31 for seed 0, 32 and 33 for 1.
    assert joint.forgetting_mean is None
    assert (joint.difference_mean, joint.difference_runs) == (
        pytest.approx(fmean([20, 19, 28, 27])),
        4,
    )
    released = summary_of(tmp_path, content, form="released")["lora"]
    assert (released.forgetting_mean, released.forward_transfer_mean) == (10.5, None)


def test_ranks_and_differences_use_the_metric_and_ties_ignore_rounding(tmp_path):
    results = load_results(write_results(tmp_path, mixed()))
    by_exact_match = summarise(results, "exact_match").set_index("method").iloc[:3]
    means = task_means(results, "exact_match")
    assert list(means.index) == list(TASKS)
    assert by_exact_match["exact_match_mean"].tolist() == pytest.approx(means.mean().tolist())
    assert by_exact_match["rank"].tolist() == means.mean().rank(ascending=False).tolist()
    assert by_exact_match["difference_mean"]["badit_x"] != summarise(results)["difference_mean"][2]

    cells = [cell(method, 0, level) for method, level in (("lora", 40), ("b", 40), ("c", 30))]
    cells[1]["scores"]["tasks"]["task_b"]["rouge_l"] += 1e-14
    ranks = summarise(
        load_results(write_results(tmp_path, comparison(*cells, methods=["lora", "b", "c"])))
    )
    assert ranks["rank"].tolist() == ranks["task_rank"].tolist() == [1.5, 1.5, 3]


def test_summary_of_incomplete_comparisons_and_several_learning_rates(tmp_path):
    content = mixed()
    content["cells"][5]["instances"] = content["cells"][6]["instances"] = None
    badit = summary_of(tmp_path, content)["badit_x"]
    assert (badit.rouge_l_mean is not None, badit.difference_mean) == (True, None)
    content = comparison(unscored("lora", 0, status="missing"), methods=["lora"])
    assert task_means(load_results(write_results(tmp_path, content))).empty
    assert (
        summary_of(tmp_path, content)["lora"].runs,
        summary_of(tmp_path, content)["lora"].rank,
    ) == (0, None)
    content = comparison(
        cell("lora", 0, 40), cell("lora", 1, 40, learning_rate=5e-5), methods=["lora"]
    )
    assert summary_of(tmp_path, content)["lora"].learning_rate == "0.002 / 5e-05"


def test_invalid_results_are_refused_with_the_field(tmp_path):
    for path, value, message in (
        (
            "format",
            2,
            "format: is 2, this badit version reads 1; install a later version of badit, or create",
        ),
        ("reference", "lroa", "reference: unknown 'lroa' (did you mean 'lora'?)"),
        ("cells.1.method", "x", "cells.1.method: unknown 'x'; known: base, lora, badit_x, goat"),
        (
            "cells.1.scores.rouge_l",
            float("nan"),
            "cells.1.scores.rouge_l: input should be a finite number",
        ),
        ("cells.2.seed", 0, "cells.2: has the method, seed and order of another cell"),
        (
            "cells.2.scores.tasks.task_b.instances",
            9,
            "cells.2.scores.tasks: must have the tasks and",
        ),
        ("cells.2.instances.task_b.rouge_l", [1.0], "cells.2.instances: needs one rouge_l"),
        (
            "cells.2.continual",
            {"standard": {"forgetting": 1}},
            "cells.2.continual.standard.backward_",
        ),
        (
            "cells.2.environment.training.seconds",
            -1,
            "cells.2.environment.training.seconds: input should be greater",
        ),
    ):
        content = part = mixed()
        *keys, last = path.split(".")
        for key in keys:
            part = part[int(key) if key.isdecimal() else key]
        part[last] = value
        file = write_results(tmp_path, content)
        assert refuses(".", load_results, file).startswith(f"{file}: {message}")


def test_scores_of_a_run_are_read_and_invalid_ones_refused(tmp_path):
    path = tmp_path / "scores.json"
    task = {"rouge_l": 1, "exact_match": 2, "instances": 3}
    good = {"rouge_l": 1.0, "exact_match": 2.0, "tasks": {"a": task}, "matrix": [[1.0]]}
    path.write_text(json.dumps(good))
    frame = scores_frame(read_scores(path))
    assert frame.to_numpy().tolist() == [["a", "rouge_l", 1, 3], ["a", "exact_match", 2, 3]]
    assert frame.attrs == {"matrix": [[1.0]]}
    for change, message in (
        ({"tasks": {}}, "tasks: dictionary should have at least 1 item"),
        ({"tasks": {"a": {**task, "instances": 0}}}, r"tasks\.a\.instances: input should be"),
    ):
        path.write_text(json.dumps({**good, **change}))
        refuses(message, read_scores, path)
