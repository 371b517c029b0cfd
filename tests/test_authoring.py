"""The first recipe of `badit init`, the check of a dry run, the list of keys, and the schema."""

import csv
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from badit.api import Run
from badit.authoring import step_time
from badit.authoring.dry_run import check
from badit.authoring.first_recipe import first_recipe
from badit.authoring.keys import recipe_keys, schema
from badit.data import Source
from badit.data.columns import unused_columns
from badit.data.encoding import encode_examples
from badit.models import load_tokenizer
from badit.recipe.loading import build_recipe, load_recipe, shipped_recipes
from badit.recipe.method import NAMES
from badit.recipe.schema import CompareSection, Recipe
from badit.runs.resolved import resolve
from badit.support.files import read_jsonl
from badit.tuner.config import RegroupOptions
from data.examples import write_rows
from refusals import refuses
from steps import fit, method_of


@pytest.mark.parametrize(
    ("keep", "split", "method"),
    [
        (lambda line: True, "test", "cluster-gates"),
        (lambda line: line["split"] == "train", "validation", "cluster-gates"),
        (lambda line: line["task"] == "rivers", "test", "lora"),
    ],
)
def test_first_recipe_matches_the_data(
    material, tmp_path, monkeypatch, command, keep, split, method
):
    lines = [json.loads(line) for line in (material / "tasks.jsonl").read_text().splitlines()]
    monkeypatch.chdir(tmp_path)
    data, path = Path("my tasks.jsonl"), Path("mine.yaml")
    lines[0]["output"] = "a long answer " * 30
    data.write_text("\n".join(json.dumps(line) for line in lines if keep(line)))
    command("init", data, "-o", path)
    recipe = load_recipe(path)
    assert (recipe.evaluation.split, recipe.method["name"], recipe.output) == (
        split,
        method,
        "runs/mine",
    )
    assert recipe.prompt.max_answer_tokens == (50 if method == "lora" else 150)
    for compared in recipe.compare.methods.values():
        method_of(compared.model_extra)
    shown = command("train", path, "--dry-run", f"model.name={material / 'model'}")
    assert re.search(r"^about [\d.]+ GiB of memory", shown, re.MULTILINE)
    assert "exists" in command("init", data, "-o", path, code=2)


def rows(folder, count, answer="b", test=True):
    """Writes ``count`` training rows and, by default, one test row, and returns the file."""
    line = {"task": "a", "instruction": "Do.", "output": answer}
    lines = [
        {"input": f"{i}", **line, "split": split}
        for i, split in enumerate(["train"] * count + ["test"] * test)
    ]
    return str(write_rows(folder / "a.jsonl", *lines))


QUESTIONS = ["id,question,answer,category,split,link,empty"]
QUESTIONS += [
    f"{i},question {i},answer {i},{'ab'[i % 2]},{'test' if i > 5 else 'train'},of {i},"
    for i in range(8)
]
UNUSED = "Columns that are not used: category, link."


@pytest.mark.parametrize(
    ("suffix", "overrides", "counts", "unused"),
    [
        ("csv", [], "1 task, 5 training, 1 held-out and 2 test instances; method lora",
         f"{UNUSED} Task names: data.columns.task=category"),
        ("jsonl", ["data.columns.task=category"],
         "2 tasks, 6 training and 2 test instances; method cluster-gates",
         "Columns that are not used: link."),
        ("json", ["data.task=mine", "data.validation_per_task=1"],
         "1 task, 5 training, 1 held-out and 2 test instances; method lora", UNUSED),
        ("tsv", ["data.columns={task: category, id: link}"],
         "2 tasks, 6 training and 2 test instances; method cluster-gates", None),
    ],
)  # fmt: skip
def test_init_says_what_it_found_and_which_columns_are_not_used(
    tmp_path, monkeypatch, command, suffix, overrides, counts, unused
):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / f"mine.{suffix}"
    if suffix in ("csv", "tsv"):
        data.write_text("\n".join(QUESTIONS).replace(",", "\t" if suffix == "tsv" else ","))
    else:
        lines = [json.dumps(row) for row in csv.DictReader(QUESTIONS)]
        data.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    found = [counts] if unused is None else [counts, unused]
    expected = ["Recipe: recipe.yaml", *found, "Next: badit train recipe.yaml --dry-run"]
    assert command("init", data, *overrides).splitlines() == expected


