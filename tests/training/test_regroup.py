"""The regrouping callback in a real Trainer: what it reads, what it changes, what it remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import reference
from badit.angles import trainable_adapters
from badit.errors import BaditError
from badit.method import expert_angles, grouping_objective
from badit.regroup import STATE_FILE, RegroupCallback
from training.trainers import StopAt, adapted, make_trainer

Model = Callable[..., Any]

# PEFT 0.19 looks for the model's configuration on disk when it saves; these models never were there.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "regroupings.jsonl").read_text().splitlines()]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "badit_" in name}


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Watch(TrainerCallback):
    """Keeps every step's gradients, as they stand before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = {}
        for name, (layer, adapter) in trainable_adapters(kwargs["model"]):
            pair = layer.badit_A[adapter].grad, layer.badit_B[adapter].grad
            gradients[name] = tuple(grad.double().numpy().copy() for grad in pair)
        self.gradients.append(gradients)


def test_every_line_holds_an_exact_partition_of_the_mean_gram_and_the_angles_of_the_window_after(
    tiny_model: Model, tmp_path: Path
) -> None:
    model = adapted(tiny_model("llama"))
    watch = Watch()
    callbacks = [RegroupCallback(every=3, stop=0.8), watch]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.01}
    make_trainer(model, tmp_path, callbacks, **options).train()
    assert len(watch.gradients) == 12, "of optimizer steps, not of micro-batches"
    lines = log_lines(tmp_path)
    layers = dict(trainable_adapters(model))
    assert {(line["step"], line["module"]) for line in lines} == {(step, name) for step in (3, 6, 9) for name in layers}
    assert sum(line["components_moved"] for line in lines) > 0, "a test in which nothing moves shows nothing"

    def mean_gram(line: dict[str, Any], first: int) -> np.ndarray:
        window = watch.gradients[first : first + 3]
        return np.mean([reference.cosine_gram(*step[line["module"]]) for step in window], axis=0)

    for line in lines:
        before_N, after_N = np.array(line["previous_labels"]), np.array(line["labels"])
        assert line["objective_after"] >= line["objective_before"]
        assert np.bincount(after_N).tolist() == [2, 2, 2, 2]
        assert line["components_moved"] == (before_N != after_N).sum()
        grouped_NN = mean_gram(line, line["step"] - 3)
        assert line["objective_before"] == pytest.approx(grouping_objective(grouped_NN, before_N), rel=1e-4)
        assert line["objective_after"] == pytest.approx(grouping_objective(grouped_NN, after_N), rel=1e-4)
        assert (line["logged_at"], line["window_steps"]) == (line["step"] + 3, 3)
        for prefix, labels_N in (("", after_N), ("previous_", before_N)):
            angles = expert_angles(mean_gram(line, line["step"]), labels_N)
            assert line[f"{prefix}intra_degrees"] == pytest.approx(angles.intra_degrees, abs=0.01)
            assert line[f"{prefix}inter_abs_cos"] == pytest.approx(angles.inter_abs_cos, abs=1e-4)
    for name, (layer, adapter) in layers.items():
        last = [line for line in lines if line["module"] == name][-1]
        assert layer.expert_of(adapter).tolist() == last["labels"]
        assert layer.expert_of(adapter).dtype == torch.int64


def test_start_and_stop_bound_the_regroupings(tiny_model: Model, tmp_path: Path) -> None:
    make_trainer(adapted(tiny_model("llama")), tmp_path, [RegroupCallback(every=2, start=0.4, stop=0.7)]).train()
    assert sorted({line["step"] for line in log_lines(tmp_path)}) == [6, 8]


