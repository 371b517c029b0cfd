"""Complete analyses of a tiny run: written tables, resuming, and error messages."""

import fcntl
import json
import os
from collections import Counter
from contextlib import contextmanager

import pytest

import badit.analysis as module
from badit import analyze, train
from badit.analysis.tables import load_frames
from refusals import refuses
from report.samples import write_comparison
from training.trainers import change_tensors

PAIRS = {"gradient_pairs", "gradient_overall", "coactivation_pairs"}
INTERFERENCE = PAIRS | {"gradient_summary", "gradient_tasks", "coactivation", "coactivation_tasks"}
EXPERTS = {"gates", "gate_similarity", "expert_losses", "nearest_prompts", "abilities"}
EXPERTS |= {"expert_angles", "component_flow"}
# With one cluster, gates do not vary.
CLUSTERS = {"num_experts": 4, "r": 2, "num_clusters": 4, "regroup": {"every": 3}}


def test_run_with_experts_has_all_tables_and_skips_finished_parts(
    recipe_values, task_file, monkeypatch
):
    run = train(recipe_values, progress=False).path
    with monkeypatch.context() as patch:
        patch.setattr(module, "ability_atlas", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            analyze(run, instances=2, progress=False)
    assert load_frames(run / "analysis").keys() == INTERFERENCE
    monkeypatch.setattr(
        module, "measure_interference", lambda *a, **k: pytest.fail("measured again")
    )
    tables = analyze(run, instances=2, progress=False)
    assert tables.keys() == INTERFERENCE | EXPERTS | {"clusters"}
    monkeypatch.setattr(module, "load_run", lambda *a, **k: pytest.fail("loaded a model"))
    tables = analyze(run, instances=2, progress=False)
    for name in ("coactivation", "coactivation_tasks", "coactivation_pairs"):
        assert tables[name]["kind"].unique().tolist() == ["neurons", "parameters", "experts"]
    flow, angles = tables["component_flow"], tables["expert_angles"]
    assert set(flow["step"]) == {3, 6, 9}  # of twelve steps; the run has four experts of rank 2
    for side in ("from_expert", "to_expert"):
        moved = flow.groupby(["step", "layer", side])["components"].sum()
        assert moved.tolist() == [2] * (3 * 2 * 4)  # every expert keeps its rank
    assert (flow["from_expert"] != flow["to_expert"]).any()
    assert Counter(angles["measured"]) == {"before": 3 * 2, "after": 3 * 2, "held-out": 2}
    assert set(angles.loc[angles["measured"] == "held-out", "step"]) == {12}
    assert angles["within_degrees"].between(0, 180, inclusive="neither").all()
    record = json.loads((run / "analysis.json").read_text())
    assert list(record["parts"]) == ["interference", "experts", "learning"]
    message = r"analysis: belongs to .* or to other settings; delete it and analysis\."
    refuses(message, analyze, run, instances=3, progress=False)
    weights = run / "adapter" / "adapter_model.safetensors"
    for file, word in ((weights, b"layers"), (task_file, b"rivers")):
        content = file.read_bytes()
        file.write_bytes(content.replace(word, word.upper()))
        refuses("belongs to another run, model or data", analyze, run, instances=2, progress=False)
        file.write_bytes(content)
    gates = run / "analysis" / "gates.json"
    whole = gates.read_text()
    gates.write_text(whole.replace('"mean"', '"other"'))
    with pytest.raises(pytest.fail.Exception, match="loaded a model"):
        analyze(run, instances=2, progress=False)  # a table without a column is made again
    gates.unlink()
    with pytest.raises(pytest.fail.Exception, match="loaded a model"):
        analyze(run, instances=2, progress=False)
    (run / "analysis.json").write_text(json.dumps({**record, "parts": 5}))
    refuses("delete it and analysis", analyze, run, instances=2, progress=False)


@pytest.mark.parametrize(
    ("data", "method", "tables"),
    [
        (
            {"tasks": ["cities"]},
            {"method": CLUSTERS},
            (INTERFERENCE | EXPERTS | {"clusters"}) - PAIRS - {"gate_similarity"},
        ),
        ({"order": "seeded-0"}, {"method": {"name": "lora", "r": 2}}, INTERFERENCE | {"transfer"}),
        ({"tasks": ["cities"]}, {"method": {"name": "base"}}, INTERFERENCE - PAIRS),
    ],
)
def test_tables_depend_on_tasks_order_and_method(recipe_values, data, method, tables):
    recipe_values["data"] |= data
    run = train(recipe_values | method, progress=False)
    assert analyze(run, instances=4, progress=False).keys() == tables


def test_report_in_another_folder_shows_the_runs_scores(recipe_values, tmp_path, command):
    run, apart = train(recipe_values, progress=False).path, tmp_path / "apart"
    command("analyze", run, "--instances", 2, "-o", apart)
    assert not (run / "analysis").exists()
    page = (apart / "report.html").read_text()
    assert "scores.json</code>" in page
    assert "<code>analysis/clusters.json</code> of apart" in page


def test_folder_in_use_is_refused_also_if_its_analysis_is_finished(
    recipe_values, tmp_path, command
):
    run, comparison = train(recipe_values, progress=False).path, tmp_path / "comparison"
    write_comparison(comparison)
    analyze(run, instances=2, progress=False)
    for target in (run, comparison):
        with held(target):
            message = command("analyze", target, *["--instances=2"] * (target == run), code=2)
        assert f"{target}: is in use by another process; wait until it ends" in message
        assert not (target / "report.html").exists()


@contextmanager
def held(folder):
    """A lock of another process on a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_base_model_is_measured_on_given_data(model_folder, task_file, tmp_path):
    output = tmp_path / "base"
    options = {"data": task_file, "instances": 2, "output": output, "progress": False}
    assert analyze(model_folder, **options).keys() == INTERFERENCE
    assert (output / "config.yaml").is_file()
    message = r"to another run, model or data.*; delete it, analysis\.json and config"
    refuses(message, analyze, "smollm2-135m", **options)
    assert json.loads((output / "environment.json").read_text())["packages"]
    double = change_tensors(lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    double(model_folder / "model.safetensors")
    refuses("to another run, model or data", analyze, model_folder, **options)


def test_input_errors_are_one_line_with_exit_code_2(model_folder, tmp_path, command):
    lonely, comparison = tmp_path / "lonely.jsonl", write_comparison(tmp_path / "comparison")
    lonely.write_text('{"task": "sums", "instruction": "Add.", "input": "1 1", "output": "2"}\n')
    for arguments, message in (
        (
            [str(model_folder), "--data", "builtin", "--instances", "1"],
            "instances: must be at least 2",
        ),
        (
            ["no-such-model"],
            "no-such-model: not a run's folder; to analyze a base model, set its tasks",
        ),
        (["no-such-model", "--data", "nowhere"], "nowhere"),
        ([str(comparison), "--data", "builtin"], "--data: not used with a comparison such as"),
        (
            [str(model_folder), "--data", str(lonely)],
            "data: task sums has no split with at least 2 instances",
        ),
    ):
        assert message in command("analyze", *arguments, "-o", tmp_path / "o", code=2)
        assert not (tmp_path / "o").exists()
