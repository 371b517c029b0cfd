"""Refusals that need no model come before torch is imported."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.runs.resolved import resolve
from materials import make_recipe

# Runs the commands of a JSON list in one process: each would take a second to start.
SCRIPT = """
import json, sys
from badit.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    print(json.dumps([code, sorted({"torch", "transformers", "peft"} & {*sys.modules})]))
"""


@pytest.fixture
def place(tmp_path, material, monkeypatch):
    """The current folder, with a run, an adapter, data and a recipe; nothing is trained."""
    monkeypatch.chdir(tmp_path)
    values = make_recipe(material / "model", material / "tasks.jsonl", "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    compared = {**values, "compare": {"methods": {"lora": {"name": "lora"}}}}
    (tmp_path / "compared.yaml").write_text(yaml.safe_dump(compared))
    recipe = resolve(build_recipe(values)).recipe
    for name, source in (("run", material / "tasks.jsonl"), ("bare", None)):
        data = recipe.data.model_copy(update={"source": source and str(source)})
        (tmp_path / name).mkdir()
        content = dump_recipe(recipe.model_copy(update={"data": data}))
        (tmp_path / name / "config.yaml").write_text(content)
    (tmp_path / "adapter").mkdir()
    saved = {"peft_type": "LORA", "base_model_name_or_path": "./nowhere"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(saved))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("")
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    return tmp_path


def refused(*commands):
    """Returns the error of each command; asserts that none imports a slow library."""
    environment = {**os.environ, "COLUMNS": "500"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert outcomes == [[2, []]] * len(commands), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands), done.stderr
    return lines


def test_refusals_of_folders_and_data_import_no_torch(place, material):
    in_new = ["adopt", "adapter", "-o", "new", "--data", "rows.csv"]
    errors = refused(
        ["train", "recipe.yaml", "method.name=lora"],
        ["train", "recipe.yaml", "training.learning_rate=1", "--dry-run"],
        ["train", "recipe.yaml", "method.num_experts=3"],
        ["train", "recipe.yaml", "data.tasks=[nothing]", "output=new"],
        ["compare", "compared.yaml", "--dry-run"],
        ["compare", "compared.yaml", "output=new", "data.tasks=[nothing]"],
        ["compare", "recipe.yaml", "output=new"],
        ["evaluate", "bare"],
        ["evaluate", "run", "--split", "validation"],
        ["export", "run", "-o", "new"],
        ["adopt", "adapter", "-o", "run"],
        ["adopt", "adapter", "-o", "new"],
        [*in_new, f"model.name={material / 'model'}", "data.columns.input=nothing"],
        ["init", "rows.csv", "data.columns.input=nothing", "-o", "new"],
    )
    for error, message in zip(
        errors,
        [
            "run: holds a run of another recipe (it differs in method.name",
            "run: holds a run of another recipe (it differs in training.learning_rate)",
            "run: holds a run of another recipe (it differs in method.num_experts)",
            "unknown task 'nothing'",
            "run: contains a run",
            "unknown task 'nothing'",
            "compare: the recipe has no compare section",
            "data.source: is null",
            "has no validation instances",
            "use --all-tasks",
            "run: is not an empty folder",
            "model ./nowhere: not an existing folder",
            "nothing",
            "nothing",
        ],
        strict=True,
    ):
        assert message in error
    assert not (place / "new").exists()


def test_refusals_of_method_options_import_no_torch(place):
    errors = refused(
        ["train", "recipe.yaml", "output=new", "method.num_experts=0"],
        ["train", "recipe.yaml", "output=new", "method.gates=soft"],
        ["train", "recipe.yaml", "output=new", "method={name: dora, use_dora: false}"],
        ["train", "recipe.yaml", "output=new", "method={name: lora, num_experts: 2}"],
        ["train", "recipe.yaml", "output=new", "method={name: badit, regroup: {every: -1}}"],
        ["compare", "compared.yaml", "output=new", "compare.methods.lora.num_experts=2"],
    )
    for error, message in zip(
        errors,
        [
            "method.num_experts: ",
            "method.gates: input should be 'clusters'",
            "method.use_dora: is set by the method name dora",
            "method.num_experts: lora has no such option",
            "method.regroup.every: ",
            "compare.methods.lora: method.num_experts: lora has no such option",
        ],
        strict=True,
    ):
        assert message in error


# Interrupts a command at its first import of a slow library, and prints whether a wait is shown.
WAITS = """
import json, sys
from badit.cli import main
from badit.support import console

class Interrupts:
    def find_spec(self, name, *_):
        if name in ("torch", "peft", "accelerate"):
            print(json.dumps(console._is_announced))
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
for words in json.loads(sys.argv[1]):
    assert main(words) == 130, words
"""


def test_libraries_are_loaded_with_a_status_also_in_a_log(place, material):
    model = f"model.name={material / 'model'}"
    commands = [
        ["train", "recipe.yaml", "output=new"],
        ["train", "recipe.yaml", "output=new", "--dry-run"],
        ["compare", "compared.yaml", "output=new"],
        ["compare", "compared.yaml", "output=new", "--dry-run"],
        ["adopt", "adapter", model, "-o", "new"],
        ["extend", "run", str(material / "tasks.jsonl")],
        ["evaluate", "run"],
        ["generate", "run", "Hi"],
        ["export", "run", "-o", "new", "--task", "cities"],
        ["analyze", "run"],
        ["push", "run", "a/b"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WAITS, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["true"] * len(commands), done.stderr
