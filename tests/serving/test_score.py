"""What freezing costs: the run's own scores beside those of the folder that was written; and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from badit.cli import main
from badit.evaluate import evaluate
from badit.runs import RunFolder
from badit.serving.export import export
from badit.serving.score import score_export

Trained = Callable[..., RunFolder]
BADIT = {"name": "badit", "num_experts": 3, "r": 2, "lora_dropout": 0.0, "regroup": None}


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_without_varying_gates_costs_nothing(trained: Trained, tmp_path: Path, merged: bool) -> None:
    run = trained({"name": "lora", "r": 3})
    routed = evaluate(run.path, progress=False)
    result = score_export(run.path, export(run.path, tmp_path / "out", merged=merged), progress=False)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == result
    assert result["mixture"] is None
    for name, entry in result["tasks"].items():
        score = routed["tasks"][name]["rouge_l"]
        assert entry == {"routed": score, "frozen": score, "difference": 0.0}
    assert result["mean"]["routed"] == pytest.approx(routed["rouge_l"])


def test_what_is_scored_is_the_folder(trained: Trained, tmp_path: Path) -> None:
    run = trained(BADIT)
    scores = evaluate(run.path, progress=False)
    fake = {**scores, "tasks": {name: {**entry, "rouge_l": 77.0} for name, entry in scores["tasks"].items()}}
    run.scores.write_text(json.dumps(fake))
    done = export(run.path, tmp_path / "out", task="cities", progress=False)
    result = score_export(run.path, done, progress=False)
    assert list(result["tasks"]) == ["cities"]
    entry = result["tasks"]["cities"]
    assert entry["routed"] == 77.0
    assert entry["difference"] == pytest.approx(entry["frozen"] - 77.0)
    path = done.folder / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(path).items()}, path)
    base = score_export(run.path, done, progress=False)["tasks"]["cities"]["frozen"]
    assert base == evaluate(trained({"name": "base"}, name="base").path, progress=False)["tasks"]["cities"]["rouge_l"]


def test_the_command(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(BADIT)
    out = tmp_path / "exports" / "mine"
    assert main(["export", str(run.path), "-o", str(out), "--rank", "4", "--score"]) == 0
    shown = capsys.readouterr().out
    assert "mean gates of 2 tasks, and over these, on 24 training prompts" in shown
    assert "4 of 12: relative error 0." in shown
    assert f"--enable-lora --max-lora-rank 8 --lora-modules mine={out}" in shown
    assert "mean over tasks" in shown
    assert (out / "scores.json").is_file()
    assert main(["export", str(run.path), "-o", str(out), "--merged"]) == 0
    assert f"vllm serve {out}" in capsys.readouterr().out
    assert not (out / "scores.json").exists()  # they were the other export's
    assert main(["export", str(run.path), "-o", str(run.path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["export", str(run.path), "-o", str(out), "--task", "cities", "--gates", "x.json"])


def test_a_score_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out"), "--score"]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
