"""Recipes: valid values, invalid values and their error messages."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys

import pytest
import yaml
from transformers import TrainingArguments

from badit.authoring.method_table import present_table
from badit.comparison.grid import Grid
from badit.data import Instance, Task
from badit.recipe.arguments import RENAMED_ARGUMENTS, TrainingSection, argument_names
from badit.recipe.loading import build_recipe, load_recipe, merged
from badit.recipe.method import resolve_method
from badit.recipe.options import read_method_table, refuse_method
from badit.recipe.saved import differing_keys, dump_recipe
from badit.recipe.schema import expand_source
from badit.runs.resolved import resolve
from badit.support.errors import BaditError
from docs.pages import ROOT
from refusals import refuses
from steps import method_of

RECIPES = [path.relative_to(ROOT) for path in sorted((ROOT / "recipes").glob("**/*.yaml"))]
PAPER = [path for path in RECIPES if path.parent.name == "paper"]


INSTANCE = Instance(id="0", input="Lima", outputs=("Peru",))


def write_recipes(folder, **texts):
    """Writes ``NAME.yaml`` for each text and returns the path of ``own.yaml``."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "own.yaml"


def test_shipped_recipes_are_valid_and_listed():
    linked = re.findall(r"\]\((\S+\.yaml)\)", (ROOT / "recipes/README.md").read_text())
    assert sorted(linked) == sorted(str(path.relative_to("recipes")) for path in RECIPES)
    for path in RECIPES:
        recipe = load_recipe(ROOT / path)
        method_of(recipe.method)
        assert recipe.compare is None or Grid(recipe).recipe is recipe
        assert load_recipe(path.relative_to("recipes").with_suffix("")) == recipe
    comparison = load_recipe(ROOT / "recipes/superni-cpu.yaml")
    assert comparison.compare.methods["badit"].model_extra == comparison.method, (
        "badit train must run a cell"
    )


def test_paper_recipes_have_the_papers_settings_and_differ_only_by_model():
    recipes = {path: load_recipe(ROOT / path) for path in PAPER}
    assert len({recipe.model.name for recipe in recipes.values()}) == len(PAPER) > 0
    for path, recipe in recipes.items():
        assert recipe.training.gradient_checkpointing == ("8b" in path.stem or "9b" in path.stem)
        assert recipe.output == f"runs/paper/{path.stem}"
        keys = set(differing_keys(recipes[PAPER[0]].model_dump(), recipe.model_dump()))
        assert keys <= {"model.name", "training.gradient_checkpointing", "output"}
    badit = {"name": "badit", "num_experts": 8, "r": 4, "lora_alpha": 32, "lora_dropout": 0.0}
    options = {"target_modules": ["gate_proj"], "regroup": {"every": 0.1, "stop": 0.5}}
    factors = {"init_weights": "bad", "gated": "factors", "router_input": "mean"}
    assert recipe.method == {**badit, **options, **factors}
    assert recipe.training.num_train_epochs == 10  # docs/paper-index.md has the other values


def test_overrides_set_nested_keys_to_yaml_values():
    overrides = [
        "training.num_train_epochs=2.5",
        "training.learning_rate=5e-4",
        "data.tasks=[a, b]",
        "method.r=-4",
    ]
    overrides += ["method.regroup=null", "data.seed=1_000", "training.seed=08"]
    overrides += ["data.instruction=Answer: yes # or no", "data.source=*.csv", 'output="1"']
    recipe = build_recipe({"training": {"num_train_epochs": 1}}, overrides)
    training, data = recipe.training, recipe.data
    assert (training.num_train_epochs, training.learning_rate, training.seed) == (2.5, 5e-4, 8)
    assert (data.tasks, data.seed, data.source, recipe.output) == (["a", "b"], 1000, "*.csv", "1")
    assert data.instruction == "Answer: yes # or no", "other values are text"
    assert recipe.method == {"r": -4, "regroup": None}
    # A task can be given by its number.
    tasks = build_recipe({}, ["data.tasks=[363, 073, 002, 089, task511, 0]"]).data.tasks
    assert tasks == ["363", "073", "002", "089", "task511", "0"]
    assert build_recipe({"data": {"tasks": [363]}}).data.tasks == ["363"]