def test_columns_that_a_form_uses_are_not_named(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for used in (
        {"instruction": "Do.", "input": "a", "output": "b"},
        {"task": "a", "instruction": "Do.", "outputs": ["b"], "id": "1", "split": "train"},
        {"messages": chat, "prompt": "a", "system": "s"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": chat, "rejected": chat, "prompt": chat[:1]},
        {"inputs": "a", "targets": "b", "task_name": "t"},
        {"question": "a", "answer": "b"},
    ):
        assert unused_columns(Source(write_rows(tmp_path / "a.jsonl", used))) == ([], None)
    folder = Source(tmp_path)
    assert unused_columns(folder) == unused_columns(Source("builtin")) == ([], None)
    rows = [{"prompt": "a", "response": "b", "source": f"{i}", "instruction": ""} for i in range(4)]
    odd = [{**row, "odd\nname": ["x", "y"][i % 2]} for i, row in enumerate(rows)]
    found = unused_columns(Source(write_rows(tmp_path / "a.jsonl", *odd)))
    assert found == (["source", "odd\nname"], "odd\nname")


@pytest.mark.parametrize(
    ("answer", "tokens"), [("дом " * 50, 250), ("word " * 50, 100), ("漢" * 100, 150)]
)
def test_max_answer_tokens_of_a_first_recipe_depend_on_the_script(tmp_path, answer, tokens):
    assert (
        yaml.safe_load(first_recipe(rows(tmp_path, 8, answer), "a.yaml").text)["prompt"][
            "max_answer_tokens"
        ]
        == tokens
    )


def test_tasks_with_few_rows_do_not_keep_the_others_from_being_held_out(tmp_path):
    for name, count in (("a", 2), ("b", 12)):
        rows_ = [
            {"task": name, "input": f"{i}", "output": "b", "split": "train"} for i in range(count)
        ]
        write_rows(
            tmp_path / "data" / f"{name}.jsonl", *rows_, {**rows_[0], "input": "x", "split": "test"}
        )
    recipe = yaml.safe_load(first_recipe(str(tmp_path / "data"), "a.yaml").text)
    assert recipe["data"]["validation_per_task"] == 3


@pytest.mark.parametrize("name", ["${HOME}", "a$HOME.jsonl", "$", "$$.jsonl", "{{ 7 }}.jsonl"])
def test_dollar_signs_in_the_name_of_a_file_are_taken_literally(
    tmp_path, monkeypatch, command, name
):
    monkeypatch.chdir(tmp_path)
    place = Path("of $HOME", name)
    place.parent.mkdir()
    Path(rows(tmp_path, 8)).rename(place)
    if place.suffix != ".jsonl":
        place.rename("rows.jsonl")
        place.mkdir()
        Path("rows.jsonl").rename(place / "a.jsonl")
    command("init", place)
    for words in (["recipe.yaml"], [place]):
        assert "all valid" in command("tasks", *words)
    assert Path(load_recipe("recipe.yaml").data.sources()[0].path) == place


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "# For one task, lora. Others"),
        (2, "# In trials with 3 and 5 tasks, cluster-gates was within noise of lora, which"),
        (5, "within noise of lora"),
        (6, "# cluster-gates had a lower loss than lora in trials with 15 tasks. Others"),
    ],
)
def test_reason_of_a_first_method_is_that_of_trials_with_as_many_tasks(tmp_path, count, words):
    fields = [
        {"task": f"t{i}", "split": split} for i in range(count) for split in ("train", "test")
    ]
    data = write_rows(tmp_path / "a.jsonl", *({"prompt": "a", "response": "b"} | f for f in fields))
    text = first_recipe(str(data), "a.yaml").text
    assert words in text
    assert yaml.safe_load(text)["method"]["name"] == ("lora" if count == 1 else "cluster-gates")


