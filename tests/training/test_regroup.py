"""Regrouping in a Trainer and in a plain loop: partitions, angles, weights, state, refusals."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import reference
from badit import BaditConfig, RegroupCallback, Regrouper
from badit.data import AnswerCollator
from badit.method import expert_angles, grouping_objective
from badit.recipe.method import resolve_method
from badit.support.files import read_jsonl
from badit.training.regrouping import STATE_FILE, trainable_adapters
from badit.tuner.config import RegroupOptions
from refusals import refuses
from steps import method_of
from training.trainers import QUIET, adapted, adapter_state, assert_same, examples, make_trainer, on

LOG = "regroupings.jsonl"
BATCHES = 12


def gradients_into(steps, model):
    """A callback that appends each step's gradients of A and B, by layer, to ``steps``."""
    layers = list(trainable_adapters(model))

    def keep(state, keywords):
        steps.append(
            {
                name: [side[a].grad.clone() for side in (m.badit_A, m.badit_B)]
                for name, (m, a) in layers
            }
        )

    return on("on_pre_optimizer_step", keep)


def mean_gram(steps, line):
    return np.mean([reference.cosine_gram(*step[line["module"]]) for step in steps], axis=0)


def test_log_has_partition_by_mean_gram_and_angles_of_next_window(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"))
    layers, steps = dict(trainable_adapters(model)), []
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.01,
    }
    make_trainer(
        model,
        tmp_path,
        [RegroupCallback(every=3, stop=0.8), gradients_into(steps, model)],
        **options,
    ).train()
    assert len(steps) == 12, "optimizer steps, not micro-batches"
    lines = list(read_jsonl(tmp_path / LOG))
    assert [(line["step"], line["module"]) for line in lines] == [
        (step, name) for step in (3, 6, 9) for name in layers
    ]
    assert any(line["components_moved"] for line in lines)
    for line in lines:
        before_N, after_N = np.array(line["previous_labels"]), np.array(line["labels"])
        assert line["objective_after"] >= line["objective_before"]
        assert np.bincount(after_N).tolist() == [2, 2, 2, 2]
        assert line["components_moved"] == (before_N != after_N).sum()
        grouped_NN, next_NN = (
            mean_gram(steps[step - 3 : step], line) for step in (line["step"], line["step"] + 3)
        )
        assert line["objective_before"] == pytest.approx(
            grouping_objective(grouped_NN, before_N), rel=1e-4
        )
        assert line["objective_after"] == pytest.approx(
            grouping_objective(grouped_NN, after_N), rel=1e-4
        )
        assert (line["logged_at"], line["window_steps"]) == (line["step"] + 3, 3)
        for prefix, labels_N in (("", after_N), ("previous_", before_N)):
            angles = expert_angles(next_NN, labels_N)
            assert line[f"{prefix}intra_degrees"] == pytest.approx(angles.intra_degrees, abs=0.01)
            assert line[f"{prefix}inter_abs_cos"] == pytest.approx(angles.inter_abs_cos, abs=1e-4)
    last = {line["module"]: line["labels"] for line in lines}
    assert {
        name: layer.expert_of(adapter).tolist() for name, (layer, adapter) in layers.items()
    } == last


def test_the_last_step_of_a_fraction_is_due():
    assert list(RegroupOptions(every=29, stop=0.29).due(100)) == [29], (
        "0.29 * 100 is below 29 in floating point"
    )


@pytest.mark.parametrize("rescale", [False, True])
def test_regrouping_changes_weights_only_with_rescale(tiny_model, tmp_path, rescale):
    """Without rescale no weight changes; with it B changes, but not the delta at the mean gates."""
    model = adapted(tiny_model("llama"))
    regroup = RegroupCallback(every=6, rescale=rescale)
    seen, gates = [], {}

    def look(state, keywords):
        if state.global_step != 6:
            return
        if not gates:  # read before the regrouping resets the windows
            sums = {
                key.partition(":")[2]: s
                for key, s in regroup.regrouper.windows.sums.items()
                if "gate_sums" in key
            }
            gates.update({name: of_layer[:-1] / of_layer[-1] for name, of_layer in sums.items()})
        deltas = [
            layer.get_delta_weight(a, gates[name]) for name, (layer, a) in trainable_adapters(model)
        ]
        seen.append((adapter_state(model), deltas))

    # Large router weights give the experts different mean gates, so moved components are rescaled.
    for _, (layer, adapter) in trainable_adapters(model):
        torch.nn.init.normal_(layer.badit_router[adapter], std=0.5)
    make_trainer(
        model, tmp_path, [on("on_step_end", look), regroup, on("on_step_end", look)]
    ).train()
    (before, deltas), (after, new_deltas) = seen
    assert any(line["components_moved"] for line in read_jsonl(tmp_path / LOG) if line["step"] == 6)
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"badit_expert_of", "badit_B"} if rescale else {"badit_expert_of"})
    drift = max(
        float((b - a).abs().max() / a.abs().max()) for a, b in zip(deltas, new_deltas, strict=True)
    )
    assert drift < 1e-5 if rescale else drift > 1e-3


