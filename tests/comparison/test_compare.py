"""A comparison from its recipe to results.json and the table: search, failures, sequences of tasks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from badit import worker
from badit.cli import main
from badit.compare import Grid, check
from badit.errors import BaditError
from badit.files import read_json
from badit.methods import Method, NeuronMethod
from badit.recipe import build_recipe
from badit.results import load_results, summarise
from badit.run import Run
from badit.statistics import FORMS, continual_scores
from comparison.cells import InlineCell, Values, by_status, compare_module, compared, comparison_values

LADDER = [0.001, 0.01, 0.1]


@pytest.fixture(scope="module")
def searched(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Values, Values, list[str]]:
    """A finished comparison of two methods, two seeds and a ladder: its recipe, results and report."""
    output = tmp_path_factory.mktemp("searched") / "comparison"
    values = comparison_values(
        material, output, seeds=[0, 1], learning_rates=LADDER, budget="badit", unmatched=["lora"]
    )
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineCell, "started", [], raising=False)
        patch.setattr(compare_module, "CellProcess", InlineCell)
        return values, compared(values, report=lines.append), lines


def test_every_method_gets_its_own_best_rate(searched: tuple[Values, Values, list[str]]) -> None:
    values, results, lines = searched
    output = Path(values["output"])
    for method in ("lora", "badit"):
        cells = [cell for cell in results["cells"] if cell["method"] == method]
        losses = {cell["learning_rate"]: cell["validation_loss"] for cell in cells if cell["seed"] == 0}
        assert sorted(losses) == LADDER
        for rate, loss in losses.items():
            assert read_json(output / method / f"lr-{rate:g}" / "seed-0" / "validation.json")["loss"] == loss
        best = min(losses, key=losses.__getitem__)
        chosen = [(cell["learning_rate"], cell["seed"]) for cell in cells if cell["selected"]]
        assert chosen == [(best, 0), (best, 1)]
        assert f"{method}: learning rate {best:g}" in lines
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    assert len(results["cells"]) == 2 * (3 + 1)
    assert sum("training and scoring" in line for line in lines) == 4
    assert sum(line.endswith(": training") for line in lines) == 6


def test_results_hold_what_the_runs_hold(searched: tuple[Values, Values, list[str]]) -> None:
    values, results, _ = searched
    output = Path(values["output"])
    assert json.loads((output / "results.json").read_text()) == results
    assert results["protocol"] == "mixed"
    assert results["methods"] == ["lora", "badit"]
    assert results["reference"] == "lora"
    for cell in results["cells"]:
        run = Run(output / cell["method"] / f"lr-{cell['learning_rate']:g}" / f"seed-{cell['seed']}")
        recipe = run.trusted_recipe()
        assert cell["config"] == recipe.model_dump(mode="json", exclude={"compare"})
        assert cell["config"]["method"] == values["compare"]["methods"][cell["method"]]
        assert cell["environment"] == read_json(run.environment_path)
        assert (
            cell["environment"]["training"]["trainable_parameters"] == results["trainable_parameters"][cell["method"]]
        )
        if not cell["selected"]:
            assert (cell["scores"], cell["instances"]) == (None, None)
            continue
        assert cell["scores"] == read_json(run.scores_path)
        assert cell["instances"] == read_json(run.instances_path)
        for task, scores in cell["instances"].items():
            assert fmean(scores["rouge_l"]) == pytest.approx(cell["scores"]["tasks"][task]["rouge_l"])
    summary = summarise(load_results(output)).set_index("method")
    assert summary["runs"].tolist() == [2, 2]
    assert summary["trainable_parameters"].to_dict() == results["trainable_parameters"]


def test_a_finished_comparison_is_not_done_again(
    searched: tuple[Values, Values, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, results, _ = searched
    monkeypatch.setattr(compare_module, "CellProcess", lambda *a, **k: pytest.fail("started a cell"))
    assert compared(values) == results


def test_what_another_recipe_left_is_refused(searched: tuple[Values, Values, list[str]]) -> None:
    values, _, _ = searched
    changed = {**values, "training": {**values["training"], "max_steps": 3}}
    with pytest.raises(BaditError, match=r"holds a run of another recipe .it differs in training\.max_steps"):
        compared(changed)
    methods = {**values["compare"]["methods"], "badit": {"name": "badit", "num_experts": 2, "r": 4}}
    with pytest.raises(BaditError, match=r"badit/.*it differs in method\.num_experts, method\.r"):
        compared({**values, "compare": {**values["compare"], "methods": methods}})


def test_a_failing_cell_stops_no_other_and_is_tried_again(
    values: Values, inline: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: NeuronMethod, **arguments: Any) -> None:
        raise BaditError("no room for neurons")

    whole = NeuronMethod.trainer
    monkeypatch.setattr(NeuronMethod, "trainer", refused)
    values["compare"]["methods"] = {"neurons": {"name": "task-neurons"}, "lora": {"name": "lora", "r": 4}}
    lines: list[str] = []
    results = compared(values, report=lines.append)
    failed, done = results["cells"]
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert failed["error"] == "no room for neurons"
    assert any("neurons/lr-0.01/seed-0: FAILED (no room for neurons)" in line for line in lines)
    assert main(["table", values["output"]]) == 0
    assert "not in the table: neurons, seed 0, learning rate 0.01: failed" in capsys.readouterr().out

    inline.clear()
    assert compared(values) == results
    assert inline == ["lr-0.01/seed-0"], "the failed one alone"

    monkeypatch.setattr(NeuronMethod, "trainer", whole)
    fixed = compared(values)
    assert by_status(fixed, status="done", error=None) == ["neurons/0", "lora/0"]


def test_rates_that_fail_are_worst(values: Values, inline: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    values["compare"] |= {"learning_rates": LADDER, "methods": {"lora": {"name": "lora", "r": 4}}}
    train_model = Method.trainer

    def failing_above(self: Method, **arguments: Any) -> Any:
        if arguments["args"].learning_rate > 0.001:
            raise RuntimeError("no such\nluck")
        return train_model(self, **arguments)

    monkeypatch.setattr("badit.methods.AdapterMethod.trainer", failing_above)
    results = compared(values)
    assert [(cell["learning_rate"], cell["selected"], cell["status"]) for cell in results["cells"]] == [
        (0.001, True, "done"),
        (0.01, False, "failed"),
    ]
    assert results["cells"][1]["error"] == "RuntimeError: no such"
    assert load_results(values["output"]).cells["error"].dropna().tolist() == ["RuntimeError: no such"]


def test_a_loss_that_is_not_finite_is_no_number_in_the_results(values: Values, inline: list[str]) -> None:
    values["compare"] |= {"learning_rates": [0.01, 3e38], "methods": {"lora": {"name": "lora", "r": 4}}}
    results = compared(values)
    diverged = results["cells"][1]
    assert (diverged["learning_rate"], diverged["status"], diverged["validation_loss"]) == (3e38, "done", None)
    json.dumps(results, allow_nan=False)


def test_sequences_in_two_orders(values: Values, inline: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    orders = [["rivers", "cities"], ["cities", "rivers"]]
    methods = {"lora": {"name": "lora", "r": 4}, "base": {"name": "base"}}
    values["compare"] |= {"methods": methods, "orders": orders, "single_task": ["lora"]}
    results = compared(values)
    assert results["protocol"] == "sequential"
    assert results["methods"] == ["lora", "base", "lora, one model a task"]
    first, second, base, single = results["cells"]
    assert [cell["order"] for cell in results["cells"]] == ["rivers-cities", "cities-rivers", None, None]
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    assert sorted(inline) == ["comparison/base", "lr-0.01/seed-0", "lr-0.01/seed-0", "seed-0/cities", "seed-0/rivers"]

    folder = Path(values["output"]) / "lora" / "single" / "lr-0.01" / "seed-0"
    alone = {task: read_json(folder / task / "scores.json")["rouge_l"] for task in ("cities", "rivers")}
    assert {task: scores["rouge_l"] for task, scores in single["scores"]["tasks"].items()} == pytest.approx(alone)
    assert single["environment"]["training"]["steps"] == 2 * 2
    for cell, order in ((first, orders[0]), (second, orders[1])):
        assert cell["tasks"] == order
        expected = [alone[task] for task in order]
        for form in FORMS:
            assert cell["continual"][form] == continual_scores(cell["matrix"], expected, form=form)._asdict()
            assert cell["continual"][form]["forward_transfer"] is not None
        assert not {"matrix", "order", "continual"} & cell["scores"].keys()
    assert "continual" not in base

    summary = summarise(load_results(values["output"]))
    assert summary["runs"].tolist() == [2, 1, 1]
    assert summary["forward_transfer_mean"].notna().tolist() == [True, False, False]
    assert main(["table", values["output"]]) == 0
    assert "FWT" in capsys.readouterr().out


def test_a_failing_single_task_run_is_named(values: Values, inline: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"lora": {"name": "lora", "r": 4}}
    values["compare"] |= {"methods": methods, "orders": ["seeded-0"], "single_task": ["lora"]}
    run = worker._run

    def failing(folder: Path, config: str, *, score: bool) -> None:
        if folder.name == "rivers":
            raise BaditError("rivers are dry")
        run(folder, config, score=score)

    monkeypatch.setattr(worker, "_run", failing)
    sequence, single = compared(values)["cells"]
    assert (sequence["status"], single["status"], single["error"]) == ("done", "failed", "rivers are dry")
    assert sequence["continual"]["standard"]["forward_transfer"] is None
    assert summarise(load_results(values["output"]))["runs"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": ["seeded-0", "sapt-1"]}, r"data\.order: does not say where task"),
        ({"orders": [["cities", "rivers"], ["cities", "../rivers"]]}, r"data\.order: unknown task '\.\./rivers'"),
        ({"methods": {"lora": {"name": "lora", "target_modules": ["x"]}}}, r"compare\.methods\.lora: method: Target"),
        ({"budget": "lora"}, r"compare\.methods\.badit: trains .* change its rank until they agree to 5%"),
        ({"methods": {"lora": {"name": "task-neurons"}}}, r"training\.weight_decay: must be 0 with task-neurons"),
    ],
)
def test_what_would_spoil_it_is_found_before_anything_is_run(
    values: Values, monkeypatch: pytest.MonkeyPatch, changes: Values, message: str
) -> None:
    monkeypatch.setattr(compare_module, "CellProcess", lambda *a, **k: pytest.fail("started a cell"))
    values["compare"]["methods"]["badit"]["num_experts"] = 2
    values["training"]["weight_decay"] = 0.1
    values["compare"] |= changes
    with pytest.raises(BaditError, match=message):
        compared(values)
    assert not Path(values["output"]).exists()


def test_a_search_needs_held_out_instances_of_every_task(values: Values, material: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (material / "tasks.jsonl").read_text().splitlines()]
    few = [line for i, line in enumerate(lines) if line["task"] == "cities" or i % 16 < 3 or line["split"] == "test"]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in few))
    values["data"]["source"] = str(path)
    check(Grid(build_recipe(values)))
    values["compare"]["learning_rates"] = LADDER
    with pytest.raises(BaditError, match="task rivers has no validation instances"):
        check(Grid(build_recipe(values)))


def test_the_command_checks_and_runs_and_prints(
    values: Values, inline: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["compare"]["methods"] = {"lora": {"name": "lora", "r": 8}, "base": {"name": "base"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert main(["compare", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown[2:4]] == [["lora", "1,280"], ["base", "–"]]
    assert shown[-1] == f"The runs would be written to {values['output']}"
    assert not Path(values["output"]).exists()

    assert main(["compare", str(path), "--jobs", "0"]) == 2
    assert "badit: jobs: must be at least 1, not 0" in capsys.readouterr().err
    former = signal.getsignal(signal.SIGTERM)
    assert main(["compare", str(path)]) == 0
    assert signal.getsignal(signal.SIGTERM) == former
    captured = capsys.readouterr()
    assert f"Results: {values['output']}/results.json" in captured.out
    assert captured.out.startswith("method")
    assert "lora/lr-0.01/seed-0: done in" in captured.err
