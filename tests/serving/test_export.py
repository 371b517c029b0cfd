"""An export is the run's fixed mixture, loaded without badit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import badit
from badit.analysis.gates import adapted_layers, changed_gates
from badit.errors import BaditError
from badit.evaluate import load_run
from badit.runs import RunFolder
from badit.serving.export import Export, export
from badit.serving.files import merge
from badit.tuner import hooks_of
from serving.contract import check_adapter

Trained = Callable[..., RunFolder]
TOKENS = [[5, 17, 33, 60, 9, 41, 8], [7, 7, 90, 12, 66, 23, 50]]
BADIT = {"name": "badit", "num_experts": 3, "r": 2, "lora_dropout": 0.0, "regroup": {"every": 1}}
LORA = {"r": 3, "lora_alpha": 12}
# Each with the rank that an exact export takes.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "badit": (BADIT, 12),
    "folded": ({**BADIT, "base_weight": "folded"}, 12),
    "softmax": ({**BADIT, "gates": "softmax", "top_k": 2}, 12),
    "token": ({**BADIT, "routing": "token"}, 12),
    "directions": ({**BADIT, "init_weights": "directions", "router_input": "standardised"}, 6),
    "loramoe": ({"name": "loramoe", "num_experts": 3, "r": 2}, 6),
    "hydralora": ({"name": "hydralora", "num_experts": 3, "r": 2}, 2),
    "goat": ({"name": "goat", "num_experts": 2, "r": 4, "lora_alpha": 8}, 8),
    "mtl-lora": ({"name": "mtl-lora", "r": 2}, 2),
    "gainlora": ({"name": "gainlora", "r": 2}, 2),
    "o-lora": ({"name": "o-lora", "r": 2}, 2),
    "lora": ({"name": "lora", **LORA}, 3),
    "rslora": ({"name": "rslora", **LORA, "rank_pattern": {"model.layers.1.mlp.gate_proj": 2}}, 3),
    "pissa": ({"name": "pissa", **LORA}, 6),
    "olora": ({"name": "olora", **LORA}, 6),
    "pcgrad": ({"name": "pcgrad", **LORA}, 3),
}
WEIGHTS: dict[str, dict[str, Any]] = {"dora": {"name": "dora", **LORA}, "full": {"name": "full"}}
VARY = ("badit", "folded", "softmax", "token", "directions", "loramoe", "hydralora", "goat", "mtl-lora", "gainlora")


def chosen(name: str) -> dict[str, Any]:
    return {"task": "cities"} if name == "mtl-lora" else {}


@torch.no_grad()
def frozen_logits(run: RunFolder, folder: Path, task: str | None) -> torch.Tensor:
    """The run's own model with its gates held at those that the export has kept."""
    model, _ = load_run(run)
    ids = torch.tensor(TOKENS)
    gates = json.loads((folder / "gates.json").read_text()) if (folder / "gates.json").is_file() else None
    if gates is None:
        return model(input_ids=ids).logits

    def hold(one: Any, own: torch.Tensor) -> torch.Tensor:
        return torch.tensor(gates[one.layer.name])[one.expert_of_N].expand(len(ids), 1, -1)

    with changed_gates(adapted_layers(model), hold), hooks_of(model).rows_of(None if task is None else [task, task]):
        return model(input_ids=ids).logits


