"""A model and tasks that every comparison of this folder shares."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from badit.comparison import compare as compare_module
from comparison.cells import InlineCell, Values, comparison_values
from data.examples import CHATML, make_tokenizer


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> None:
    """Every training ends with a garbage collection, which would go through all imported modules each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``model`` and ``tasks.jsonl``: two tasks of 12 training and 4 test instances."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer(chat_template=CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
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
    return folder


@pytest.fixture
def values(material: Path, tmp_path: Path) -> Values:
    return comparison_values(material, tmp_path / "comparison")


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs cells in this process; lists the folders of those that were started."""
    started: list[str] = []
    monkeypatch.setattr(InlineCell, "started", started, raising=False)
    monkeypatch.setattr(compare_module, "CellProcess", InlineCell)
    return started