@pytest.mark.parametrize("rescale", [False, True])
def test_what_a_regrouping_changes(tiny_model: Model, tmp_path: Path, rescale: bool) -> None:
    """Without rescale no weight at all; with it the weight of the mean mixture stays the same."""
    model = adapted(tiny_model("llama"))
    seen: dict[int, Any] = {}

    class Before(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                seen["before"] = state_of(model)
                seen["gates"] = {
                    name: window.gate_sums[:-1] / window.gate_sums[-1]
                    for name, window in regroup.regrouper.windows.items()
                }
                seen["delta"] = {
                    name: layer.get_delta_weight(adapter, seen["gates"][name]).detach()
                    for name, (layer, adapter) in trainable_adapters(model)
                }

    class After(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                seen["after"] = state_of(model)
                for name, (layer, adapter) in trainable_adapters(model):
                    delta = layer.get_delta_weight(adapter, seen["gates"][name]).detach()
                    seen[name] = (delta - seen["delta"][name]).abs().max() / seen["delta"][name].abs().max()

    regroup = RegroupCallback(every=6, rescale=rescale)
    # A large router makes the experts' mean gates differ, so that a moved component would be scaled differently.
    for _, (layer, adapter) in trainable_adapters(model):
        torch.nn.init.normal_(layer.badit_router[adapter], std=0.5)
    make_trainer(model, tmp_path, [Before(), regroup, After()]).train()
    assert any(line["components_moved"] for line in log_lines(tmp_path) if line["step"] == 6)
    changed = {
        name.split(".")[-2] for name in seen["before"] if not torch.equal(seen["before"][name], seen["after"][name])
    }
    assert changed == ({"badit_expert_of", "badit_B"} if rescale else {"badit_expert_of"})
    drift = max(float(seen[name]) for name, _ in trainable_adapters(model))
    assert drift < 1e-5 if rescale else drift > 1e-3


def test_the_output_change_is_what_a_forward_pass_shows(tiny_model: Model, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"))
    probe = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    logits: dict[str, torch.Tensor] = {}

    def centred() -> torch.Tensor:
        with torch.no_grad():
            row = model.eval()(**probe).logits[0, -1]
        model.train()
        return row - row.mean()

    class Before(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                logits["before"] = centred()

    class After(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                logits["after"] = centred()

    make_trainer(model, tmp_path, [Before(), RegroupCallback(every=6, probe=probe), After()]).train()
    expected = (logits["after"] - logits["before"]).norm() / logits["before"].norm()
    first = [line for line in log_lines(tmp_path) if line["step"] == 6]
    assert expected > 0
    assert [line["output_change"] for line in first] == pytest.approx([float(expected)] * len(first), rel=1e-4)


@pytest.mark.parametrize("stopped_at", [7, 9])
def test_resuming_is_exact(tiny_model: Model, tmp_path: Path, stopped_at: int) -> None:
    """Killed within a window, and right after a regrouping; the last checkpoint is of step 5 or 10."""
    whole = adapted(tiny_model("llama"))
    make_trainer(whole, tmp_path / "whole", [RegroupCallback(every=3)]).train()

    killed = adapted(tiny_model("llama"))
    with pytest.raises(KeyboardInterrupt):
        make_trainer(killed, tmp_path / "killed", [RegroupCallback(every=3), StopAt(stopped_at)]).train()
    resumed = adapted(tiny_model("llama"))
    make_trainer(resumed, tmp_path / "killed", [RegroupCallback(every=3)]).train(resume_from_checkpoint=True)

    assert_same_state(state_of(whole), state_of(resumed))
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "killed")


def test_a_checkpoint_without_its_regrouping_state_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    make_trainer(adapted(tiny_model("llama")), tmp_path, [RegroupCallback(every=3)]).train()
    checkpoint = tmp_path / "checkpoint-10"

    def resume(**options: Any) -> None:
        trainer = make_trainer(adapted(tiny_model("llama")), tmp_path, [RegroupCallback(every=3, **options)])
        trainer.train(resume_from_checkpoint=str(checkpoint))

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (checkpoint / STATE_FILE).rename(moved / STATE_FILE)
    with pytest.raises(BaditError, match="is missing"):
        resume()
    resume(checkpoint=moved)

    (checkpoint / STATE_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(BaditError, match="is damaged"):
        resume()
    save_file({}, checkpoint / STATE_FILE, metadata={"windows": json.dumps({"another.layer": {}})})
    with pytest.raises(BaditError, match="another model"):
        resume()


def test_the_checkpoint_holds_integers_and_safetensors(tiny_model: Model, tmp_path: Path) -> None:
    make_trainer(adapted(tiny_model("llama")), tmp_path, [RegroupCallback(every=3)]).train()
    adapter = load_file(tmp_path / "checkpoint-10" / "adapter_model.safetensors")
    labels = [tensor for name, tensor in adapter.items() if "expert_of" in name]
    assert len(labels) == 2
    assert {tensor.dtype for tensor in labels} == {torch.int64}
    grams = load_file(tmp_path / "checkpoint-10" / STATE_FILE)
    assert {tuple(tensor.shape) for name, tensor in grams.items() if name.startswith("gram_sum")} == {(8, 8)}


def test_no_adapter_is_an_error(tiny_model: Model, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model("llama"), tmp_path, [RegroupCallback()])
    with pytest.raises(BaditError, match="no trainable BADIT adapter"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"every": 0}, "every"),
        ({"every": True}, "every"),
        ({"start": 0.5, "stop": 0.2}, "start and stop"),
        ({"stop": 1.5}, "start and stop"),
        ({"solver": "greedy"}, "solver"),
        ({"restarts": -1}, "restarts"),
    ],
)
def test_bad_options(options: dict[str, Any], field: str) -> None:
    with pytest.raises(BaditError, match=field):
        RegroupCallback(**options)


def test_the_papers_solver_is_used_when_asked_for(tiny_model: Model, tmp_path: Path) -> None:
    objectives = {}
    for solver in ("swap", "paper"):
        model = adapted(tiny_model("llama"))
        make_trainer(model, tmp_path / solver, [RegroupCallback(every=6, solver=solver)]).train()  # pyright: ignore
        objectives[solver] = [line["objective_after"] for line in log_lines(tmp_path / solver) if line["step"] == 6]
    assert all(swap >= paper - 1e-9 for swap, paper in zip(objectives["swap"], objectives["paper"], strict=True))
    assert objectives["swap"] != objectives["paper"]
