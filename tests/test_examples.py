"""The examples and the README's code run on a tiny model and write usable adapters."""

import re
import runpy
import subprocess
import sys

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from badit.support.files import read_json
from data.examples import CHAT, write_rows
from docs.pages import ROOT, Page

README = Page("README.md")

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture
def run(material, tmp_path, monkeypatch):
    def run(name, *arguments):
        options = ["--small", "--model", material / "model", "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, [*arguments, *options])])
        return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    return run


def test_sft_trl(run, material, tmp_path):
    run("sft_trl.py", write_rows(tmp_path / "chats.jsonl", *[{"messages": CHAT[1:]}] * 4))
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(material / "model"), tmp_path / "out" / "adapter"
    )


def test_accelerate_loop(run, material, tmp_path):
    regrouper = run("accelerate_loop.py", "--data", material / "tasks.jsonl")["regrouper"]
    assert regrouper.steps == 4
    assert regrouper.metrics["objective_after"] >= regrouper.metrics["objective_before"]
    assert load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")


def test_own_tasks(run, material, tmp_path, capsys):
    run("own_tasks.py", material / "tasks.jsonl")
    printed = capsys.readouterr().out
    assert "cities: 12 training and 4 test instances" in printed
    assert "rivers: Rouge-L" in printed
    assert (
        read_json(tmp_path / "out-lora" / "rivers" / "adapter_config.json")["peft_type"] == "LORA"
    )


def test_readme_links_and_paths_in_the_architecture_tree_exist():
    links = [
        link
        for link in re.findall(r"\]\(([^)]+)\)", README.text)
        if not link.startswith("https://")
    ]
    assert links
    assert all((ROOT / link.partition("#")[0]).exists() for link in links)
    tree = re.findall(
        r"^  ([\w./]+)", Page("docs/architecture.md").blocks("text")[0], flags=re.MULTILINE
    )
    assert tree
    assert [name for name in tree if not (ROOT / "src" / "badit" / name).exists()] == []


@pytest.mark.usefixtures("tiny_built_in")
def test_readme_snippet_runs_and_its_adapter_loads(material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Where is {name}?", "completion": name} for name in ("Rome", "Oslo")] * 4
    write_rows(tmp_path / "rows.jsonl", *rows)
    (tune,) = README.blocks("python")
    load = Page("docs/integrations.md").blocks("python")[0].replace("runs/mine/adapter", "adapter")
    exec(tune, {})
    # In a new process, in which only the snippet registers the method with PEFT.
    base = "from transformers import AutoModelForCausalLM\n"
    base += f"base = AutoModelForCausalLM.from_pretrained({str(material / 'model')!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", base + load], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
