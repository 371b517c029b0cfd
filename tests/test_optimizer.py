"""The optimizers on adapters of every kind, in a loop, in trainers and in several processes; and what they refuse."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import badit
import reference
from badit.baselines.goat import GoatConfig
from badit.baselines.mixture import HydraLoraConfig, LoraMoeConfig
from badit.baselines.o_lora import OLoraConfig
from badit.errors import BaditError
from badit.optimizer import OPTIMIZERS, OrthogonalUpdates, build_optimizer, factor_pairs, lora_plus_groups
from training.launches import FSDP2, ON_CPU, SHARDED_ON_CPU
from training.trainers import adapted, examples, make_trainer

SCRIPT = Path(__file__).with_name("optimizer_ranks.py")
METHODS: dict[str, Callable[[], Any]] = {
    "badit": lambda: badit.BaditConfig(num_experts=4, r=2, lora_dropout=0.0),
    "badit, bad": lambda: badit.BaditConfig(num_experts=4, r=2, lora_dropout=0.0, init_weights="bad"),
    "lora": lambda: LoraConfig(r=8, lora_alpha=64, target_modules=["gate_proj", "q_proj"]),
    "loramoe": lambda: LoraMoeConfig(num_experts=4, r=2, lora_dropout=0.0),
    "hydralora": lambda: HydraLoraConfig(lora_dropout=0.0),
    "goat": lambda: GoatConfig(num_experts=4, r=8, lora_alpha=64, lora_dropout=0.0),
    "o-lora": lambda: OLoraConfig(r=4, lora_dropout=0.0),
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(12) < 6, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Factors(nn.Module):
    """Trained factors alone, A (N, I) and B (O, K·N), with gradients."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.badit_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(rows, 9, dtype=dtype))})
        self.badit_B = nn.ParameterDict({"default": nn.Parameter(torch.zeros(7, columns, dtype=dtype))})

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.badit_A["default"], self.badit_B["default"]

    def draw_gradients(self) -> None:
        for parameter in self.pair:
            parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(tiny_model: Callable[..., Any], method: str) -> None:
    model = get_peft_model(tiny_model("llama"), METHODS[method]()).train()
    optimizer = OrthogonalUpdates(model, 0.005)
    losses = train(model, optimizer, 10)
    assert losses[-1] < losses[0] - 0.02
    pairs = factor_pairs(model)
    assert len(pairs) == (4 if method == "lora" else 2)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert {id(p) for pair in pairs for p in pair} == {id(p) for p in optimizer.param_groups[0]["params"]}


@pytest.mark.parametrize("shared_by", [1, 3])
def test_steps_equal_the_formulas(shared_by: int) -> None:
    """Of experts that share A, the B's are one below another: (K·O, N)."""
    model = nn.ModuleList([Factors(4, 4 * shared_by) for _ in range(3)])
    optimizer = OrthogonalUpdates(model, 0.01, weight_decay=0.1)
    layers: list[Any] = list(model)

    def below(b: torch.Tensor) -> np.ndarray:
        return np.concatenate(np.split(reference.float64(b), shared_by, axis=1))

    own = [(reference.OrthogonalFactor(), reference.OrthogonalFactor()) for _ in layers]
    values = [(reference.float64(layer.pair[0]).copy(), below(layer.pair[1])) for layer in layers]
    for step in range(4):
        for index, layer in enumerate(layers):
            layer.draw_gradients()
            if (step, index) == (0, 1):  # a layer that has no part in a batch
                layer.zero_grad()
                continue
            a, b = layer.pair
            moved = reference.orthogonal_step(*values[index], a.grad, below(b.grad), *own[index], 0.01, (0.9, 0.98))
            values[index] = tuple(
                after - 0.01 * 0.1 * before for after, before in zip(moved, values[index], strict=True)
            )
        optimizer.step()
        for layer, (a, b) in zip(layers, values, strict=True):
            np.testing.assert_allclose(reference.float64(layer.pair[0]), a, rtol=0, atol=1e-8)
            np.testing.assert_allclose(below(layer.pair[1]), b, rtol=0, atol=1e-8)