def test_checkpoint_saves_labels_and_is_refused_without_a_valid_state(tiny_model, tmp_path):
    checkpoint, moved = tmp_path / "checkpoint-10", tmp_path / "moved"
    make_trainer(adapted(tiny_model("llama")), tmp_path, [RegroupCallback(every=3)]).train()
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert [tensor.dtype for name, tensor in saved.items() if "expert" in name] == [torch.int64] * 2

    def resume(**options):
        trainer = make_trainer(
            adapted(tiny_model("llama")), tmp_path, [RegroupCallback(every=3, **options)]
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))

    moved.mkdir()
    (checkpoint / STATE_FILE).rename(moved / STATE_FILE)
    refuses("No such file.*; resume from another checkpoint, or pass RegroupCallback", resume)
    resume(checkpoint=moved)
    (checkpoint / STATE_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    refuses("resume from another checkpoint", resume)


def test_regrouping_schedule_and_refused_options(tiny_model):
    model, switched_off = adapted(tiny_model("llama")), adapted(tiny_model("llama"), top_k=2)
    for every, steps in (
        (0.1, [10, 20, 30, 40, 50]),
        (0.25, [25, 50]),
        (30, [30]),
        (1e-9, [*range(1, 51)]),
    ):
        assert [*Regrouper(model, 100, every=every, stop=0.5).due] == steps
    fraction = "must be a whole number of steps, or a fraction of the run below 1"
    for every in (0, -1, 1.5, float("nan"), True, "20"):
        refuses(
            rf"^regroup\.every: {fraction if every == 1.5 else 'input should be'}",
            RegroupCallback,
            every=every,
        )
    for options in ({"stop": 1.5}, {"solver": "greedy"}, {"restarts": -1}):
        refuses(rf"^regroup\.{next(iter(options))}: input should be", RegroupCallback, **options)
    for total in (0, 1.5, True):
        refuses("total_steps", Regrouper, model, total)
    refuses("no trainable BADIT adapter", Regrouper, tiny_model("llama"), 10)
    message = "components into experts that top_k switches off"
    refuses(message, method_of, {"name": "badit", "top_k": 2, "regroup": {}})
    assert resolve_method({"name": "badit", "top_k": 2}).config.top_k == 2
    refuses(r"gate_proj\.default: regrouping would move components", Regrouper, switched_off, 10)


def test_released_preset_sets_the_config_and_the_regrouping():
    method = resolve_method({"name": "badit", "preset": "released"})
    for config in (method.config, BaditConfig.released()):
        options = {name: getattr(config, name) for name in BaditConfig.RELEASED}
        assert options == BaditConfig.RELEASED
        assert (config.gates, config.init_weights, config.svd_method) == ("softmax", "bad", "exact")
        assert config.lora_dropout == 0
    assert method.regroup.solver == "paper"
    changed = resolve_method(
        {"name": "badit", "preset": "released", "num_experts": 4, "regroup": {"restarts": 3}}
    )
    assert (changed.config.num_experts, changed.config.gates) == (4, "softmax")
    assert (changed.regroup.restarts, changed.regroup.stop) == (3, 0.5)
    unchanged = resolve_method({"name": "badit", "preset": "released", "regroup": None})
    assert unchanged.regroup is None


def batches():
    rows = examples(BATCHES * 4)
    return [AnswerCollator(0)(rows[start : start + 4]) for start in range(0, len(rows), 4)]


class InOrder(Trainer):
    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(batches(), batch_size=None))