def test_few_rows_give_no_validation_or_rate_search_and_any_file_name_works(tmp_path):
    text = first_recipe(rows(tmp_path, 3), "my recipe #2.yaml", ["data.order=[a]"]).text
    assert "badit compare 'my recipe #2.yaml' 'output=runs/my recipe #2-compared' " in text
    values = yaml.safe_load(text)
    assert (values["output"], "learning_rates" in values["compare"]) == ("runs/my recipe #2", False)
    assert values["compare"]["orders"] == [["a"]]
    few, held_out = rows(tmp_path, 3, test=False), ["data.validation_per_task=1"]
    refuses(
        r"no validation instances; at least 4 training instances are needed",
        first_recipe,
        few,
        "a.yaml",
        held_out,
    )
    refuses(
        r"'data.source=b': only other data keys", first_recipe, few, "a.yaml", ["data.source=b"]
    )
    refuses(
        "task a has no validation instances", first_recipe, rows(tmp_path, 1, test=False), "a.yaml"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.gradient_accumulation_steps=2", "training.num_train_epochs=1.5"],
        ["training.max_steps=4", "method={name: lora, r: 3}"],
        [
            "data.order=[rivers, cities]",
            "data.train_per_task=5",
            "extend.own_experts=false",
            "method.regroup={every: 0.2, stop: 0.5}",
        ],
        [
            "data.order=[rivers, cities]",
            "method={name: badit, num_experts: 3, r: 2, regroup: {every: 2}}",
        ],
        ["data.order=[rivers, cities]", "method={name: o-lora, r: 2}"],
        ["data.sampling=balanced", "data.train_per_task=7", "method={name: full}"],
        ["training.max_steps=2"],
    ],
)
def test_check_predicts_steps_parameters_and_regroupings(recipe_values, overrides, capsys):
    recipe = build_recipe(recipe_values, overrides)
    shown = "\n".join(check(recipe))
    run = fit(recipe, progress=False)
    measured = run.environment["training"]
    assert f"\n{measured['steps']} steps of" in shown
    assert re.search(r"about \d+ minutes? of training", shown)
    assert (
        f"\n{measured['trainable_parameters']:,} of {measured['parameters']:,} parameters" in shown
    )
    stages = [Run.at(path).environment["training"] for path in sorted(run.path.glob("stages/*"))]
    if recipe.data.order and recipe.extend.own_experts:
        in_all = sum(stage["trainable_parameters"] for stage in stages)
        assert f"parameters are trained at a time, {in_all:,} in all 2 tasks" in shown
    if recipe.method.get("name", "badit") in ("badit", "cluster-gates"):
        logs = [stage / "regroupings.jsonl" for stage in (run.path, *run.path.glob("stages/*"))]
        due = sum(len({line["step"] for line in read_jsonl(log)}) for log in logs)
        assert f"\n{due} regroupings in {measured['steps']} steps" in shown
        warned = "badit: 0 regroupings in 2 steps: lower regroup.every" in capsys.readouterr().err
        assert (
            warned
            == ("0 regroupings in 2 steps: lower method.regroup.every" in shown)
            == (due == 0)
        )


@pytest.mark.parametrize("name", ["badit", "mtl-lora", "goat", "full", "task-neurons"])
def test_time_of_a_step_is_that_of_one_layer_and_the_others(recipe_values, monkeypatch, name):
    method = {"name": name, **({"rho": 10} if name == "goat" else {})}
    training = {"gradient_accumulation_steps": 3, "learning_rate": 0.01}
    values = {**recipe_values, "method": method, "training": training}
    run = resolve(build_recipe(values))
    tokenizer = load_tokenizer(run.recipe.model.name)
    pairs = [(task, instance) for task in run.tasks for instance in task.train]
    examples = encode_examples(tokenizer, pairs, **run.recipe.prompt.model_dump())
    timed = step_time._timed
    preparation, step = step_time.estimated_seconds(run, tokenizer, examples)
    assert preparation > 0
    assert step > 0

    def by_layers(run, model, *inputs):
        timed(run, model, *inputs)
        layers = len(model.model.layers)
        return step_time.Seconds(7 + 2 * layers, 0.5 + layers)

    # The whole model has two layers, which take 2.5 seconds here, and 11 before the first step.
    monkeypatch.setattr(step_time, "_timed", by_layers)
    assert step_time.estimated_seconds(run, tokenizer, examples) == (11, 3 * 2.5)
    monkeypatch.setattr(step_time, "_OPERATIONS_OF_CPU", 0)
    assert step_time.estimated_seconds(run, tokenizer, examples) is None


def test_check_counts_instructions_among_the_tokens_of_the_longest_instances(
    recipe_values, tmp_path
):
    texts = {"a": ("one " * 60, "x"), "b": ("Do.", "two " * 20)}
    rows = [
        {"task": task, "instruction": instruction, "input": text, "output": "c"}
        for task, (instruction, text) in texts.items()
    ]
    path = write_rows(tmp_path / "a.jsonl", *rows, *({**row, "split": "test"} for row in rows))
    options = [f"data.source={path}", "training.per_device_train_batch_size=1"]
    task_a, both_tasks = (
        check(build_recipe(recipe_values, [*options, f"data.tasks={name}"]))
        for name in ("[a]", "[a, b]")
    )
    assert task_a[-1] == both_tasks[-1]