def test_invalid_values_are_one_line_errors():
    for content, overrides, message in (
        (
            {"training": {"epoch": 1}},
            [],
            r"training\.epoch: unknown key \(did you mean 'num_train_epochs'\?\)",
        ),
        ({}, ["training.num_train_epochs"], r"has the form key=value"),
        ({}, ["training.num_train_epochs.more=3"], r"training\.num_train_epochs: "),
        ({"output": "x"}, ["output.name=3"], r"output is a single value"),
        ({}, ['output="\\ud800"'], "cannot be read as YAML"),
        (
            {},
            ["training.learning_rate=.nan"],
            r"training\.learning_rate: input should be a finite number",
        ),
        (
            {},
            ["training.learning_rate=yes"],
            r"training\.learning_rate: must be a number, not true or false",
        ),
        (
            {"compare": {"methods": {}, "seeds": [True]}},
            [],
            r"compare\.seeds: must be a number, not true or false",
        ),
        ({"training": {1: 2}}, [], r"training\.1: keys should be strings, got 1"),
        ({"output": "a\0b"}, [], r"output: must be a name or a path"),
        ({"output": "a\udcffb"}, [], r"output: must be a name or a path, not blank, in UTF-8"),
        ({"k" * 500: 1}, [], r"^recipe: k{120}: unknown key$"),
        (
            {},
            ["data.source=[{path: a.csv, tsk: b}, c.csv]"],
            r"^recipe: data\.source\.0\.tsk: .* 'task'\?\)$",
        ),
        ({}, ["training.output_dir=x"], "cannot be set in a recipe: set output, the run's folder"),
        ({}, ["training.fp16=true"], "set model.dtype, or bf16"),
        ({}, ["training.gradient_checkpointing_kwargs={}"], "use_reentrant"),
        ({}, ["training.optim=adamm"], "training\\.optim: input should be 'adamw_torch'"),
        (
            {},
            ["training.adam_beta1=high"],
            "training\\.adam_beta1: input should be a valid number, got 'high'",
        ),
        ({}, ["training.dataloader_num_workers=true"], "input should be a valid integer, got True"),
        (
            {},
            ["training.warmup_steps=1.5"],
            "a whole number of steps, or a fraction of the run below 1, got 1.5",
        ),
    ):
        assert "\n" not in refuses(message, build_recipe, content, overrides)


def test_all_errors_are_reported_at_once_without_importing_torch(tmp_path):
    text = "trainig: {}\ntraining: {seed: -1, optm: sgd, epochs: 1}\ndata: {order: 3}\n"
    text += "method: {name: badit, num_expert: 8, regroup: {evry: 2}}\n"
    text += "compare: {methods: {a: {name: lroa}, b: {name: mtl-lora, r: 2, seeds: [0]}}}"
    path = write_recipes(tmp_path, own=text)
    code = f"import sys; from badit.cli import main; main(['train', {str(path)!r}]); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert sorted(line.removeprefix(f"badit: {path}: ") for line in done.stderr.splitlines()) == [
        "compare.methods.a.name: unknown method 'lroa' (did you mean 'lora'?)",
        "data.order: input should be a valid string, got 3",
        "method.num_expert: unknown key (did you mean 'num_experts'?)",
        "method.regroup.evry: unknown key (did you mean 'every'?)",
        "trainig: unknown key (did you mean 'training'?)",
        "training.epochs: is now called num_train_epochs, as in transformers",
        "training.optm: unknown key (did you mean 'optim'?)",
        "training.seed: input should be greater than or equal to 0, got -1",
    ]


