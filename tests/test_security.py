"""Files that are read cannot run code or lead to other folders."""

import ast
import json
import pickle
import re
import sys
from io import StringIO
from pathlib import Path

import pytest
import transformers

import badit.tuner
from badit.cli import main
from badit.cli.app import app
from badit.integrations.lm_eval import BaditLM
from badit.models import load_base_model, load_skeleton
from badit.models.loading import _refuse_downloaded_code
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Recipe
from badit.support.console import status
from badit.support.errors import BaditError
from badit.support.files import write_json
from badit.training.checkpoints import last_checkpoint
from evaluation.test_results import mixed, unscored
from refusals import refuses

SOURCE = Path(badit.tuner.__file__).parents[1]
TREES = {
    path.relative_to(SOURCE): ast.parse(path.read_text(encoding="utf-8"))
    for path in SOURCE.rglob("*.py")
}
UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "code",
    "codeop",
}
UNSAFE_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "torch.load",
        "torch.save",
        "numpy.load",
        "np.load",
        "os.system",
    ),
    *(
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.load_all",
        "runpy.run_path",
    ),
}
SMALL = {"name": "badit", "num_experts": 4, "r": 2}


class Mark:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_source_uses_no_pickle_eval_or_shell_and_trusts_no_remote_code():
    assert TREES
    assert Recipe().model.trust_remote_code is False
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and [one.name for one in node.names] != [
                "UnpicklingError"
            ]:
                names.append(node.module or "")
            assert not UNSAFE_MODULES & {name.partition(".")[0] for name in names}, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            assert ast.unparse(call.func) not in UNSAFE_CALLS, f"{path}:{call.lineno}"
            for keyword in call.keywords:
                constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert not (keyword.arg in ("shell", "trust_remote_code") and constant is True), (
                    path
                )


def test_run_is_loaded_without_unpickling(trained, monkeypatch):
    run = trained(SMALL)
    expected = run.generate(["Name the capital."], max_new_tokens=3)
    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, None)
    assert run.generate(["Name the capital."], max_new_tokens=3) == expected


def test_pickled_adapter_is_refused(trained, tmp_path, command):
    run = trained(SMALL)
    (run.adapter_path / "adapter_model.safetensors").unlink()
    for name, message in (
        ("adapter_model.bin", "has no adapter_model.safetensors; pickled weights are not read"),
        ("adapter_model.safetensors", "adapter_model.safetensors: cannot be loaded"),
    ):
        (run.adapter_path / name).write_bytes(pickle.dumps({"weights": Mark(tmp_path / "ran")}))
        assert message in command("generate", run.path, "Name the capital.", code=2)
        assert not (tmp_path / "ran").exists()


def test_pickled_base_model_is_refused(model_folder, tmp_path):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"weights": Mark(tmp_path / "ran")})
    )
    refuses("weights: cannot be loaded", load_base_model, str(model_folder))
    assert not (tmp_path / "ran").exists()


def test_adapter_config_cannot_import_modules(trained, tmp_path, monkeypatch, command):
    """PEFT imports the modules that `megatron_core` and `auto_mapping` name."""
    run = trained({"name": "lora", "r": 2})
    (tmp_path / "leaves_a_mark.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = run.adapter_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change in (
        {"megatron_config": {"a": 1}, "megatron_core": "leaves_a_mark"},
        {"auto_mapping": {"parent_library": "leaves_a_mark", "base_model_class": "Model"}},
    ):
        config.write_text(json.dumps({**settings, **change}))
        assert "but the run's recipe says" in command(
            "generate", run.path, "Name the capital.", code=2
        )
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def model_with_code(model_folder, tmp_path, monkeypatch):
    """A base model of its own type, whose Python file creates a file when it is imported."""
    (model_folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-type'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model_folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model_folder / "config.json").write_text(
        json.dumps({**config, "model_type": "own-type", "auto_map": classes})
    )
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return model_folder


