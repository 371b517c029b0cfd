"""Comparisons from recipe to results.json and table: search, failures, task sequences."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from unittest.mock import Mock

import pandas as pd
import pytest
import yaml

from badit import BaditError, Run, load_results, summarise
from badit.cli import main
from badit.comparison import worker
from badit.metrics.answers import METRICS
from badit.metrics.statistics import FORMS, continual_scores
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.support.files import read_json, read_jsonl
from badit.training.methods import AdapterMethod, NeuronMethod
from comparison.cells import (
    LORA,
    InlineCell,
    by_status,
    compare_module,
    compared,
    comparison_values,
)
from materials import comparison, results_cell, write_results
from refusals import refuses

LADDER = [0.001, 0.01, 0.1]


@pytest.fixture(scope="module")
def searched(material, tmp_path_factory):
    """A finished comparison of two methods, two seeds and three rates, and its progress."""
    output = tmp_path_factory.mktemp("searched") / "comparison"
    search = {"learning_rates": LADDER, "budget": "badit", "unmatched": ["lora"]}
    values, lines = comparison_values(material, output, seeds=[0, 1], **search), []

    def report(
        line,
    ):  # the line of a run that is scored ends with the number of finished runs in results.json
        saved = (
            read_json(output / "results.json")
            if (output / "results.json").is_file()
            else {"cells": []}
        )
        lines.append(
            line
            + f" {len(by_status(saved, selected=True, status='done'))}"
            * line.endswith("and scoring")
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "start_cell", InlineCell)
        return values, compared(values, report=report), lines


def test_each_method_uses_its_best_rate_and_results_match_the_runs(searched):
    values, results, lines = searched
    output = Path(values["output"])
    for method in ("lora", "badit"):
        cells = [cell for cell in results["cells"] if cell["method"] == method]
        losses = {
            cell["learning_rate"]: cell["validation_loss"] for cell in cells if cell["seed"] == 0
        }
        assert sorted(losses) == LADDER
        for rate, loss in losses.items():
            assert (
                read_json(output / method / f"lr-{rate:g}/seed-0/validation.json")["loss"] == loss
            )
        level = min(losses.values()) + METRICS["nll"].margin
        best = min(rate for rate, loss in losses.items() if loss < level)
        assert [(cell["learning_rate"], cell["seed"]) for cell in cells if cell["selected"]] == [
            (best, 0),
            (best, 1),
        ]
        assert f"{method}: learning rate {best:g}" in lines
    assert len(by_status(results, status="done")) == len(results["cells"]) == 2 * (3 + 1)
    assert [line[0] + line[-1] for line in lines if "training and scoring" in line] == [
        "l0",
        "b1",
        "l2",
        "b3",
    ]
    assert sum(line.endswith(": training") for line in lines) == 6
    assert (results["protocol"], results["reference"], results["methods"]) == (
        "mixed",
        "lora",
        ["lora", "badit"],
    )
    for cell in results["cells"]:
        run = Run(
            output / cell["method"] / f"lr-{cell['learning_rate']:g}" / f"seed-{cell['seed']}"
        )
        assert cell["config"] == run.trusted_recipe().model_dump(mode="json", exclude={"compare"})
        options = dict(values["compare"]["methods"][cell["method"]])
        del options["name"]  # the saved name is that of the options
        assert options.items() <= cell["config"]["method"].items()
        assert cell["environment"] == run.environment
        if not cell["selected"]:
            assert (cell["scores"], cell["instances"]) == (None, None)
            continue
        assert cell["scores"] == read_json(run.scores_path)
        assert cell["instances"] == read_json(run.instances_path)
        for task, scores in cell["instances"].items():
            assert fmean(scores["rouge_l"]) == pytest.approx(
                cell["scores"]["tasks"][task]["rouge_l"]
            )
    summary = summarise(load_results(output)).set_index("method")
    assert summary["runs"].tolist() == [2, 2]
    assert summary["trainable_parameters"].to_dict() == results["trainable_parameters"]


def test_finished_comparison_is_reused_and_other_recipes_are_refused(searched, monkeypatch):
    monkeypatch.setattr(compare_module, "start_cell", None)  # no cell is started
    values, results, _ = searched
    assert compared(values) == results
    with pytest.raises(
        BaditError, match=r"holds a run of another recipe .it differs in training\.max_steps"
    ):
        compared({**values, "training": {**values["training"], "max_steps": 3}})
    methods = {**values["compare"]["methods"], "badit": {"name": "badit", "num_experts": 2, "r": 4}}
    with pytest.raises(BaditError, match=r"badit/.*it differs in method\.num_experts, method\.r"):
        compared({**values, "compare": {**values["compare"], "methods": methods}})
    loss = Path(values["output"]) / "lora/lr-0.01/seed-0/validation.json"
    scores = next(Path(values["output"]).glob("lora/lr-*/seed-0/instances.json"))
    for damaged, text in ((loss, "{}"), (loss, '{"loss": "low"}'), (scores, '{"rivers": {}}')):
        was = damaged.read_text()
        damaged.write_text(text)
        refuses(rf"{damaged.stem}\.json: .*delete the file to ", compared, values)
        damaged.write_text(was)


def test_failed_cell_does_not_stop_others_and_is_retried(values, inline, monkeypatch):
    values["compare"]["methods"] = {"neurons": {"name": "task-neurons"}, **LORA}
    run = {**values, "output": f"{values['output']}-of-a-run"}
    alone = {key: value for key, value in run.items() if key != "compare"}
    resolve(build_recipe(alone)).prepare_folder()
    refuses("of-a-run: contains a run; choose another output=FOLDER", compared, run)
    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(NeuronMethod, "trainer", Mock(side_effect=BaditError("no room for neurons")))
        results = compared(values, report=lines.append)
        failed, done = results["cells"]
        assert (failed["status"], failed["error"], done["status"]) == (
            "failed",
            "no room for neurons",
            "done",
        )
        assert any("neurons/lr-0.01/seed-0: FAILED (no room for neurons)" in line for line in lines)
        inline.clear()
        assert compared(values) == results
        assert inline == ["neurons/lr-0.01/seed-0"], "only the failed cell is retried"
    assert by_status(compared(values), status="done", error=None) == ["neurons/0", "lora/0"]


def test_failed_rates_are_not_selected_and_interruption_keeps_finished_cells(
    values, inline, monkeypatch
):
    values["compare"] |= {"learning_rates": [0.001, 0.01, 3e38], "methods": LORA}
    own = AdapterMethod.trainer

    def failing_at(self, **arguments):
        if arguments["args"].learning_rate == 0.001:
            raise RuntimeError("no such\nluck")
        return own(self, **arguments)

    monkeypatch.setattr(AdapterMethod, "trainer", failing_at)
    results = compared(values)
    fields = ("selected", "status", "error", "validation_loss")
    found = {
        cell["learning_rate"]: tuple(cell[field] for field in fields) for cell in results["cells"]
    }
    loss, diverged = found[0.01][3], found[3e38][2]
    assert diverged.endswith(
        "its training has diverged; train again with a lower training.learning_rate"
    )
    assert found[0.001] == (False, "failed", "RuntimeError: no such", None)
    assert (found[0.01], found[3e38]) == (
        (True, "done", None, loss),
        (False, "failed", diverged, None),
    )
    json.dumps(results, allow_nan=False)
    assert load_results(values["output"]).cells["error"].dropna().tolist() == [
        "RuntimeError: no such",
        diverged,
    ]
    monkeypatch.setattr(compare_module, "start_cell", Mock(side_effect=KeyboardInterrupt))
    values["compare"]["seeds"] = [0, 1]
    with pytest.raises(KeyboardInterrupt):
        compared(values)
    chosen = [
        cell
        for cell in read_json(Path(values["output"]) / "results.json")["cells"]
        if cell["selected"]
    ]
    assert [(cell["seed"], cell["status"]) for cell in chosen] == [(0, "done"), (1, "missing")]


def test_search_with_other_settings_has_its_own_folder(values, inline, monkeypatch):
    search = {"data": {"train_per_task": 4}, "training": {"max_steps": 1}}
    values["compare"] |= {"learning_rates": [0.01, 0.02], "search": search, "methods": LORA}
    results, output = compared(values), Path(values["output"])
    searched = Run(output / "lora" / "search" / "lr-0.01" / "seed-0")
    assert searched.recipe.data.train_per_task == 4
    assert searched.validation_path.is_file()
    assert not searched.scores_path.exists()
    rate = next(cell["learning_rate"] for cell in results["cells"] if cell["selected"])
    assert Run(output / "lora" / f"lr-{rate:g}" / "seed-0").recipe.data.train_per_task is None
    assert sum(not cell["selected"] for cell in results["cells"]) == 2
    assert compared(values) == results
    assert len(inline) == 2 + 1, "two rates in the search, and one final training"
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "start_cell", None)  # no cell is started
        (output / "lora").rename(output.with_name("runs"))
        assert compared(values) == results, "continued from results.json alone"
        output.with_name("runs").rename(output / "lora")
    del values["compare"]["learning_rates"]
    unsearched = {**values, "output": values["output"] + "-unsearched"}
    assert compared(unsearched)["cells"] == compared(unsearched)["cells"], (
        "without rates there is no search"
    )
    values["compare"] |= {"learning_rates": [0.01, 0.02], "search": {"training": {"max_steps": 3}}}
    refuses(
        r"search/.*run of another recipe .it differs in .*training\.max_steps", compared, values
    )


def test_sequential_comparison_with_two_orders_and_single_task_models(values, inline, monkeypatch):
    orders = [["rivers", "cities"], ["cities", "rivers"]]
    values["compare"] |= {
        "methods": {**LORA, "base": {"name": "base"}},
        "orders": orders,
        "single_task": ["lora"],
    }
    own = worker.exclusive

    def failing(folder):
        if folder.name == "rivers":
            raise BaditError("rivers are dry")
        return own(folder)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "exclusive", failing)
        first, _, _, single = compared(values)["cells"]
    assert (first["status"], single["status"], single["error"]) == (
        "done",
        "failed",
        "rivers are dry",
    )
    assert first["continual"]["standard"]["forward_transfer"] is None
    sequences = [f"order-{order}/lr-0.01/seed-0" for order in ("cities-rivers", "rivers-cities")]
    assert inline[0] == sequences[1]
    assert inline[1].endswith("comparison/base")
    assert sorted(inline[2:]) == ["lr-0.01/seed-0/cities", "lr-0.01/seed-0/rivers", sequences[0]]

    results = compared(values)
    assert results["protocol"] == "sequential"
    assert results["methods"] == ["lora", "base", "lora, one model per task"]
    first, second, base, single = results["cells"]
    assert [cell["order"] for cell in results["cells"]] == [
        "rivers-cities",
        "cities-rivers",
        None,
        None,
    ]
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    folder = Path(values["output"]) / "lora" / "single" / "lr-0.01" / "seed-0"
    alone = {
        task: read_json(folder / task / "scores.json")["rouge_l"] for task in ("cities", "rivers")
    }
    assert {
        task: scores["rouge_l"] for task, scores in single["scores"]["tasks"].items()
    } == pytest.approx(alone)
    assert single["environment"]["training"]["steps"] == 2 * 2
    for cell, order in ((first, orders[0]), (second, orders[1])):
        assert cell["tasks"] == order
        expected = [alone[task] for task in order]
        scores = {
            form: continual_scores(cell["matrix"], expected, form=form)._asdict() for form in FORMS
        }
        assert cell["continual"] == scores
        assert scores["standard"]["forward_transfer"] is not None
        assert not {"matrix", "order", "continual"} & cell["scores"].keys()
    assert "continual" not in base
    summary = summarise(load_results(values["output"]))
    assert summary["runs"].tolist() == [2, 1, 1]
    assert summary["forward_transfer_mean"].notna().tolist() == [True, False, False]


def test_invalid_comparisons_are_refused_before_any_cell_starts(values, monkeypatch):
    monkeypatch.setattr(compare_module, "start_cell", None)  # no cell is started
    for changes, message in (
        (
            {"orders": [["cities", "rivers"], ["cities", "../rivers"]]},
            r"data\.order: unknown task '\.\./rivers'",
        ),
        (
            {"methods": {"lora": {"name": "lora", "target_modules": ["x"]}}},
            r"compare\.methods\.lora: method: Target",
        ),
    ):
        refuses(message, compared, {**values, "compare": values["compare"] | changes})
    assert not Path(values["output"]).exists()
    Path(values["output"]).mkdir()
    scores = {"cities": {"rouge_l": [50.0], "exact_match": [0.0]}}
    write_results(
        Path(values["output"]), comparison(results_cell("lora", 0, scores), methods=["lora"])
    )
    refuses(
        "results.json: has results without their runs; choose another output=FOLDER",
        compared,
        values,
    )


@pytest.mark.usefixtures("inline")
def test_finished_cells_of_results_without_their_runs_are_not_run_again(values, monkeypatch):
    values["compare"]["learning_rates"] = [0.001, 0.01]
    first = compared(values)
    output = Path(values["output"])
    for name in values["compare"]["methods"]:
        shutil.rmtree(output / name)
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "start_cell", None)  # no cell is started
        assert compared(values) == first
    other = {**values, "training": values["training"] | {"max_steps": 3}}
    message = r"results\.json: .* was made with another recipe \(it differs in training\.max_steps"
    refuses(message, compared, other)
    data = Path(values["data"]["source"])
    own = data.with_name("own.jsonl")
    values["data"]["source"] = str(own)
    own.write_text(data.read_text())
    values["output"] += "-own"
    compared(values)
    for name in values["compare"]["methods"]:
        shutil.rmtree(Path(values["output"]) / name)
    lines = own.read_text().splitlines(keepends=True)
    own.write_text("".join([*lines, lines[-1].replace('"input": "', '"input": "more ')]))
    refuses(r"results\.json: .* was made with other data \(task ", compared, values)


@pytest.mark.usefixtures("inline")
def test_compare_command_dry_run_and_results(values, tmp_path, capsys, command):
    same = {"name": "lora", "r": 8}
    values["compare"]["methods"] = {"lora": same, "again": same, "base": {"name": "base"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    shown = command("compare", path, "--dry-run").splitlines()
    counts = {method: tuple(numbers) for method, *numbers in map(str.split, shown[2:5])}
    assert counts == {"lora": ("1", "1,280"), "again": ("1", "1,280"), "base": ("1", "–")}
    assert f"3 runs; they would be written to {values['output']}" in shown
    about = " ".join(shown[shown.index("one run of lora:") :])
    assert all(
        words in about
        for words in ("steps of", "of training at this machine", "GiB of memory", "1,280 of")
    )
    assert not Path(values["output"]).exists()
    assert [main(["compare", str(path), *flag]) for flag in ([], ["--dry-run"])] == [0, 0]
    captured = capsys.readouterr()
    assert f"Results: {values['output']}/results.json" in captured.out
    assert captured.out.startswith("method")
    assert "lora/lr-0.01/seed-0: done in" in captured.err
    # Every instance has an NLL; the lowest mean ranks first, and identical methods are level.
    results = load_results(values["output"])
    nll = results.instances[results.instances["metric"] == "nll"]
    assert len(nll) == len(results.instances) / 3
    assert (nll["score"] > 0).all()
    summary = summarise(results, "nll").set_index("method")
    assert summary.loc["again", "level"]
    assert summary["rank"].to_dict() == {"lora": 1.5, "again": 1.5, "base": 3}
    assert summary["nll_mean"].idxmax() == "base"
    assert "+0.000 [+0.000, +0.000] ≈" in command("table", values["output"], "--metric", "nll")


def test_results_have_the_log_of_regroupings_of_runs_that_regroup(values, inline):
    regrouping = {"name": "badit", "num_experts": 4, "r": 2, "regroup": {"every": 1, "stop": 1.0}}
    values["compare"]["methods"]["badit"] = regrouping
    values["compare"]["single_task"] = ["badit"]
    lora, badit, alone = compared(values)["cells"]
    assert "regroupings" not in lora

    folder = Path(values["output"]) / "badit/lr-0.01/seed-0"
    lines = [*read_jsonl(folder / "regroupings.jsonl")]
    rows = pd.DataFrame(badit["regroupings"])
    assert rows["step"].tolist() == [line["step"] for line in lines] == [1, 1, 2, 2]
    fields = ["module", "components_moved", "objective_before", "objective_after"]
    assert rows[fields].to_dict("records") == [
        {field: line[field] for field in fields} for line in lines
    ]
    assert len(alone["regroupings"]["run"]) == 4 * len(set(alone["regroupings"]["run"])) > 4

    shutil.rmtree(folder)
    assert compared(values)["cells"][1]["regroupings"] == badit["regroupings"]
