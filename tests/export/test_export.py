"""Exports are a run's fixed mixture, checked layer by layer, and load without badit."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import reference
from badit.analysis.gates import adapted_layers, changed_gates, gates_of_task, mean_gates
from badit.data import AnswerCollator, batches_by_task
from badit.export import exporting
from badit.export.adapter import write_adapter
from badit.export.exporting import Export
from badit.export.factors import beyond_lora, merge, mixture_factors
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.support.files import OWNER, read_json
from badit.training.encoding import encoded
from badit.tuner import BaditConfig, hooks_of
from badit.tuner.targets import short_module_names
from baselines import naive as baselines
from export.contract import check_adapter
from materials import make_material, make_recipe
from refusals import refuses
from steps import evaluate, export, fit, load_run, score_export
from training.trainers import PAPER
from tuner.helpers import FAMILIES, adapt, adapted, layers, logits

TOKENS = [[5, 17, 33, 60, 9, 41, 8], [7, 7, 90, 12, 66, 23, 50]]
BADIT = {
    "name": "badit",
    "num_experts": 3,
    "r": 2,
    "lora_dropout": 0.0,
    **PAPER,
    "regroup": {"every": 1},
}
CHANGE = {
    "name": "badit",
    "num_experts": 3,
    "r": 2,
    "lora_dropout": 0.0,
    "init_weights": "bad",
    "gated": "change",
    "gates": "clusters",
    "key": "embedding",
    "codes": "grouped",
    "regroup": {"every": 1, "stop": 1.0},
}
DEFAULT = {"name": "badit", "num_experts": 3, "r": 2, "lora_dropout": 0.0}
LORA = {"r": 3, "lora_alpha": 12}
# Each method with the rank of its exact export.
METHODS = {
    "badit": (BADIT, 12),
    "softmax": ({**BADIT, "gates": "softmax", "top_k": 2, "regroup": None}, 12),
    "token": ({**BADIT, "routing": "token"}, 12),
    "directions": ({**BADIT, "init_weights": "directions", "router_input": "standardised"}, 6),
    "change": (CHANGE, 12),
    "default": (DEFAULT, 12),
    "loramoe": ({"name": "loramoe", "num_experts": 3, "r": 2}, 6),
    "hydralora": ({"name": "hydralora", "num_experts": 3, "r": 2}, 2),
    "goat": ({"name": "goat", "num_experts": 2, "r": 4, "lora_alpha": 8}, 8),
    **{name: ({"name": name, "r": 2}, 2) for name in ("mtl-lora", "gainlora", "sapt", "o-lora")},
    **{name: ({"name": name, **LORA}, 3) for name in ("lora", "pcgrad", "cagrad")},
    **{name: ({"name": name, **LORA}, 6) for name in ("pissa", "olora")},
    "rslora": ({"name": "rslora", **LORA, "rank_pattern": {"model.layers.1.mlp.gate_proj": 2}}, 3),
}
WEIGHTS = {
    "dora": {"name": "dora", **LORA},
    "full": {"name": "full"},
    "task-neurons": {"name": "task-neurons"},
}
VARY = (
    "badit",
    "softmax",
    "token",
    "directions",
    "change",
    "default",
    "loramoe",
    "hydralora",
    "goat",
    "mtl-lora",
    "gainlora",
    "sapt",
)
TASK_OF = {
    "mtl-lora": "cities",
    "directions": "rivers",
    "change": "cities",
    "default": "rivers",
}  # parameters of the task; clusters of prompts


@torch.no_grad()
def frozen_logits(run, folder, task):
    """Returns the logits of the run's own model with the gates of the export."""
    model, _ = load_run(run)
    ids = torch.tensor(TOKENS)
    if not (folder / "gates.json").is_file():
        return model(input_ids=ids).logits
    gates = read_json(folder / "gates.json")

    def hold(one, own):
        return torch.tensor(gates[one.layer.name]).expand(len(ids), 1, -1)

    with (
        changed_gates(adapted_layers(model), hold),
        hooks_of(model).rows_of(None if task is None else [task, task]),
    ):
        return model(input_ids=ids).logits