def test_model_code_runs_only_with_trust_remote_code(model_with_code, tmp_path):
    refuses(
        "allow it with trust_remote_code if you trust it", load_base_model, str(model_with_code)
    )
    assert not (tmp_path / "ran").exists()
    load_base_model(str(model_with_code), trust_remote_code=True)
    assert (tmp_path / "ran").exists(), "trust_remote_code=True must run the code"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_implementation", "someone/kernel"),
        ("attn_implementation", "flash_attention_3"),
        ("experts_implementation", "sonicmoe"),
    ],
)
@pytest.mark.parametrize("load", [load_base_model, load_skeleton])
def test_configuration_names_no_code_of_the_hub(field, value, load, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, field: value}))
    refuses(f"config.json: {field}: '{value}' is code of the model hub", load, str(model_folder))


def test_part_of_a_configuration_names_no_code_of_the_hub():
    config = transformers.Gemma3Config(vision_config={})
    _refuse_downloaded_code(config)
    config.vision_config._attn_implementation = "someone/kernel"
    with pytest.raises(BaditError, match="someone/kernel"):
        _refuse_downloaded_code(config)


def test_layers_are_not_replaced_by_downloaded_code(model_folder, monkeypatch):
    replaced = []
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "set_use_kernels",
        lambda model, use_kernels, *options: replaced.append(use_kernels),
    )
    load_base_model(str(model_folder))
    assert replaced == [False]


@pytest.mark.parametrize("verb", ["evaluate", "generate", "analyze", "studio", "serve", "export"])
def test_run_folder_cannot_enable_trust_remote_code(verb, model_with_code, tmp_path, command):
    """The run's recipe sets trust_remote_code; the user must allow it too."""
    section = {"name": str(model_with_code), "trust_remote_code": True}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        dump_recipe(build_recipe({"model": section, "method": {"name": "base"}}))
    )
    arguments = {
        "generate": ["Hello"],
        "studio": ["--port=0"],
        "serve": ["--port=0"],
        "export": ["-o", "x"],
    }.get(verb, [])
    assert "allow it with --trust-remote-code" in command(verb, run, *arguments, code=2)
    assert not (tmp_path / "ran").exists()
    if verb == "export":
        assert "is a run of the unchanged base model" in command(
            verb, run, *arguments, "--trust-remote-code", code=2
        )
    refuses("allow it with --trust-remote-code", BaditLM, run=run)


@pytest.mark.parametrize("name", ["/etc/passwd", "sub/../../base.yaml", "link.yaml", "\0", ["a"]])
def test_recipe_cannot_extend_a_file_outside_its_folder(tmp_path, name, command):
    (tmp_path / "base.yaml").write_text("training: {seed: 1}\n")
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "link.yaml").symlink_to("../base.yaml")
    (folder / "recipe.yaml").write_text(json.dumps({"extends": name}))
    shown = command("train", folder / "recipe.yaml", "--dry-run", code=2)
    assert re.search("extends: (must be a file in the recipe's folder|.*leads out of)", shown), (
        shown
    )


# Commands and their arguments. RUN is an input or output folder with the file that the command
# looks for and a link out of it. "tasks" is left out: it reads data, which may contain links.
LINKED = {
    **dict.fromkeys(["train", "train again", "compare", "compare again"], "RECIPE output=RUN"),
    **dict.fromkeys(["evaluate", "analyze", "report", "table"], "RUN"),
    **dict.fromkeys(["studio", "serve"], "RUN --port=0"),
    "generate": "RUN Hello", "push": "RUN org/x", "harness": "RUN --tasks=arc_easy",
    "demo": "output=RUN", "extend": "RUN builtin", "adopt": "RUN",
    "analyze to": "MODEL --data=builtin --output=RUN", "serve exports": "WHOLE RUN --port=0",
    "export": "RUN --output=NEW", "export to": "WHOLE --output=RUN",
    "export gates": "WHOLE --output=NEW --gates=RUN/gates.json",
}  # fmt: skip
LINKS = {
    "compare": "lora",
    "demo": "lora",
    "analyze to": "analysis",
    "adopt": "adapter_model.safetensors",
}  # default: adapter.partial
LINKS |= {"train again": "checkpoints", "compare again": "lora/lr-0.01/seed-0/log.txt"}
HOLDS = dict.fromkeys(["compare again", "table"], "results.json")  # default: config.yaml
HOLDS |= {"adopt": "adapter_config.json"}
HOLDS |= dict.fromkeys(["push", "export to", "export gates"], "export.json")


