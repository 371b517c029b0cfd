"""The benchmarks: baselines compute the same result, the page is up to date, noise has causes."""

import json
import runpy
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from badit import BaditConfig, load_results
from badit.comparison.results import paired_differences, write_results
from badit.metrics.statistics import paired_bootstrap
from badit.tuner import BaditModel
from materials import comparison, results_cell
from training.trainers import PAPER
from tuner.helpers import gradients, randomise


def load_script(script):
    """Returns a script's globals. On sys.path, its folder would shadow packages of the tests."""
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / f"{script}.py"))


def test_results_page_is_up_to_date():
    table = load_script("speed/table")
    page = table["PAGE"].read_text(encoding="utf-8")
    assert table["render"](page) == page


def write_run(folder, **files):
    folder.mkdir(parents=True)
    training = {"seed": 0, "learning_rate": 0.1}
    (folder / "config.yaml").write_text(json.dumps({"data": {}, "training": training}))
    (folder / "environment.json").write_text(json.dumps({"training": {"seconds": 9.5}}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_compact_file_has_all_runs_with_rounded_scores(tmp_path):
    compact = load_script("compact")["compact"]
    instances = {"a": {"rouge_l": [100 / 3, 0.0], "exact_match": [0.0, 0.0]}}
    cell = results_cell("lora", 0, instances, config={"output": "runs/mine/lora/lr-0.1/seed-0"})
    write_results(tmp_path / "results.json", comparison(cell, methods=["lora"]))
    write_run(tmp_path / "lora/lr-0.1/seed-0", instances=instances)
    (tmp_path / "lora/lr-0.1/seed-0/metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    write_run(tmp_path / "dog/search/lr-0.1/seed-0", validation={"loss": 2.5, "tasks": {"a": 2.5}})
    line = {"step": 3, "module": "m", "components_moved": 2, "labels": [1, 0]}
    line |= {"objective_before": 100 / 3, "objective_after": 34.0}
    (tmp_path / "dog/search/lr-0.1/seed-0/regroupings.jsonl").write_text(json.dumps(line) + "\n")
    write_run(tmp_path / "badit/lr-0.1/seed-0", scores=cell["scores"], instances=instances)

    content = compact(tmp_path, ["lora/*/*/metrics.jsonl"])
    first, second = content["cells"]
    assert first["scores"] == cell["scores"]
    assert first["instances"]["a"]["rouge_l"] == [33.33333, 0]
    assert first["files"] == {"metrics.jsonl": [{"step": 1, "loss": 2.5}]}
    assert (second["method"], second["learning_rate"]) == ("badit", 0.1)
    (trial,) = content["trials"]
    assert (trial["method"], trial["validation_loss"]) == ("dog", 2.5)
    assert trial["regroupings"] == {
        "run": ["seed-0"],
        "step": [3],
        "module": ["m"],
        "components_moved": [2],
        "objective_before": [33.33333],
        "objective_after": [34.0],
    }

    write_results(tmp_path / "compact.json", content)
    results = load_results(tmp_path / "compact.json")
    assert results.scored_methods == ["lora", "badit"]
    assert results.cells["seconds"].tolist()[1] == 9.5
    assert len((tmp_path / "compact.json").read_text().splitlines()) < 20


def test_noise_is_separated_into_seeds_instances_and_single_scores():
    components, rng = load_script("noise")["components"], np.random.default_rng(0)
    found = components([np.array([[0.0], [3.0], [6.0]]) + np.array([0.0, 2.0, 4.0, 6.0])])
    assert found == pytest.approx({
        "difference": 6,
        "seeds": np.sqrt(9 / 3), "instances": np.sqrt(20 / 3 / 4), "single scores": 0,
        "all": np.sqrt(3 + 5 / 3), "bootstrap": np.sqrt(3 + 5 / 3),
    })  # fmt: skip
    seeds, size = rng.normal(size=(400, 1)), (400, 50)
    tasks = {
        name: 0.2 * seeds + rng.normal(size=50) + 5 * rng.normal(size=size) for name in ("a", "b")
    }
    found, known = components(list(tasks.values())), paired_bootstrap(tasks)
    assert found["single scores"] == pytest.approx(5 / np.sqrt(400 * 50 * 2), rel=0.05)
    assert found["instances"] == pytest.approx(1 / np.sqrt(50 * 2), rel=0.2)
    assert found["seeds"] == pytest.approx(0.2 / np.sqrt(400), rel=0.5)
    assert (known.high - known.low) / 3.92 == pytest.approx(found["bootstrap"], rel=0.05)
    # Means of the seeds: 1, 2 and 6. Their standard error is √(7 / 3), and the 97.5 % quantile of
    # t₂ is 4.303.
    interval = load_script("noise")["t_interval"](
        [np.array([[0, 2], [1, 3], [5, 7]]), np.array([[1.0], [2.0], [6.0]])]
    )
    assert interval == pytest.approx(
        (3 - 4.303 * np.sqrt(7 / 3), 3 + 4.303 * np.sqrt(7 / 3)), abs=1e-3
    )


def test_evidence_names_the_baselines_that_three_seeds_do_not_separate_from_cluster_gates():
    t_interval = load_script("noise")["t_interval"]
    root = Path(__file__).parents[1]
    results = load_results(root / "benchmarks/results/evidence-cpu")
    results = replace(results, reference="badit")
    evidence = (root / "docs" / "evidence.md").read_text(encoding="utf-8")
    paragraph = next(
        line for line in evidence.splitlines() if line.startswith("**Against the other baselines")
    )
    undecided = []
    for method in ("lora-plus", "lora-orthogonal", "mtl-lora", "goat", "loramoe", "hydralora",
                   "pissa", "lora-rank-4"):  # fmt: skip
        low, high = t_interval([*paired_differences(results, method, "nll").values()])
        if low < 0:
            undecided.append(method)
            assert f"{low:.3f} to {high:.3f}".replace("-", "−") in paragraph, method
    assert undecided == ["mtl-lora", "loramoe"]


# Of the compiler's own code.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(material, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "speed")
    script = load_script("speed/gpu")
    monkeypatch.setitem(
        script["main"].__globals__, "keep", lambda name, result: kept.update(result)
    )
    kept = {}
    options = {"device": "cpu", "model": str(material / "model"), "rounds": 1, "name": "gpu"}
    code = script["main"](Namespace(**options, small=True, vocabulary=40))
    assert [value for value in kept.values() if "error" in value] == []
    assert code == 0
    del kept["device"], kept["model"]
    measured = set(kept) - {"training step, FlashAttention"}
    assert {"training step, 4-bit", "SVD", "search of clusters", "decoding"} <= measured
    for name in measured:
        assert "seconds" in kept[name] or "8 prompts at a time" in kept[name], name
    losses = kept["training step, bfloat16"]["loss before training"]
    assert len(set(losses.values())) == 1, "every adapter starts at the base model"


def test_the_gpu_benchmark_records_a_part_that_fails(material, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "speed")
    script = load_script("speed/gpu")
    kept = {}

    def fails(machine):
        raise RuntimeError("out of memory")

    names = script["main"].__globals__
    monkeypatch.setitem(names, "keep", lambda name, result: kept.update(result))
    monkeypatch.setitem(names, "PARTS", {"first": fails, "second": lambda machine: {"seconds": 1}})
    options = {"device": "cpu", "model": "unused", "rounds": 1, "name": "gpu", "small": True}
    assert script["main"](Namespace(**options, vocabulary=40)) == 1
    assert kept["first"] == {"error": "RuntimeError: out of memory"}
    assert kept["second"] == {"seconds": 1}


@pytest.mark.parametrize("per_sequence", [False, True])
def test_loop_implementations_match_outputs_and_gradients(per_sequence):
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    config = BaditConfig(num_experts=4, r=2, target_modules=["0", "2"], lora_dropout=0.0, **PAPER)
    model = BaditModel(base, config, "default")
    randomise(model)
    x_BTI = torch.randn(3, 5, 12)

    def output_and_gradients():
        output = model(x_BTI)
        output.square().sum().backward()
        return output.detach(), gradients(model)

    output, wide = output_and_gradients()
    load_script("speed/loops")["use_loops"](model, per_sequence=per_sequence)
    looped, usual = output_and_gradients()
    torch.testing.assert_close(looped, output, rtol=1e-4, atol=1e-5)
    assert usual.keys() == wide.keys()
    for name, gradient in wide.items():  # sums whose terms cancel keep the rounding errors
        torch.testing.assert_close(
            usual[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())
        )
