"""Runs the code of the documentation: each page's blocks in order, with a tiny model."""

import re
import shutil

import pytest
from transformers import AutoModelForCausalLM

from badit import Run, analyze
from badit.cli import main
from docs.pages import ROOT, Page, pages
from steps import export

QUICKSTART = Page(
    "docs/quickstart.md"
)  # tested separately, because its commands depend on the previous ones
# tests/test_examples.py runs the README's code.
WITH_CODE = [
    page
    for page in pages()
    if page.blocks("python") and page not in (QUICKSTART, Page("README.md"))
]


@pytest.fixture(autouse=True)
def _folder(tiny_built_in, inline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """A folder with the files that pages expect: a run with its analysis, and its export."""
    folder = tmp_path_factory.mktemp("finished")
    run = trained({"name": "badit", "num_experts": 4, "r": 2, "regroup": {"every": 2}})
    shutil.copytree(run.path, folder / "runs" / "mine")
    export(Run(folder / "runs" / "mine"), folder / "exports" / "mine", task="cities")
    analyze(folder / "runs" / "mine", instances=2)
    return folder


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=str)
def test_python_code_of_a_page_runs(page, finished, material, tmp_path):
    for name in ("runs", "exports"):
        (tmp_path / name).symlink_to(finished / name)
    (tmp_path / "my-tasks.jsonl").symlink_to(material / "tasks.jsonl")
    names = {"base": AutoModelForCausalLM.from_pretrained(material / "model")}
    for block in page.blocks("python"):
        exec(compile(block, page.path, "exec"), names)


def test_dry_runs_with_own_data_succeed(material, tmp_path):
    (tmp_path / "my-tasks.jsonl").symlink_to(material / "tasks.jsonl")
    commands = [
        command for page in pages() for command in page.commands() if "--dry-run" in command
    ]
    complete = [command for command in commands if "data.source=my-tasks.jsonl" in command]
    assert complete
    assert all(main(command) == 0 for command in complete)


def test_quickstart_runs_and_writes_its_report(tmp_path):
    commands, names = iter(QUICKSTART.commands()), {}
    for language, block in re.findall(
        r"^```(python|sh)\n(.*?)^```", QUICKSTART.text, flags=re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            exec(compile(block, QUICKSTART.path, "exec"), names)
            continue
        for _ in range(len(re.findall(r"^badit ", block, flags=re.MULTILINE))):
            arguments = next(commands)
            if arguments != ["--version"]:
                assert main(arguments) == 0
    assert not [*commands], "every command has run"
    assert (tmp_path / "runs/recipe/report.html").is_file()