def test_runs_of_few_layers_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for numbers in (2**23, 1):
        monkeypatch.setattr("badit.optimizer._NUMBERS_AT_A_TIME", numbers)
        torch.manual_seed(0)
        model = nn.ModuleList([Factors(4, 4) for _ in range(3)])
        optimizer = OrthogonalUpdates(model, 0.01)
        for _ in range(3):
            [layer.draw_gradients() for layer in model]  # pyright: ignore
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_to_the_bit(tiny_model: Callable[..., Any], dtype: torch.dtype) -> None:
    def fresh() -> tuple[Any, OrthogonalUpdates, Any]:
        torch.manual_seed(0)
        config = METHODS["hydralora"]()
        model = get_peft_model(tiny_model("llama", dtype=dtype), config, autocast_adapter_dtype=False).train()
        optimizer = OrthogonalUpdates(model, 0.01, other_lr=0.02)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def go_on(model: Any, optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            train(model, optimizer, 1)
            scheduler.step()

    model, optimizer, scheduler = fresh()
    go_on(model, optimizer, scheduler, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    go_on(model, optimizer, scheduler, 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 / 7, 0.02 / 7])

    again = fresh()
    file.seek(0)
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go_on(*again, steps=3)
    whole, resumed = model.state_dict(), again[0].state_dict()
    assert any(value.dtype == dtype for name, value in whole.items() if "badit_A" in name)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_a_trainer_takes_it_and_resumes_to_the_bit(
    tiny_model: Callable[..., Any], tmp_path: Path, max_grad_norm: float
) -> None:
    def trainer(folder: str) -> Any:
        model = adapted(tiny_model("llama"))
        made = make_trainer(
            model,
            tmp_path / folder,
            [],
            max_steps=6,
            save_steps=3,
            gradient_accumulation_steps=2,
            max_grad_norm=max_grad_norm,
        )
        made.optimizer = OrthogonalUpdates(model, 0.01)
        return made

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


# TRL switches gradient checkpointing on by default, under a name that transformers is about to change.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
def test_hf_trainer_and_trl_take_it_as_an_argument(
    tiny_model: Callable[..., Any], model_folder: Path, tmp_path: Path
) -> None:
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    quiet |= {"max_steps": 3, "dataloader_pin_memory": False, "per_device_train_batch_size": 4}
    model = get_peft_model(tiny_model("llama"), METHODS["lora"]())
    rows = [{"input_ids": row["input_ids"][:4], "labels": row["input_ids"][:4]} for row in examples()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "hf"), **quiet),
        train_dataset=rows,  # pyright: ignore
        optimizers=(OrthogonalUpdates(model, 0.01), None),
    )
    trainer.train()
    assert all(b.abs().max() > 0 for _, b in factor_pairs(model))

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), METHODS["badit"]())
    chats = [{"prompt": f"Name city {i}.", "completion": f" city {i}"} for i in range(12)]
    sft = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        args=SFTConfig(output_dir=str(tmp_path / "trl"), bf16=False, **quiet),
        train_dataset=Dataset.from_list(chats),
        optimizers=(OrthogonalUpdates(model, 0.01), None),  # pyright: ignore
    )
    sft.train()
    assert all(b.abs().max() > 0 for _, b in factor_pairs(model))


def test_accelerate_prepares_it(tiny_model: Callable[..., Any]) -> None:
    model = get_peft_model(tiny_model("llama"), METHODS["badit"]()).train()
    prepared, optimizer = Accelerator(cpu=True).prepare(model, OrthogonalUpdates(model, 0.005))
    losses = train(prepared, optimizer, 5)
    assert losses[-1] < losses[0]


def run_ranks(folder: Path, launcher: list[str], batch_size: int, variables: dict[str, str]) -> list[dict[str, Any]]:
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **variables,
    }
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(batch_size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [load_file(path) for path in sorted(folder.glob("rank-*.safetensors"))]


def test_shards_end_as_one_process_does_and_resume_to_the_bit(tmp_path: Path) -> None:
    (alone,) = run_ranks(tmp_path / "one", [], 4, ON_CPU)
    fsdp = ["-m", "accelerate.commands.launch", *FSDP2, "--num_processes", "2", "--main_process_port", "0"]
    full = [*fsdp, "--fsdp_state_dict_type", "FULL_STATE_DICT"]
    for name, launcher in {"fsdp2": fsdp, "fsdp2, full state": full}.items():
        first, second = run_ranks(tmp_path / name, launcher, 2, SHARDED_ON_CPU)
        assert first.keys() == second.keys() == alone.keys()
        for key, value in alone.items():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-4, msg=lambda text: f"{name}, {key}: {text}")  # noqa: B023
            if not key.startswith("resumed."):
                assert torch.equal(first[f"resumed.{key}"], first[key]), f"{name}, {key}"