def test_shipped_recipes_are_loaded_and_extended_by_name(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BADIT_SUPERNI", "absent")
    assert "absent: no such file or folder" in command("tasks", "superni-cpu", code=2), (
        "the recipe was read"
    )
    recipe = load_recipe(write_recipes(tmp_path, own="{extends: superni-cpu, output: mine}"))
    assert (recipe.data.source, recipe.output) == ("$BADIT_SUPERNI", "mine")
    write_recipes(tmp_path, **{"superni-cpu": "output: here"})
    message = r"superni-cpuu: no such file, and no recipe.* \(did you mean 'superni-cpu'\?\)"
    refuses(message, load_recipe, "superni-cpuu")


def test_training_arguments_are_forwarded_or_refused_with_a_reason():
    arguments = {
        "optim": "sgd",
        "adam_beta1": 0.8,
        "lr_scheduler_type": "polynomial",
        "neftune_noise_alpha": None,
    }
    arguments |= {
        "save_strategy": "epoch",
        "fsdp_config": {"min_num_params": 1},
        "debug": "",
        "dataloader_num_workers": 2,
    }
    forwarded = build_recipe({"training": arguments}).training.model_dump(include=argument_names())
    assert arguments.items() <= forwarded.items()
    assert "max_skipped_steps" not in forwarded
    fields = [field for field in dataclasses.fields(TrainingArguments) if field.init]
    others = [field for field in fields if field.name not in TrainingSection.model_fields]
    settled = []
    for field in others:
        try:
            build_recipe(
                {
                    "training": {
                        field.name: None if field.default is dataclasses.MISSING else field.default
                    }
                }
            )
        except BaditError as error:
            settled.append(str(error))
    assert argument_names() == {field.name for field in fields}, (
        "the names read from the source must be complete"
    )
    assert settled
    assert all("cannot be set in a recipe: " in message for message in settled)


@pytest.mark.parametrize("old", RENAMED_ARGUMENTS)
def test_renamed_arguments_are_refused(old):
    current = RENAMED_ARGUMENTS[old]
    value = {"scheduler": "linear", "deterministic": True}.get(old, 1)
    refuses(
        rf"training\.{old}: is now called {current}, as in transformers$",
        build_recipe,
        {"training": {old: value}},
    )


def test_run_recipe_keeps_strings_that_look_like_numbers_and_options_that_are_tuples(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    method = {"name": "lora", "target_modules": ("gate_proj",)}
    recipe = build_recipe({"data": {"tasks": ["1e5"]}, "method": method, "output": "~/run"})
    tasks = [Task(name="1e5", definition=None, train=[INSTANCE], test=[INSTANCE])]
    run = resolve(recipe, tasks)
    run.prepare_folder()
    assert run.folder.path == tmp_path / "run"
    assert run.folder.recipe.data == recipe.data
    assert resolve(recipe, tasks).has_begun()


def test_invalid_files_are_one_line_errors(tmp_path):
    for text, message in (
        (b"training: [", "line 1.*: cannot be read as YAML"),
        (b"- a\n- b\n", "must contain 'key: value' lines, not a list"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        (b"a: " + b"[" * 1000, "cannot be read as YAML"),
        (b"a: 0x" + b"f" * 6000, r"line 1, column 4: .*a number of more than 100 digits"),
        (b"a: &b [*b]", "cannot be read as YAML"),
        (
            b"training: {seed: 1}\ntraining: {}\n",
            r"line 2, column 1: .*the key 'training' is there twice",
        ),
        (b"#" * 200_001, "has more than 200,000 characters"),
        (
            b"a: &a [" + b"1, " * 1000 + b"1]\nb: [" + b"*a, " * 100 + b"*a]",
            "more than 100,000 values",
        ),
    ):
        path = tmp_path / "broken.yaml"
        path.write_bytes(text)
        assert "\n" not in refuses(rf"^{path}.*{message}", load_recipe, path)


@pytest.mark.parametrize(
    "value",
    [
        '!!binary "/////w=="',
        '!!binary "*"',
        "!!set {a, b}",
        "!!omap [a: 1]",
        '!!timestamp "x"',
        "!!python/none x",
    ],
)
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("output: VALUE", "output"),
        ("method: {name: lora, r: VALUE}", "method.r"),
        ("method: {name: lora, target_modules: [a, VALUE]}", "method.target_modules"),
        ("training: {lr_scheduler_kwargs: {a: VALUE}}", "training.lr_scheduler_kwargs.a"),
    ],
)
def test_values_that_are_not_plain_are_refused_with_file_and_key(tmp_path, text, key, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("VALUE", value))
    error = refuses(r"line 1, column \d+: .*: use a plain value", load_recipe, path)
    assert error.startswith(f"{path}, line 1, column ")
    assert f"({key}: the tag !!" in error


@pytest.mark.parametrize("value", ["!!int x", "!!float x", "!!bool x", "!!int 1:x"])
def test_values_that_do_not_have_their_tag_are_refused_with_their_place(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output: run\ntraining: {{max_steps: {value}}}")
    refuses(rf"^{path}, line 2, column 23: .*is not a valid !!", load_recipe, path)


def test_keys_that_are_not_text_are_refused_with_their_place(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text('method:\n  ? !!binary "/////w=="\n  : 1\n')
    refuses(rf"^{path}, line 2, column 5: .*method: the tag !!binary", load_recipe, path)


def test_dates_are_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("output: 2026-01-31\nmodel: {revision: 2001-12-14 21:59:43}\n")
    recipe = load_recipe(path)
    assert (recipe.output, recipe.model.revision) == ("2026-01-31", "2001-12-14 21:59:43")
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_recipe_extends_another_key_by_key(tmp_path):
    path = write_recipes(
        tmp_path,
        base="method: {name: badit, r: 2, regroup: {every: 5, stop: 1}}\n"
        "training: {max_steps: 4, warmup_steps: 0.1}",
        middle="{extends: base.yaml, training: {max_steps: 5}, output: b}",
        own="{extends: middle.yaml, method: {num_experts: 3, regroup: {every: 7}}, output: c}",
    )
    recipe = load_recipe(path, ["training.warmup_steps=0.2"])
    method = {"name": "badit", "r": 2, "num_experts": 3, "regroup": {"every": 7, "stop": 1}}
    assert recipe == build_recipe(
        {"method": method, "training": {"max_steps": 5, "warmup_steps": 0.2}, "output": "c"}
    )
    assert "extends" not in dump_recipe(recipe)


def test_other_method_or_model_does_not_inherit_options():
    base = {
        "method": {"name": "badit", "r": 2, "regroup": {"every": 5}},
        "model": {"name": "a/b", "revision": "main"},
    }
    assert merged(base, {"model": {"name": "c/d"}}) == {**base, "model": {"name": "c/d"}}
    assert merged(base, {"method": {"name": "lora"}})["method"] == {"name": "lora"}
    assert merged(base, {"method": {"name": "badit"}}) == base
    assert merged(base, {"method": {"regroup": None}})["method"] == {
        "name": "badit",
        "r": 2,
        "regroup": None,
    }


def test_invalid_extends_are_one_line_errors(tmp_path):
    for name, base, message in (
        (
            "a" * 3000,
            "",
            r"own\.yaml: extends: (must be a file in the recipe's folder|.*leads out of)",
        ),
        ("none.yaml", "", r"none\.yaml: cannot be read"),
        ("base.yaml", "training: {epoch: 1}", r"base\.yaml: training\.epoch: unknown key"),
        (
            "base.yaml",
            "extends: own.yaml",
            r"base\.yaml: extends: own\.yaml already extends this file; remove one",
        ),
    ):
        assert "\n" not in refuses(
            message, load_recipe, write_recipes(tmp_path, own=f"extends: {name}", base=base)
        )


def test_environment_variables_in_the_source_are_expanded(monkeypatch):
    monkeypatch.setenv("TASKS", "/somewhere")
    monkeypatch.delenv("NO_TASKS", raising=False)
    assert (
        expand_source("$TASKS/superni") == expand_source("${TASKS}/superni") == "/somewhere/superni"
    )
    assert expand_source("$$TASKS/$${TASKS} $") == "$TASKS/${TASKS} $"
    refuses(
        r"NO_TASKS is not set; set it, or use data\.source=PATH",
        expand_source,
        "${NO_TASKS}/superni",
    )


def test_table_of_methods_has_the_options_of_the_classes():
    committed, present = read_method_table(), present_table()
    assert committed["names"] == present["names"]
    known = {option["key"] for option in committed["options"]} | {*committed["of_other_releases"]}
    assert {option["key"] for option in present["options"]} <= known
    # PEFT's own options differ between its releases.
    if committed["peft"] == present["peft"]:
        fix = "python -m badit.authoring.method_table"
        assert committed["options"] == present["options"], fix


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("num_train_epochs", "'training.num_train_epochs'"),
        ("num_train_epoch", "'training.num_train_epochs'"),
        ("learning_rat", "'training.learning_rate'"),
        ("num_expert", "'method.num_experts'"),
        ("seed", "'data.seed' or 'training.seed'"),
        ("adam_beta2", "'training.adam_beta2'"),
        ("trainig", "'training'"),
    ],
)
def test_a_key_without_its_section_is_suggested_with_it(key, hint):
    message = rf"{key}: unknown key \(did you mean {hint}\?\)"
    refuses(message, build_recipe, {}, [f"{key}=1"])


def test_infinity_is_refused_also_in_arguments_of_transformers():
    refuses(
        "training.adam_epsilon: .*finite",
        build_recipe,
        {"output": "run", "data": {"source": "builtin"}, "training": {"adam_epsilon": math.inf}},
    )


VALUES = (0, 1, -1, 3, 0.5, 2.5, "x", "none", True, None, [], ["x"], [1], {})


def refusal_of(call, section):
    """Returns the message of a refused method section, or None."""
    try:
        call(section)
    except BaditError as error:
        return str(error)
    return None


def test_table_of_methods_refuses_only_what_the_classes_refuse(monkeypatch):
    refused_values = 0
    for option in read_method_table()["options"]:
        if "type" not in option:
            continue
        for name, value in itertools.product(option["methods"], VALUES):
            outer, _, inner = option["key"].partition(".")
            section = {"name": name, outer: {inner: value} if inner else value}
            early = refusal_of(refuse_method, section)
            if early is None:
                continue
            refused_values += 1
            with monkeypatch.context() as without:
                without.setattr("badit.recipe.options._check_values", lambda *_: None)
                full = refusal_of(resolve_method, section)
            assert full is not None, section
            assert early.partition(":")[0] == full.partition(":")[0]
    assert refused_values > 1000


def test_resolving_keeps_single_values_of_options():
    # UnresolvedRun compares them with those of a saved run.
    kept = 0
    for option in read_method_table()["options"]:
        default = yaml.safe_load(option["default"])
        if "." in option["key"] or option["key"] == "preset" or default is None:
            continue
        if isinstance(default, str | int | float):
            for name in option["methods"]:
                section = {"name": name, option["key"]: default}
                assert resolve_method(section).section[option["key"]] == default
                kept += 1
    assert kept > 100
