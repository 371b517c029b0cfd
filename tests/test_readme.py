"""The README against the project: its links, its tree and its snippets. tests/docs has what holds for all pages."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from badit.data import AnswerCollator
from docs.pages import ROOT, Page
from training.trainers import examples

README = Page("README.md")


def test_every_link_and_every_path_of_the_tree_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README.text) if not link.startswith("https://")]
    assert links
    assert all((ROOT / link).exists() for link in links)
    folder = ROOT
    for line in README.blocks("text")[0].splitlines():
        for name in line[:18].replace(",", " ").split():
            folder = ROOT / "src" / "badit" if line.startswith("  ") else ROOT
            assert (folder / name).exists(), name


def test_the_snippets_run(tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments(
        output_dir="out", max_steps=3, use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    names = {"model": tiny_model("llama"), "args": args, "dataset": examples(), "collator": AnswerCollator(0)}
    tune, load = README.blocks("python")
    exec(tune, names)
    tiny_model("llama").save_pretrained("base")
    # In a process of its own, where nothing but the snippet has told PEFT of the method.
    base = "from transformers import AutoModelForCausalLM\nbase = AutoModelForCausalLM.from_pretrained('base')\n"
    done = subprocess.run([sys.executable, "-c", base + load], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