def stock_logits(jobs: list[tuple[str, Path, Path | None]], tmp_path: Path) -> dict[str, torch.Tensor]:
    """The logits of folders that a process without badit has loaded."""
    files = [
        {
            "base": str(base),
            "adapter": None if adapter is None else str(adapter),
            "tokens": TOKENS,
            "logits": str(tmp_path / f"{name}.logits"),
        }
        for name, base, adapter in jobs
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(files))
    script = Path(__file__).with_name("stock.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script), str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: load_file(tmp_path / f"{name}.logits")["logits"] for name, _, _ in jobs}


def test_stock_peft_loads_every_methods_export_and_gets_the_frozen_mixture(
    trained: Trained, model_folder: Path, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    runs, exports, jobs = {}, {}, []
    for name, (method, rank) in METHODS.items():
        runs[name] = trained(method, name=name)
        exports[name] = done = export(runs[name].path, tmp_path / f"{name}-lora", **chosen(name))
        assert (done.rank, done.exact_rank, done.errors) == (rank, rank, {}), name
        assert (done.mixture is not None) == (name in VARY), name
        assert (done.folder / "gates.json").is_file() == (name in VARY), name
        check_adapter(done.folder, load_run(runs[name])[0].unload())
        merged = export(runs[name].path, tmp_path / f"{name}-merged", merged=True, **chosen(name))
        jobs += [(name, model_folder, done.folder), (f"{name}-merged", merged.folder, None)]
    for name, method in WEIGHTS.items():
        runs[name] = trained(method, name=name)
        with pytest.raises(BaditError, match="--merged"):
            export(runs[name].path, tmp_path / f"{name}-lora")
        merged = export(runs[name].path, tmp_path / f"{name}-merged", merged=True)
        jobs.append((f"{name}-merged", merged.folder, None))
    jobs.append(("base", model_folder, None))

    found = stock_logits(jobs, tmp_path)
    for name, run in runs.items():
        expected = frozen_logits(run, tmp_path / f"{name}-lora", chosen(name).get("task"))
        assert (expected - found["base"]).abs().max() > 0.05, name
        for kind in (name, f"{name}-merged"):
            if kind in found:
                torch.testing.assert_close(
                    found[kind], expected, atol=1e-5, rtol=1e-5, msg=lambda m, k=kind: f"{k}: {m}"
                )


def test_a_tasks_gates_are_the_mean_over_its_training_prompts(trained: Trained, tmp_path: Path) -> None:
    from badit.analysis.gates import mean_component_gates
    from badit.data import AnswerCollator, batches_by_task
    from badit.training.plan import encoded, make_plan

    run = trained(BADIT)
    recipe = run.recipe()
    model, tokenizer = load_run(run)
    means = {}
    for task in make_plan(recipe).tasks:
        examples = [encoded(tokenizer, recipe, task, instance) for instance in task.train]
        batches = batches_by_task(examples, AnswerCollator(0, with_tasks=True), 1)  # a prompt at a time
        means[task.name] = mean_component_gates(model, batches)[task.name]
    adapted = adapted_layers(model)
    kept = {}
    for name in ("cities", "rivers", None):
        done = export(run.path, tmp_path / "out", task=name)
        kept[name] = json.loads((done.folder / "gates.json").read_text())
    for i, one in enumerate(adapted):
        of_name = {name: torch.tensor(gates[one.layer.name])[one.expert_of_N] for name, gates in kept.items()}
        for name in ("cities", "rivers"):
            torch.testing.assert_close(of_name[name], means[name][i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of_name[None], (of_name["cities"] + of_name["rivers"]) / 2)
        assert not torch.equal(of_name["cities"], of_name["rivers"])
    assert "of task cities on 12 training prompts" in export(run.path, tmp_path / "out", task="cities").mixture


def test_gates_of_a_file(trained: Trained, tmp_path: Path) -> None:
    run = trained(BADIT)
    first = export(run.path, tmp_path / "first", task="cities").folder
    again = export(run.path, tmp_path / "again", gates=first / "gates.json").folder
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    gates = json.loads((first / "gates.json").read_text())
    name = next(iter(gates))
    for wrong, message in [
        (
            {**gates, "model.layers.0.mlp.gate_prj": [1, 1, 1]},
            r"gate_prj: the run adapts no such module \(did you mean",
        ),
        ({key: value for key, value in gates.items() if key != name}, f"{name}: is missing; give it a list of 3 gates"),
        ({**gates, name: [1.0, 2.0]}, "must be a list of 3 numbers"),
        ({**gates, name: [1.0, 2.0, "3"]}, "must be a list of 3 numbers"),
        ({**gates, name: [1.0, 2.0, float("nan")]}, "must be a list of 3 numbers"),
    ]:
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(BaditError, match=message):
            export(run.path, tmp_path / "other", gates=tmp_path / "wrong.json")
    assert not (tmp_path / "other").exists()


def test_a_smaller_rank_is_the_closest_one_and_its_error_is_reported(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reference
    from badit.serving import export as module

    run = trained(BADIT)
    whole = load_file(export(run.path, tmp_path / "whole").folder / "adapter_model.safetensors")
    done = export(run.path, tmp_path / "small", rank=5)
    small = load_file(done.folder / "adapter_model.safetensors")
    lost, norm = 0.0, 0.0
    for name, relative in done.errors.items():
        product, found = (
            t[f"base_model.model.{name}.lora_B.weight"] @ t[f"base_model.model.{name}.lora_A.weight"]
            for t in (whole, small)
        )
        torch.testing.assert_close(
            found.double(), torch.from_numpy(reference.closest_of_rank(product, 5)), atol=1e-4, rtol=1e-4
        )
        assert relative == pytest.approx(float((product - found).norm() / product.norm()), rel=1e-3)
        lost, norm = lost + float((product - found).norm() ** 2), norm + float(product.norm() ** 2)
    assert done.total_error == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert 0 < done.total_error <= max(done.errors.values()) < 1
    record = json.loads((done.folder / "export.json").read_text())
    assert record["relative_error"] == {"total": done.total_error, "modules": done.errors}

    monkeypatch.setattr(module, "VLLM_RANKS", (1, 8))  # as if a rank of 12 were too much to serve
    forced = export(run.path, tmp_path / "forced")
    assert (forced.rank, forced.exact_rank, forced.max_lora_rank) == (8, 12, 8)
    assert forced.errors


def test_modules_are_named_whole_where_their_last_names_mean_others_too(trained: Trained, tmp_path: Path) -> None:
    part = trained({**BADIT, "layers_to_transform": [1]})
    config = json.loads((export(part.path, tmp_path / "part").folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.gate_proj"]


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (12, 16), (65, 128), (257, 320), (512, 512)])
def test_the_room_that_vllm_must_make(rank: int, room: int) -> None:
    assert Export(Path("x"), None, None, rank, rank).max_lora_rank == room


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (BADIT, {"task": "citys"}, r"the run has no task citys \(did you mean 'cities'\?\); known: cities, rivers"),
        (BADIT, {"task": "cities", "gates": "x.json"}, "not both"),
        (BADIT, {"rank": 4, "merged": True}, "--rank: a merged weight has no rank"),
        (BADIT, {"rank": 0}, "--rank: must be between 1 and 512, not 0"),
        (BADIT, {"rank": 513}, "--rank: must be between 1 and 512, not 513"),
        ({"name": "base"}, {}, "there is nothing to export"),
        ({"name": "lora", **LORA}, {"task": "cities"}, "--task: lora does the same for every prompt"),
        ({"name": "o-lora", "r": 2}, {"gates": "x.json"}, "--gates: o-lora does the same for every prompt"),
        ({"name": "mtl-lora", "r": 2}, {}, "a matrix apart for every task: choose one with --task"),
        ({"name": "lora", **LORA, "bias": "all"}, {}, "method.bias: makes the adapter more than a plain LoRA"),
        (
            {"name": "lora", **LORA, "modules_to_save": ["lm_head"]},
            {},
            "method.modules_to_save: makes the adapter more",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    trained: Trained, tmp_path: Path, method: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    run = trained(method)
    with pytest.raises(BaditError, match=message):
        export(run.path, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_a_folder_is_replaced_only_by_what_wrote_it(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from badit.serving import export as module

    run, out = trained(BADIT), tmp_path / "out"
    out.mkdir()
    assert badit.export(run.path, out).folder == out  # an empty one is taken
    badit.export(run.path, out, merged=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(module, "write_adapter", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        badit.export(run.path, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(
        BaditError, match=r"out: holds notes\.txt, which is of no export; choose another folder with -o"
    ):
        badit.export(run.path, out)
    with pytest.raises(BaditError, match="is of no export"):
        badit.export(run.path, run.path)
    with pytest.raises(BaditError, match="is a file"):
        badit.export(run.path, run.config)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("method", "message"), [(BADIT, "gate_proj holds NaN"), ({"name": "lora", **LORA}, "NaN")])
def test_a_run_that_has_diverged_is_not_exported(
    trained: Trained, tmp_path: Path, method: dict[str, Any], message: str, merged: bool
) -> None:
    run = trained(method)
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith((".badit_B", ".lora_B.weight")))[0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(BaditError, match=message):
        export(run.path, tmp_path / "out", merged=merged)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_merged_into_a_weight_that_is_shared(tiny_model: Callable[..., Any]) -> None:
    base = tiny_model("gpt2")  # whose head is its embedding
    before = base.lm_head.weight.clone()
    with pytest.raises(BaditError, match="lm_head: shares its weight with another module"):
        merge(base, {"lm_head": (torch.ones(1, 32), torch.ones(len(before), 1))})
    assert torch.equal(base.lm_head.weight, before)
