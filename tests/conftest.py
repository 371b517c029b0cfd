"""Fixtures of every room: tiny random models of six families, the small real model, and a run that takes seconds."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from badit.recipe import build_recipe
from badit.run import Run
from badit.train import fit
from data.examples import CHATML, make_tokenizer
from fuzz.command import COUNTED

VOCABULARY = 100
_WINDOW = 4  # shorter than the tests' prompts, so that windowed layers really forget
_MIXED_LAYERS = ["sliding_attention", "full_attention"]

# Weights larger than a fresh model's, so that a wrong gate or mask moves the logits by far more than rounding does.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_DECODER: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def _config(family: str) -> PreTrainedConfig:
    if family == "llama":
        return LlamaConfig(**_DECODER)
    if family == "qwen3":
        return Qwen3Config(**_DECODER, use_sliding_window=True, sliding_window=_WINDOW, layer_types=_MIXED_LAYERS)
    if family == "gemma2":
        return Gemma2Config(**_DECODER, query_pre_attn_scalar=8, sliding_window=_WINDOW, layer_types=_MIXED_LAYERS)
    if family == "gemma3":
        return Gemma3TextConfig(**_DECODER, query_pre_attn_scalar=8, sliding_window=_WINDOW, layer_types=_MIXED_LAYERS)
    if family == "mistral":
        return MistralConfig(**_DECODER, sliding_window=_WINDOW)
    if family == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(**_COMMON, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=128, **no_dropout)
    raise ValueError(f"no tiny model of family {family!r}")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """A factory: ``tiny_model("llama")`` is a random causal language model, the same at every call, in eval mode."""

    def make(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
        config = _config(family)
        for name, value in overrides.items():
            setattr(config, name, value)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Cast afterwards: weights drawn in another type would be other weights.
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def _smollm2_once() -> tuple[Any, Any]:
    from badit.models import load_base_model

    return load_base_model("smollm2-135m", dtype="float32")


@pytest.fixture
def smollm2(_smollm2_once: tuple[Any, Any]) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer; a copy, so a test may adapt and train it."""
    model, tokenizer = _smollm2_once
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    return copy.deepcopy(model), tokenizer


@pytest.fixture
def model_folder(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    folder = tmp_path / "model"
    tokenizer = make_tokenizer(chat_template=CHATML)
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``model`` and ``tasks.jsonl``: two tasks of 12 training and 4 test instances."""
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A factory: ``trained({"name": "lora"})`` is a run of three large steps, so that what it has learnt shows.

    What is trained alike is trained once; each call gives a copy, which a test may change.
    """
    folder = tmp_path_factory.mktemp("trained")
    make_material(folder, initializer_range=0.2)  # a wrong factor then moves the logits by far more than rounding does
    runs: dict[str, Path] = {}

    def make(method: dict[str, Any], source: Path = folder / "tasks.jsonl", name: str = "run") -> Run:
        key = json.dumps([method, str(source)])
        if key not in runs:
            values = {
                "model": {"name": str(folder / "model"), "dtype": "float32"},
                "data": {"source": str(source)},
                "method": method,
                "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05},
                "evaluation": {"max_new_tokens": 8},
                "output": str(folder / str(len(runs))),
            }
            runs[key] = fit(build_recipe(values), progress=False).path
        return Run(shutil.copytree(runs[key], tmp_path_factory.mktemp("runs") / name))

    return make


def make_material(folder: Path, **config: Any) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        **config,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(llama).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        {
            "task": task,
            "instruction": f"Name the {verb}.",
            "input": f"land {i} " * (1 + i % 4),
            "output": f"{verb} {i}",
            "split": "test" if i >= 12 else "train",
        }
        for task, verb in (("cities", "capital"), ("rivers", "river"))
        for i in range(16)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    lines = []
    for task, verb in (("cities", "capital"), ("rivers", "river")):
        for i in range(16):
            split = "test" if i >= 12 else "train"
            line = {"task": task, "instruction": f"Name the {verb}.", "input": f"land {i} " * (1 + i % 4)}
            lines.append({**line, "output": f"{verb} {i}", "split": split})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def recipe_values(tmp_path: Path, model_folder: Path, task_file: Path) -> dict[str, Any]:
    """24 training instances in batches of 4: six steps an epoch, twelve in all."""
    return {
        "model": {"name": str(model_folder), "dtype": "float32"},
        "data": {"source": str(task_file)},
        "method": {"name": "badit", "num_experts": 4, "r": 2, "lora_dropout": 0.1, "regroup": {"every": 3}},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 5,
        },
        "evaluation": {"batch_size": 4, "max_new_tokens": 4},
        "output": str(tmp_path / "run"),
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line on how many cases of broken input were tried; a hook in that room would not be asked by ``make test``."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [dict(report.user_properties) for report in reports if getattr(report, "when", "") == "teardown"]
    if total := sum(each.get(COUNTED, 0) for each in properties):
        terminalreporter.write_line(f"{total:,} {COUNTED}")