def test_link_cases_cover_every_command():
    commands = {name for name in app if not name.startswith("-")} - {"tasks", "init", "keys"}
    assert {name.partition(" ")[0] for name in LINKED} == commands


@pytest.mark.parametrize("command", LINKED)
def test_folder_with_link_out_of_it_is_refused(command, recipe_values, trained, tmp_path, capsys):
    run, outside = tmp_path / "linked", tmp_path / "outside"
    outside.mkdir()
    (outside / "key.json").write_text("mine")
    link = run / LINKS.get(command, "adapter.partial")
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    if command not in (
        "train",
        "compare",
        "demo",
    ):  # these find no file, as if killed in the first write
        (run / HOLDS.get(command, "config.yaml")).write_text("{}")
    recipe_values["compare"] = {"methods": {"lora": {"name": "lora", "r": 2}}, "reference": "lora"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_values))
    if command == "train again":
        (run / "config.yaml").write_text(
            dump_recipe(build_recipe(recipe_values | {"output": str(run)}))
        )
    places = {
        "RUN": run,
        "NEW": tmp_path / "new",
        "RECIPE": tmp_path / "recipe.yaml",
        "MODEL": tmp_path / "model",
    }
    if "WHOLE" in LINKED[command]:
        places["WHOLE"] = trained(SMALL).path
    words = [
        re.sub("[A-Z]{3,}", lambda found: str(places[found[0]]), word)
        for word in LINKED[command].split()
    ]
    assert main([command.partition(" ")[0], *words]) == 2
    assert re.search(
        f"{link}.*: leads out of {run}; copy the file itself into the folder\n$",
        capsys.readouterr().err,
    )
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]


def test_status_line_escapes_control_characters(monkeypatch):
    terminal = StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with status("loading x\x1b[2J[bold]"):
        pass
    assert r"loading x\x1b[2J[bold]" in terminal.getvalue()


def test_commands_escape_control_characters(recipe_values, tmp_path, capsys):
    """Names of folders, tasks and options, and errors of cells, contain control codes."""
    printing = {
        path.name
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if ast.unparse(node) == "print"
    }
    assert printing == {"console.py"}
    codes = "x\x1b[2J\x07\u202e"
    folder = tmp_path / codes
    (folder / "checkpoint-5").mkdir(parents=True)
    write_json(folder / "checkpoint-5" / "seal.json", {f"\n{codes}": ""})
    failed = unscored("lora", 1, status="failed", error=f"\n{codes}")
    write_json(folder / "results.json", {**mixed(), "cells": [failed]})
    recipe_values |= {
        "method": {"name": "lora", "r": 2},
        "output": str(folder / "run"),
        "training": {"max_steps": 1},
    }
    source, recipe = Path(recipe_values["data"]["source"]), folder / "recipe.yaml"
    source.write_text(source.read_text().replace("Name the", json.dumps(codes)[1:-1]))
    recipe.write_text(json.dumps(recipe_values))
    assert last_checkpoint(folder) is None
    for code, *words in [
        (0, "tasks", str(source)),
        (0, "train", str(recipe), "--dry-run"),
        (0, "train", str(recipe)),
        (2, "train", str(recipe), "method.r=3"),
        (0, "export", str(folder / "run"), "--output", str(folder / "out")),
        (0, "table", str(folder)),
        (0, "table", str(folder), "--format=csv"),
        (2, codes),
    ]:
        assert main(words) == code
        out, err = capsys.readouterr()
        assert r"x\x1b[2J\x07\u202e" in (out + err).replace(r"\u00", r"\x"), words
        assert not set(out + err) & {"\x1b", "\x07", "\u202e"}, words