def train_by_trainer(model, folder, accumulated):
    arguments = {
        "max_steps": BATCHES // accumulated,
        "gradient_accumulation_steps": accumulated,
        "max_grad_norm": 0,
    }
    args = TrainingArguments(output_dir=str(folder), save_strategy="no", **QUIET, **arguments)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    data = {"train_dataset": batches(), "callbacks": [RegroupCallback(every=2, stop=1.0)]}
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = InOrder(model, args, optimizers=(optimizer, constant), **data)
    trainer.model_accepts_loss_kwargs = (
        False  # use the mean over each batch, as the loop below does
    )
    trainer.train()


class Loop:
    """A plain loop over the batches, as in docs/integrations.md."""

    def __init__(self, model, log, accumulated=1):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
        parts = model.train(), optimizer, DataLoader(batches(), batch_size=None)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(*parts)
        self.regrouper = Regrouper(
            self.model, BATCHES // accumulated, every=2, stop=1.0, log_path=log
        )
        self.accelerator.register_for_checkpointing(self.regrouper)

    def run(self, first=0, last=BATCHES):
        for batch in list(self.loader)[first:last]:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.regrouper.after_backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.regrouper.step()
        if last == BATCHES:
            self.regrouper.finish()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_plain_loop_is_bit_identical_to_the_trainer(tiny_model, tmp_path, accumulated):
    trained, model = (adapted(tiny_model("llama"), lora_dropout=0.0) for _ in range(2))
    train_by_trainer(trained, tmp_path, accumulated)
    loop = Loop(model, tmp_path / "own.jsonl", accumulated)
    loop.run()
    expected = list(read_jsonl(tmp_path / LOG))
    assert list(read_jsonl(tmp_path / "own.jsonl")) == expected
    assert {line["step"] for line in expected} == set(range(2, BATCHES // accumulated + 1, 2))
    assert any(line["components_moved"] for line in expected)
    assert_same(adapter_state(model), adapter_state(trained))
    for field in ("objective_before", "components_moved", "intra_degrees"):
        last = [line[field] for line in expected if field in line][-2:]
        assert loop.regrouper.metrics[field] == pytest.approx(np.mean(last))


def test_plain_loop_resumes_from_an_accelerate_checkpoint_or_a_state_file(tiny_model, tmp_path):
    """The checkpoint is taken within a window."""
    whole = Loop(adapted(tiny_model("llama"), lora_dropout=0.0), tmp_path / "whole.jsonl")
    whole.run(last=7)
    whole.accelerator.save_state(str(tmp_path / "checkpoint"))
    whole.regrouper.windows.save(tmp_path / STATE_FILE)
    state = whole.regrouper.state_dict()
    (tmp_path / "resumed.jsonl").write_text((tmp_path / "whole.jsonl").read_text())
    whole.run(first=7)
    resumed = Loop(adapted(tiny_model("llama"), lora_dropout=0.0), tmp_path / "resumed.jsonl")
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert resumed.regrouper.steps == 7
    resumed.run(first=7)
    assert (tmp_path / "resumed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert_same(adapter_state(whole.model), adapter_state(resumed.model))

    resumed.regrouper.windows.load(tmp_path / STATE_FILE)
    loaded = resumed.regrouper.state_dict()
    assert loaded["windows"] == state["windows"]
    assert_same(loaded["tensors"], state["tensors"])
    refuses("another model", resumed.regrouper.load_state_dict, {**state, "windows": {}})


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["swap", "paper"])
def test_hundreds_of_regroupings_do_not_use_more_memory(tiny_model, tmp_path, solver):
    model = adapted(tiny_model("llama")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    log = tmp_path / LOG
    regrouper = Regrouper(model, 400, every=1, stop=1.0, solver=solver, log_path=log)
    ids = torch.randint(5, 20, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :3] = -100

    def regroup(times):
        """Returns the number of objects and of traced bytes after further regroupings."""
        for _ in range(times):
            model(**batch).loss.backward()
            regrouper.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            regrouper.step()
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        objects, size = regroup(100)
        more_objects, more_size = regroup(300)
    finally:
        tracemalloc.stop()
    assert more_objects - objects < 300, "less than one object for each regrouping"
    assert more_size - size < 300 * 256, "less than a Gram matrix of 8 × 8"
    assert len(list(read_jsonl(log))) == 399 * 2, "the last one waits for its angles"
