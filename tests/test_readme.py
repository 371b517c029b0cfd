"""The README against the project: its commands, its snippet, its tree and its figures."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from badit.cli.main import VERBS
from badit.cli.table import render
from badit.data import AnswerCollator
from training.trainers import examples

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z-]+)", README)
    assert {"demo", "test", "check"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_every_command_names_a_verb_and_existing_files() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("badit ")]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) >= 4
    for _, verb, *arguments in commands:
        assert verb in VERBS
        assert all((ROOT / argument).is_file() for argument in arguments if argument.startswith("recipes/"))


def test_every_link_and_every_path_of_the_tree_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    assert all((ROOT / link).exists() for link in links)
    folder = ROOT
    for line in blocks("text")[0].splitlines():
        for name in line[:22].replace(",", " ").split():
            folder = ROOT / "src" / "badit" if line.startswith("  ") else ROOT
            assert (folder / name).exists(), name


def test_the_snippets_run(tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments(
        output_dir="out", max_steps=3, use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    names = {"model": tiny_model("llama"), "args": args, "dataset": examples(), "collator": AnswerCollator(0)}
    tune, load = blocks("python")
    exec(tune, names)
    tiny_model("llama").save_pretrained("base")
    # In a process of its own, where nothing but the snippet has told PEFT of the method.
    base = "from transformers import AutoModelForCausalLM\nbase = AutoModelForCausalLM.from_pretrained('base')\n"
    done = subprocess.run([sys.executable, "-c", base + load], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_figures_are_those_of_the_committed_results() -> None:
    """A figure that is quoted from a results file carries a comment that names the file and the key."""
    claims = re.findall(r"(\d+\.\d)<!-- ([\w/.-]+):([\w.]+) -->", README)
    assert len(claims) >= 4
    for figure, file, key in claims:
        value: Any = json.loads((RESULTS / file).read_text())
        for part in key.split("."):
            value = value[int(part) if isinstance(value, list) else part]
        assert f"{value:.1f}" == figure, f"{file}: {key}"


def test_the_tables_are_those_of_the_committed_results() -> None:
    """A comparison's table stands between comments, the first of which names its results."""
    tables = re.findall(r"<!-- table: ([\w/.-]+) -->\n(.*?)\n<!-- end of table -->", README, flags=re.DOTALL)
    assert tables
    for file, found in tables:
        assert found == render(RESULTS / file, form="markdown").strip()