def test_stock_peft_loads_all_exports_and_computes_the_frozen_mixture(trained, tmp_path):
    runs, folders = {}, {}
    for name, (method, rank) in METHODS.items():
        run = runs[name] = trained(method)
        done = export(run, tmp_path / f"{name}-lora", task=TASK_OF.get(name))
        assert (done.rank, done.record["exact_rank"], "relative_error" in done.record) == (
            rank,
            rank,
            False,
        ), name
        assert (
            (done.record["mixture"] is not None)
            == (done.folder / "gates.json").is_file()
            == (name in VARY)
        ), name
        check_adapter(done.folder, load_run(run)[0].unload())
        folders[name] = str(done.folder)
    for name, method in WEIGHTS.items():
        runs[name] = trained(method)
        refuses("--merged", export, runs[name], tmp_path / f"{name}-lora")
    for name, run in runs.items():
        merged = export(run, tmp_path / f"{name}-merged", merged=True, task=TASK_OF.get(name))
        folders[f"{name}-merged"] = str(merged.folder)
    folders["base"] = runs["badit"].trusted_recipe().model.name
    script, file = (
        Path(__file__).with_name("stock.py"),
        tmp_path / "logits.safetensors",
    )  # a process without badit
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        script,
        json.dumps(TOKENS),
        json.dumps(folders),
        file,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logits_of = load_file(file)
    for name, run in runs.items():
        expected = frozen_logits(run, tmp_path / f"{name}-lora", TASK_OF.get(name))
        assert (expected - logits_of["base"]).abs().max() > 0.05, name
        for kind in {name, f"{name}-merged"} & logits_of.keys():
            torch.testing.assert_close(
                logits_of[kind], expected, atol=1e-5, rtol=1e-5, msg=lambda m, k=kind: f"{k}: {m}"
            )


def test_task_gates_are_the_mean_over_its_training_prompts(trained, tmp_path):
    run = trained(BADIT)
    recipe = run.trusted_recipe()
    model, tokenizer = load_run(run)
    means = {}
    for task in resolve(recipe).tasks:
        examples = encoded(tokenizer, recipe, [(task, instance) for instance in task.train], None)
        batches = batches_by_task(
            examples, AnswerCollator(0, with_tasks=True), 1
        )  # one prompt per batch
        means[task.name] = mean_gates(model, batches[task.name])
    exported_gates = {}
    for name in (None, "cities", "rivers"):
        done = export(run, tmp_path / "out", task=name)
        exported_gates[name] = read_json(done.folder / "gates.json")
    assert done.record["mixture"] == "mean gates of task rivers on 12 training prompts"
    for one in adapted_layers(model):
        of_name = {
            name: torch.tensor(gates[one.layer.name]) for name, gates in exported_gates.items()
        }
        for name in ("cities", "rivers"):
            torch.testing.assert_close(
                of_name[name], torch.tensor(means[name][one.layer.name]), atol=1e-5, rtol=1e-5
            )
        torch.testing.assert_close(of_name[None], (of_name["cities"] + of_name["rivers"]) / 2)
        assert not torch.equal(of_name["cities"], of_name["rivers"])


def test_export_of_all_tasks_measures_each_tasks_gates_once(
    trained, tmp_path, monkeypatch, command
):
    run, out = trained(BADIT), tmp_path / "all"
    exported = export(run, tmp_path / "one", task="cities")
    measured = []

    def measure(model, of_task):
        measured.append(of_task.dataset[0]["task"])
        return gates_of_task(model, of_task)

    monkeypatch.setattr("badit.analysis.gates.gates_of_task", measure)
    done = export(run, out, all_tasks=True)
    assert measured == ["rivers"]
    assert [task.folder for task in done.tasks.values()] == [out / "cities", out / "rivers"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "gates.json"):
        assert (out / "cities" / name).read_bytes() == (exported.folder / name).read_bytes()
    shown = command("export", run.path, "-o", out, "--all-tasks", "--rank", 4, "--score")
    assert f"--lora-modules cities={out}/cities rivers={out}/rivers" in shown
    assert "mean over tasks" in shown
    export(run, tmp_path / "mean")
    assert measured == ["rivers"]

    path = run.adapter_path / "adapter_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path)
    export(run, tmp_path / "mean")  # a changed adapter: its gates are measured again
    assert measured == ["rivers", "cities", "rivers"]
    run.config_path.write_text(
        run.config_path.read_text().replace("max_source_tokens: 1024", "max_source_tokens: 32")
    )
    export(run, tmp_path / "mean", task="rivers")  # so are those of other prompts
    assert measured == ["rivers", "cities", "rivers", "rivers"]
    (out / "cities" / "notes.txt").write_text("mine")
    refuses(r"cities: holds notes\.txt", export, run, out)