def test_check_reports_invalid_recipes_without_creating_a_run(recipe_values, tmp_path):
    unsaved = {"eval_strategy": "steps", "save_strategy": "no", "load_best_model_at_end": True}
    (tmp_path / "notes.txt").touch()
    for values, message in (
        (
            {"method": {"name": "badit", "r": 40, "init_weights": "bad"}},
            "320 singular triples do not fit",
        ),
        ({"model": {"name": "no-such-folder"}}, "not an existing folder"),
        (
            {"training": {"load_best_model_at_end": True}},
            "load_best_model_at_end needs eval_strategy",
        ),
        (
            {"training": {"early_stopping_patience": 2}},
            "early_stopping_patience needs load_best_model_at_end: true$",
        ),
        (
            {"training": {"eval_steps": 2, "eval_strategy": "epoch"}},
            "eval_steps needs eval_strategy: steps",
        ),
        (
            {"data": {"order": "seeded-0", "sampling": "balanced"}},
            "data.order: a sequence is not a mixture; remove",
        ),
        (
            {"data": {"validation_per_task": 2}, "training": unsaved},
            "needs eval_strategy and save_strategy",
        ),
        (
            {"method": {"name": "badit", "exclude_modules": "("}},
            "method.exclude_modules: is not a regular expression",
        ),
        ({"output": str(tmp_path)}, "exists and is not a run's folder"),
        (
            {"training": {"eval_strategy": "epoch"}},
            "eval_strategy: task cities has no validation instances; set data",
        ),
    ):
        values = {
            **recipe_values,
            **values,
            "data": {**recipe_values["data"], **values.get("data", {})},
        }
        refuses(message, lambda given: check(build_recipe(given)), values)
    assert not (tmp_path / "run").exists()


def test_check_reports_all_errors_at_once(recipe_values):
    data = {**recipe_values["data"], "order": "sapt-9"}
    method = {"name": "badit", "target_modules": ["gate_prj"]}
    training = {"report_to": ["comet_ml"]}
    said = refuses(
        ".",
        check,
        build_recipe({**recipe_values, "data": data, "method": method, "training": training}),
    )
    fields = ("data.order: unknown order", "training.report_to: ", "method: Target modules")
    assert all(line.startswith(field) for line, field in zip(said.split("\n"), fields, strict=True))


def test_all_keys_are_listed_and_their_defaults_are_valid(command):
    listed = [key for key, _, _ in recipe_keys()]
    sections = {name: type(getattr(Recipe(), name)) for name in Recipe.model_fields} | {
        "compare": CompareSection
    }
    for name, section in sections.items():
        assert {f"{name}.{key}" for key in getattr(section, "model_fields", ())} <= {*listed}
    assert {f"method.regroup.{name}" for name in RegroupOptions().__dict__} <= {*listed}
    assert command("keys", "training.learning").split()[:2] == ["training.learning_rate", "0.002"]
    assert "did you mean 'training'?" in command("keys", "traning", code=2)
    found = command("keys", "Epochs")
    assert "training.num_train_epochs" in found
    assert "model.name" not in found
    # A listed default is a valid value of its key.
    for key, default, _ in recipe_keys():
        if key.count(".") == 1 and not key.startswith(("method", "compare", "training.NAME")):
            build_recipe({}, [f"{key}={default}"])


def test_schema_accepts_shipped_recipes_and_rejects_unknown_names(command):
    validator = jsonschema.Draft202012Validator(json.loads(command("keys", "--schema")))
    for path in shipped_recipes().values():
        assert not list(validator.iter_errors(yaml.safe_load(path.read_text()))), path
    assert not list(validator.iter_errors({"format": 2, "training": {"report_to": "wandb"}}))
    for wrong in (
        {"method": {"name": "lroa"}},
        {"method": {"rank": 4}},
        {"training": {"epochs": 1}},
        {"dat": {}},
    ):
        assert list(validator.iter_errors(wrong)), wrong
    assert schema()["properties"]["method"]["properties"]["name"] == {"enum": NAMES}