def test_a_step_reads_no_value_of_a_tensor() -> None:
    """Parameters without values refuse whatever would make a GPU's host wait."""
    with torch.device("meta"):
        model = nn.ModuleList([Factors(4, 8, torch.float32) for _ in range(2)])
    optimizer = OrthogonalUpdates(model, 0.01, weight_decay=0.1)
    for _ in range(2):
        [layer.draw_gradients() for layer in model]  # pyright: ignore
        optimizer.step()


def test_embeddings_and_factors_without_a_partner_go_to_adamw(tiny_model: Callable[..., Any]) -> None:
    config = LoraConfig(r=4, target_modules=["gate_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=False)
    model = get_peft_model(tiny_model("llama", tie_word_embeddings=False), config).train()
    first_A = factor_pairs(model)[0][0]
    first_A.requires_grad_(False)
    factors, others = OrthogonalUpdates(model, 0.01).param_groups
    assert len(factors["params"]) == 2
    names = {name for name, p in model.named_parameters() if any(p is other for other in others["params"])}
    assert {name.split(".")[-2] if name.endswith("default") else "" for name in names} >= {"lora_embedding_A"}
    assert any("lm_head" in name for name in names)
    assert sum("layers.0.mlp.gate_proj.lora_B" in name for name in names) == 1


@pytest.mark.parametrize("method", ["badit", "lora", "loramoe", "hydralora"])
def test_lora_plus_lets_B_learn_faster(tiny_model: Callable[..., Any], method: str) -> None:
    model = get_peft_model(tiny_model("llama"), METHODS[method]()).train()
    groups = lora_plus_groups(model, 0.001, 8, other_lr=0.003)
    assert [group["lr"] for group in groups] == ([0.001, 0.008] if method == "lora" else [0.001, 0.008, 0.003])
    pairs = factor_pairs(model)
    for side in (0, 1):
        assert {id(p) for p in groups[side]["params"]} == {id(pair[side]) for pair in pairs}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    losses = train(model, torch.optim.AdamW(groups), 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_call_builds_each(tiny_model: Callable[..., Any], name: str) -> None:
    model = get_peft_model(tiny_model("llama"), METHODS["badit"]()).train()
    optimizer = build_optimizer(name, model, 0.005, other_lr=0.002, ratio=4.0, weight_decay=0.01)
    rates = {"adamw": [0.005, 0.005, 0.002], "lora+": [0.005, 0.02, 0.002], "orthogonal": [0.005, 0.002]}
    assert [group["lr"] for group in optimizer.param_groups] == rates[name]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]


def test_what_does_not_go_is_refused_in_one_line(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, whole = tiny_model("llama").requires_grad_(False), tiny_model("llama")
    model = get_peft_model(tiny_model("llama"), METHODS["badit"]())
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("no pair of trainable factors", lambda: OrthogonalUpdates(whole)),
        ("no trainable parameters", lambda: lora_plus_groups(frozen, 0.1)),
        ("did you mean 'orthogonal'", lambda: build_optimizer("ortogonal", model, 0.1)),
        ("lr must be a positive number", lambda: OrthogonalUpdates(model, 0.0)),
        ("other_lr must be a positive number", lambda: OrthogonalUpdates(model, 0.1, other_lr=-1)),
        ("betas must be at least 0 and below 1", lambda: OrthogonalUpdates(model, betas=(0.9, 1.0))),
        ("weight_decay must be at least 0", lambda: OrthogonalUpdates(model, weight_decay=-0.1)),
        ("ratio must be a positive number", lambda: lora_plus_groups(model, 0.1, 0)),
    ]
    for words, call in refused:
        with pytest.raises(BaditError, match=words):
            call()
    # DeepSpeed hands its optimizer flat parts of the parameters.
    optimizer = OrthogonalUpdates(model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(10))]
    with pytest.raises(BaditError, match="use FSDP2 or DDP"):
        optimizer.step()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(BaditError, match="use FSDP2 or DDP"):
        OrthogonalUpdates(model)