def test_gates_from_a_file_and_invalid_gates(trained, tmp_path):
    run = trained(BADIT)
    first = export(run, tmp_path / "first", task="cities").folder
    again = export(run, tmp_path / "again", gates=first / "gates.json").folder
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in (first, again))
    assert one == other
    gates = read_json(first / "gates.json")
    name = next(iter(gates))
    for wrong, message in [
        (
            {**gates, "model.layers.0.mlp.gate_prj": [1, 1, 1]},
            r"gate_prj: not a module that the run adapts \(did you",
        ),
        (
            {key: value for key, value in gates.items() if key != name},
            f"{name}: must be a list of 3 numbers",
        ),
        ({**gates, name: [1.0, 2.0]}, "must be a list of 3 numbers"),
        ({**gates, name: [1.0, 2.0, float("nan")]}, "must be a list of 3 numbers"),
    ]:
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        refuses(message, export, run, tmp_path / "other", gates=tmp_path / "wrong.json")
    assert not (tmp_path / "other").exists()


def test_export_of_a_clusters_code_equals_the_run_on_its_prompts(trained, tmp_path):
    run = trained(CHANGE)
    model, _ = load_run(run)
    ids = torch.tensor(TOKENS)
    seen = []
    holder = layers(model)[0]
    holder.register_forward_hook(lambda *_: seen.append(holder.routing.clusters("default")))
    with torch.no_grad():
        routed = model(input_ids=ids).logits
    for row, cluster in enumerate(seen[0].tolist()):
        gates = {layer.name: layer.badit_codes["default"][cluster] for layer in layers(model)}
        file = tmp_path / "code.json"
        file.write_text(json.dumps({name: gates_K.tolist() for name, gates_K in gates.items()}))
        for merged in (False, True):
            done = export(run, tmp_path / f"out-{merged}", gates=file, merged=merged)
            plain = AutoModelForCausalLM.from_pretrained(
                done.folder if merged else run.trusted_recipe().model.name, dtype=torch.float32
            )
            if not merged:
                assert done.rank == 12
                plain = PeftModel.from_pretrained(plain, done.folder)
            with torch.no_grad():
                logits_TV = plain(input_ids=ids[row][None]).logits[0]
            torch.testing.assert_close(logits_TV, routed[row], atol=1e-5, rtol=1e-5)
    done = export(run, tmp_path / "all", all_tasks=True)
    assert {exported.rank for exported in done.tasks.values()} == {12}


def test_smaller_rank_is_the_best_approximation_and_its_error_is_reported(
    trained, tmp_path, monkeypatch
):
    run = trained(BADIT)
    exact = load_file(export(run, tmp_path / "whole").folder / "adapter_model.safetensors")
    done = export(run, tmp_path / "small", rank=5)
    small = load_file(done.folder / "adapter_model.safetensors")
    lost, norm = 0.0, 0.0
    total, errors = done.record["relative_error"].values()
    for name, relative in errors.items():
        a, b = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
        product, approximation = exact[b] @ exact[a], small[b] @ small[a]
        closest = torch.from_numpy(reference.closest_of_rank(product, 5))
        torch.testing.assert_close(approximation.double(), closest, atol=1e-4, rtol=1e-4)
        assert relative == pytest.approx(
            float((product - approximation).norm() / product.norm()), rel=1e-3
        )
        lost += float((product - approximation).norm() ** 2)
        norm += float(product.norm() ** 2)
    assert total == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert 0 < total <= max(errors.values()) < 1
    assert read_json(done.folder / "export.json")["relative_error"] == {
        "total": total,
        "modules": errors,
    }

    assert [Export(Path("x"), {"rank": rank}).max_lora_rank for rank in (1, 8, 12, 257)] == [
        1,
        8,
        16,
        320,
    ]
    for module in ("exporting", "factors"):  # as if rank 12 could not be served
        monkeypatch.setattr(sys.modules[f"badit.export.{module}"], "VLLM_RANKS", (1, 8))
    forced = export(run, tmp_path / "forced")
    assert (forced.rank, forced.record["exact_rank"], forced.max_lora_rank) == (8, 12, 8)
    assert forced.record["relative_error"]["modules"]


