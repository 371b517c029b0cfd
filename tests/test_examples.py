"""The examples, each in its small form, on a tiny model: they run, and leave what they say they do."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = 60

# TRL switches gradient checkpointing on by default, under a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing.*` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:'pin_memory' argument is set as true:UserWarning",
)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_short_and_tested_here() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert [script.name for script in scripts] == ["accelerate_loop.py", "own_tasks.py", "sft_trl.py"]
    assert all(len(script.read_text().splitlines()) < LINES for script in scripts)


def test_sft_trl(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [
        {"role": "user", "content": "Which city?"},
        {"role": "assistant", "content": "Rome."},
        {"role": "user", "content": "And the river?"},
        {"role": "assistant", "content": "Tiber."},
    ]
    (tmp_path / "chats.jsonl").write_text(4 * (json.dumps({"messages": chat}) + "\n"))
    run(
        monkeypatch, "sft_trl.py", tmp_path / "chats.jsonl",
        "--small", "--model", material / "model", "--output", tmp_path / "out",
    )  # fmt: skip
    lines = (tmp_path / "out" / "regroupings.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {2}
    base = AutoModelForCausalLM.from_pretrained(material / "model")
    PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")


def test_accelerate_loop(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(
        monkeypatch, "accelerate_loop.py",
        "--data", material / "tasks.jsonl",
        "--small", "--model", material / "model", "--output", tmp_path / "out",
    )  # fmt: skip
    assert names["regrouper"].steps == 4
    assert names["regrouper"].metrics["objective_after"] >= names["regrouper"].metrics["objective_before"]
    assert load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")


def test_own_tasks(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        monkeypatch, "own_tasks.py", material / "tasks.jsonl",
        "--small", "--model", material / "model", "--output", tmp_path / "out",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "cities: 12 training and 4 test instances" in printed
    assert "rivers: Rouge-L" in printed
    config = json.loads((tmp_path / "out-lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