def test_invalid_options_are_refused_and_nothing_is_written(trained, tmp_path):
    assert beyond_lora(BaditConfig(modules_to_save=["lm_head"], bias="all")) == [
        "modules_to_save",
        "bias",
    ]
    assert beyond_lora(LoraConfig(layer_replication=[(0, 1)])) == ["layer_replication"]
    assert beyond_lora(LoraConfig(init_lora_weights="pissa_niter_4")) == ["init_lora_weights"]
    for method, options, message in (
        (BADIT, {"task": "citys"}, r"--task: unknown task 'citys' \(did you mean 'cities'\?\)"),
        (
            BADIT,
            {"task": "cities", "gates": "x.json"},
            "only one of --task, --all-tasks and --gates",
        ),
        (
            BADIT,
            {"all_tasks": True, "merged": True},
            "--merged: writes a model without a rank; remove --all-tasks",
        ),
        (
            BADIT,
            {"rank": 4, "merged": True},
            "--merged: writes a model without a rank; remove --all-tasks and --rank",
        ),
        (BADIT, {"rank": 513}, "--rank: must be between 1 and 512, not 513"),
        ({"name": "base"}, {}, "there is nothing to export"),
        ({"name": "lora", **LORA}, {"task": "cities"}, "--gates: lora has no gates that vary"),
        ({"name": "o-lora", "r": 2}, {"gates": "x.json"}, "--gates: o-lora has no gates that vary"),
        (
            {"name": "mtl-lora", "r": 2},
            {},
            "mtl-lora learns each task separately: choose one with --task",
        ),
        ({"name": "badit"}, {}, "the mean gates of several tasks fit no prompt; use --all-tasks"),
        (
            {"name": "lora", **LORA, "bias": "all"},
            {},
            "method.bias: makes the adapter more than a plain LoRA",
        ),
    ):
        refuses(message, export, trained(method), tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's
@pytest.mark.parametrize("trained_part", ["lm_head", "embed_tokens"])
def test_merged_model_with_a_trained_head_or_embedding_is_not_tied(tmp_path, trained_part):
    make_material(tmp_path, tie_word_embeddings=True, initializer_range=0.2)
    values = make_recipe(tmp_path / "model", tmp_path / "tasks.jsonl", tmp_path / "run")
    values["training"]["max_steps"] = 2
    run = fit(
        build_recipe(values | {"method": {**BADIT, "modules_to_save": [trained_part]}}),
        progress=False,
    )
    folder = export(run, tmp_path / "out", merged=True).folder
    assert read_json(folder / "config.json")["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_folder_is_replaced_atomically_and_only_if_badit_wrote_it(trained, tmp_path, monkeypatch):
    run, out = trained(BADIT), tmp_path / "out"
    out.mkdir()
    assert export(run, out, merged=True).folder == out  # an empty folder is used
    for folder in (run.adapter_path, out):
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
            folder.stat().st_mode & 0o666
        }
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(
        sys.modules["badit.export.exporting"], "write_adapter", Mock(side_effect=KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        export(run, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    other = os.open(out, os.O_RDONLY)  # simulates another process that exports to this folder
    fcntl.flock(other, fcntl.LOCK_EX)
    refuses("out: is in use by another process", export, run, out)
    refuses("out: is in use by another process", score_export, run, Export(out, {"task": None}))
    os.close(other)
    assert export(run, out).folder == out
    assert not (out / OWNER).exists()
    (out / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for folder, message in (
        (
            Path(),
            r"\.: contains the current folder and would be replaced; choose another folder with -o",
        ),
        (out, r"out: holds notes\.txt, which badit did not write; choose another folder with -o"),
        (run.config_path, "is a file"),
    ):
        refuses(message, export, run, folder)


def test_interrupted_write_of_export_scores_does_not_block_the_folder(trained, tmp_path):
    run, out = trained(BADIT), tmp_path / "out"
    export(run, out, all_tasks=True)
    for folder in (out, out / "cities"):
        (folder / "scores.json.partial").write_text("{")
    assert export(run, out, all_tasks=True).folder == out


@pytest.mark.parametrize("name", ["export.json", "scores.json", "scores.json.partial"])
def test_tasks_named_as_files_of_an_export_are_refused_before_the_work(
    trained, tmp_path, monkeypatch, name
):
    run = trained(BADIT)
    source = Path(run.recipe.data.source)
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(source.read_text().replace('"cities"', json.dumps(name)))
    run.config_path.write_text(run.config_path.read_text().replace(str(source), str(renamed)))
    monkeypatch.setattr("badit.export.exporting.load_run", lambda *_: pytest.fail("loaded a model"))
    message = rf"task {name}: its folder would have the name of a file .*; use --task {name}"
    refuses(message, export, run, tmp_path / "out", all_tasks=True)
    assert not (tmp_path / "out").exists()


def test_export_of_a_run_without_varying_gates_has_the_same_scores(trained, tmp_path):
    run = trained({"name": "lora", **LORA})
    scores = {
        name: entry["rouge_l"] for name, entry in evaluate(run, progress=False)["tasks"].items()
    }
    for merged in (False, True):
        result = score_export(run, export(run, tmp_path / "out", merged=merged), progress=False)
        assert read_json(tmp_path / "out" / "scores.json") == result
        assert result["mixture"] is None
        same = {
            name: {"routed": score, "frozen": score, "difference": 0.0}
            for name, score in scores.items()
        }
        assert result["tasks"] == same


def test_score_export_scores_the_folder_of_the_export(trained, tmp_path):
    run = trained({**BADIT, "regroup": None})
    scores = evaluate(run, progress=False)
    fake = {
        **scores,
        "tasks": {name: {**entry, "rouge_l": 77.0} for name, entry in scores["tasks"].items()},
    }
    run.scores_path.write_text(json.dumps(fake))
    done = export(run, tmp_path / "out", task="cities", progress=False)
    result = score_export(run, done, progress=False)
    assert list(result["tasks"]) == ["cities"]
    entry = result["tasks"]["cities"]
    assert (entry["routed"], entry["difference"]) == (77.0, pytest.approx(entry["frozen"] - 77.0))
    message = r"^engine: vllm: cannot be started \(No module named .vllm.\); install vLLM"
    refuses(
        message, score_export, run, done, engine="vllm", progress=False
    )  # vLLM is tested in tests/serving
    path = done.folder / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(path).items()}, path)
    base = score_export(run, done, progress=False)["tasks"]["cities"]["frozen"]
    source = Path(run.recipe.data.source)
    changed = (
        tmp_path / "changed.jsonl"
    )  # other instances, so that the run's scores do not compare with the export's
    changed.write_text(source.read_text().replace("land 1", "land 9"))
    run.config_path.write_text(run.config_path.read_text().replace(str(source), str(changed)))
    assert score_export(run, done, progress=False)["tasks"]["cities"]["routed"] < 77
    assert base == evaluate(trained({"name": "base"}), progress=False)["tasks"]["cities"]["rouge_l"]


def test_tasks_without_training_or_test_data(trained, tmp_path):
    rows = [
        json.loads(line)
        for line in Path(trained(BADIT).recipe.data.source).read_text().splitlines()
    ]
    kept = [row for row in rows if row["split"] == ("train" if row["task"] == "cities" else "test")]
    (tmp_path / "split.jsonl").write_text("\n".join(map(json.dumps, kept)))
    run = trained(BADIT, tmp_path / "split.jsonl")
    done = export(run, tmp_path / "out", all_tasks=True, progress=False)
    assert list(done.tasks) == ["cities"]
    options = {"task": "cities", "score": True, "progress": False}
    refuses("cities: no test instances to score", run.export, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()
    (tmp_path / "split.jsonl").unlink()
    export(run, tmp_path / "one", gates=done.folder / "cities" / "gates.json", progress=False)


def test_export_command(trained, tmp_path, command):
    run = trained(BADIT)
    out = tmp_path / "exports" / "mine"
    assert "--task: unknown task '363'" in command(
        "export", run.path, "-o", out, "--task", 363, code=2
    )
    shown = command("export", run.path, "-o", out, "--rank", 4, "--score")
    assert "mean gates of 2 tasks, averaged over tasks, on 24 training prompts" in shown
    assert "4 of 12: relative error 0." in shown
    assert f"--enable-lora --max-lora-rank 8 --lora-modules mine={out}" in shown
    assert (out / "scores.json").is_file()
    assert f"vllm serve {out}" in command("export", run.path, "-o", out, "--merged")
    assert not (out / "scores.json").exists()  # they belonged to the previous export


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(trained, tmp_path, monkeypatch):
    run = trained(BADIT)
    monkeypatch.setattr(exporting, "load_run", lambda run: pytest.fail("loaded the model"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    scored = {"score": True, "all_tasks": True, "progress": False}
    message = "engine: vllm is not installed; install vLLM here, or use transformers"
    refuses(message, run.export, tmp_path / "out", engine="vllm", **scored)
    refuses("engine: unknown 'vlm'", run.export, tmp_path / "out", engine="vlm", **scored)
    refuses("gone.json", run.export, tmp_path / "out", gates=tmp_path / "gone.json")
    assert not (tmp_path / "out").exists()


def asked(shown):
    """Runs the printed request in a shell, without curl; returns its address and content."""
    request = next(line for line in shown.splitlines() if line.startswith("request "))
    script = 'curl() { printf "%s\\0" "$@"; }; ' + request.removeprefix("request ").strip()
    printed = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True)
    address, _, header, _, body, _ = printed.stdout.split("\0")
    assert header == "content-type: application/json"
    return address, json.loads(body)


def prompt_tokens(tokenizer, body):
    """Returns the tokens that a server makes of a request."""
    if "messages" in body:
        text = tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(body["prompt"])["input_ids"]


@pytest.fixture
def quoting_run(trained, tmp_path):
    rows = [
        {
            "task": task,
            "instruction": 'Say "it\'s" $HOME `pwd` \\n!\n',
            "input": f"{task} 🙂\t'é' " * (1 + (i - 2) ** 2),
            "output": "x",
            "split": "test" if i > 3 else "train",
        }
        for task in ("cities", "rivers")
        for i in range(6)
    ]
    file = tmp_path / "quotes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return trained(LORA | {"name": "lora"}, file)


@pytest.mark.parametrize("template", ["auto", "never"])
@pytest.mark.parametrize("merged", [False, True])
def test_the_printed_request_has_the_shortest_prompt_of_the_run(
    quoting_run, tmp_path, command, template, merged
):
    run = quoting_run
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("chat_template: auto", f"chat_template: {template}"))
    out = tmp_path / "exports" / "it's mine"
    address, body = asked(command("export", run.path, "-o", out, *["--merged"] * merged))
    path = "chat/completions" if template == "auto" else "completions"
    assert address == f"http://127.0.0.1:8000/v1/{path}"
    assert body["model"] == "it's mine"
    resolved = resolve(run.recipe)
    task = resolved.tasks[0]
    _, tokenizer = run.load()
    (example,) = encoded(tokenizer, run.recipe, [(task, task.train[2])], None)
    expected = example["input_ids"][: example["prompt_length"]]
    assert prompt_tokens(tokenizer, body) == expected
    end = example["input_ids"][-1]
    assert body.get("stop_token_ids", [tokenizer.eos_token_id]) == [end]
    assert body["max_tokens"] == run.recipe.evaluation.max_new_tokens


def test_requests_name_the_task_of_the_adapter(trained, tmp_path, command):
    run = trained(BADIT)
    _, body = asked(command("export", run.path, "-o", tmp_path / "all", "--all-tasks"))
    assert body["model"] == "cities"
    assert "Name the capital." in body["messages"][0]["content"]
    _, body = asked(command("export", run.path, "-o", tmp_path / "one", "--task", "rivers"))
    assert body["model"] == "one"
    assert "Name the river." in body["messages"][0]["content"]


def test_without_instances_the_request_has_a_placeholder(quoting_run, tmp_path, command):
    Path(quoting_run.recipe.data.source).unlink()
    _, body = asked(command("export", quoting_run.path, "-o", tmp_path / "out"))
    assert body["messages"] == [{"role": "user", "content": "PROMPT"}]


def test_commands_have_whole_paths(trained, tmp_path, monkeypatch, command):
    run = trained({**LORA, "name": "lora"})
    model = Path(run.recipe.model.name)
    monkeypatch.chdir(model.parent)
    config = run.config_path.read_text()
    run.config_path.write_text(config.replace(f"name: {model}\n", f"name: ./{model.name}\n"))
    assert run.recipe.model.name == "./model"
    relative = os.path.relpath(tmp_path)
    shown = command("export", run.path, "-o", f"{relative}/lora")
    assert f"vllm serve {model} --enable-lora" in shown
    assert f"lora={tmp_path}/lora\n" in shown
    assert f"convert_lora_to_gguf.py {tmp_path}/lora --base {model}\n" in shown
    shown = command("export", run.path, "-o", f"{relative}/merged", "--merged")
    assert f"vllm serve {tmp_path}/merged --served-model-name merged\n" in shown
    assert f"convert_hf_to_gguf.py {tmp_path}/merged\n" in shown
    assert "./" not in shown


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_equal_logits_adapted_merged_and_loaded(tiny_model, tmp_path, family):
    model, gates_K = (
        adapted(tiny_model(family), target_modules="all-linear"),
        torch.tensor([0.25, 2.0, 0.75]),
    )
    for layer in layers(model):
        layer._route = lambda adapter, x: gates_K.expand(*x.shape[:-1], -1)
    expected = logits(model)
    factors = mixture_factors(model, {layer.name: gates_K.tolist() for layer in layers(model)})
    for layer in layers(model):
        (a0, b0), (a_PI, b_OP) = layer.kept_factors("default"), factors[layer.name]
        gated_B = layer.badit_B["default"] * gates_K[layer.expert_of("default")]
        naive = 2.0 * reference.float64(gated_B @ layer.badit_A["default"] - b0 @ a0)
        np.testing.assert_allclose(
            reference.float64(b_OP) @ reference.float64(a_PI), naive, atol=1e-5
        )
    write_adapter(tmp_path, factors, model.unload(), "base")
    assert check_adapter(tmp_path, tiny_model(family))["fan_in_fan_out"] == (family == "gpt2")
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    merged = tiny_model(family)
    merge(merged, factors)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_ambiguous_module_names_are_full_and_shared_weights_are_not_merged(tiny_model):
    base = tiny_model("llama")
    names = [f"model.layers.{i}.mlp.{part}" for i in range(2) for part in ("gate_proj", "up_proj")]
    factors = dict.fromkeys(names)
    assert short_module_names(base, factors) == ["gate_proj", "up_proj"]
    del factors[names[0]]
    assert short_module_names(base, factors) == sorted(names[1:])
    base = tiny_model("gpt2")  # its head shares the weight of the embedding
    before = base.lm_head.weight.clone()
    factors = {"lm_head": (torch.ones(1, 32), torch.ones(len(before), 1))}
    refuses("lm_head: shares its weight with another module; export without", merge, base, factors)
    assert torch.equal(base.lm_head.weight, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_lora_conversion_accepts_only_fixed_mixtures(tiny_model, family):
    single = adapted(tiny_model(family), num_experts=1, r=4)
    for model, rank in ((single, 8), (baselines.adapted(tiny_model(family), "o-lora"), 6)):
        assert model.supports_lora_conversion()
        config, tensors = convert_to_lora(model, rank=rank)
        config.fan_in_fan_out = family == "gpt2"  # otherwise PEFT sets it with a warning
        plain = get_peft_model(tiny_model(family), config)
        named = {
            name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()
        }
        assert not plain.load_state_dict(named, strict=False).unexpected_keys
        torch.testing.assert_close(logits(plain.eval()), logits(model), atol=1e-3, rtol=1e-3)
    for model in (adapt(tiny_model(family)), baselines.adapted(tiny_model(family), "gainlora")):
        assert not model.supports_lora_conversion()


def test_merging_into_quantised_weights_is_refused(trained, tmp_path):
    for run in (trained(BADIT), trained({"name": "lora", **LORA})):
        run.config_path.write_text(
            run.config_path.read_text().replace("quantisation: null", "quantisation: bnb-8bit")
        )
        refuses(
            r"^--merged: the base weights are quantised",
            export,
            run,
            tmp_path / "model",
            merged=True,
        )
