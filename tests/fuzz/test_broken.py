"""Damaged files and the commands that read them, which succeed or print one-line errors."""

import json
import shutil
import struct
from collections import namedtuple
from functools import partial
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from badit.recipe.loading import build_recipe
from data.examples import CHAT, write_rows
from data.test_readers import OFFICIAL as RECORD
from evaluation.test_results import cell, mixed, sequential
from fuzz import command
from fuzz.command import COUNTED, STRESS, cases, ends_well, written
from fuzz.damage import (
    NASTY_VALUES,
    REPLACEMENTS,
    as_json,
    as_lines,
    as_yaml,
    damaged,
    damaged_bytes,
    damaged_value,
)
from materials import make_recipe
from report.samples import Shape, write_run, write_sequence
from steps import fit

pytestmark = pytest.mark.slow
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
SPLIT_NAMES = ("train", "validation", "test")
LINES = [
    {
        "task": task,
        "instruction": f"Name the {task}.",
        "input": f"land {i}",
        "output": f"{task} {i}",
        "split": split,
    }
    for task in ("capital", "river")
    for i, split in enumerate(["train", *SPLIT_NAMES])
]
LINES[0] |= {"id": "first", "outputs": ["a", "b"]}
del LINES[0]["output"]
OFFICIAL = as_json(RECORD)
METHODS = {
    "badit": {
        "name": "badit",
        "num_experts": 4,
        "r": 2,
        "lora_alpha": 8,
        "regroup": {"every": 3, "solver": "paper"},
    },
    "lora": {"name": "lora", "r": 8, "target_modules": ["q_proj"]},
    "loramoe": {"name": "loramoe", "num_experts": 2, "r": 2},
    "task-neurons": {"name": "task-neurons", "share": 0.1},
    "base": {"name": "base"},
    "full": {"name": "full"},
}
SHAPE = Shape(
    tasks=("task1_a", "task2_b"), layers=2, modules=("mlp.gate_proj",), experts=2, steps=(20,)
)
REGROUPING = {
    "step": 10,
    "module": "model.layers.0.mlp.gate_proj.default",
    "previous_labels": [0, 0, 1, 1],
    "labels": [0, 1, 0, 1],
    "intra_degrees": 70.0,
    "inter_degrees": 91.0,
    "intra_abs_cos": 0.4,
    "inter_abs_cos": 0.1,
    "previous_intra_degrees": None,
    "previous_inter_degrees": 90,
}


def recipe_values(method):
    """Returns a recipe with every field set."""
    content = build_recipe({"method": METHODS[method]}).model_dump(mode="json")
    content["data"] |= {"source": "tasks.jsonl", "tasks": ["capital", "river"], "train_per_task": 2}
    methods = {"lora": {"name": "lora", "r": 4}, "badit": {"name": "badit"}}
    search = {"seeds": [0, 1], "learning_rates": [0.001, 0.002]}
    return {
        **content,
        "compare": {"methods": methods, "reference": "lora", "single_task": ["lora"], **search},
    }


def training_run(method, folder, material):
    values = make_recipe(material / "model", material / "tasks.jsonl", folder / "run")
    values["method"] = {
        key: value for key, value in METHODS[method].items() if key != "target_modules"
    }
    fit(build_recipe(values, ["training.max_steps=1"]), progress=False)


def write(contents, folder, material=None):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def saved_dataset(folder, material):
    rows = datasets.Dataset.from_list([{"messages": CHAT, "id": str(i)} for i in range(20)])
    splits = datasets.DatasetDict({"train": rows, "test": rows.select(range(3))})
    splits.save_to_disk(folder / "saved")


def run_files(folder, material):
    write_run(folder / "analysed", SHAPE)
    write_run(folder / "regroupings", SHAPE, analysed=False)
    (folder / "regroupings" / "regroupings.jsonl").write_bytes(as_lines([REGROUPING]))
    write_sequence(folder / "sequence", SHAPE)


# A function that writes valid files, the files to damage, the commands that read them, and the
# number of cases.
Subject = namedtuple("Subject", "make broken commands cases", defaults=[40])


def recipe(contents, broken, cases=40):
    recipes = {name: as_yaml(values) for name, values in contents.items()}
    return Subject(
        partial(write, TASKS | recipes), broken, [["train", "recipe.yaml", "--dry-run"]], cases
    )


def comparison(content, commands, cases=60):
    return Subject(
        partial(write, {"results.json": as_json(content)}), ["results.json"], commands, cases
    )


CHATS = {"chats.jsonl": as_lines([{"messages": CHAT, "id": "a"}, {"messages": CHAT[:3]}])}
TURNS = [{"from": ROLES[each["role"]], "value": each["content"]} for each in CHAT]
SHARED = {"chats.json": as_json([{"conversations": TURNS[1:], "system": "Be brief."}] * 2)}
READ_CHATS = [["tasks", ".", f"data.turns={turns}"] for turns in ("last", "all")]
SAVED = ["train/data-00000-of-00001.arrow", "train/dataset_info.json", "train/state.json"]
SEVERAL = {
    "data": {
        "source": [
            "chats.jsonl",
            {"path": "rows.csv", "columns": {"input": "text", "output": "label"}, "weight": 2},
            {"path": "chats.json", "task": "chat", "turns": "all", "instruction": "Answer."},
        ],
        "weights": {"chat": 0.5},
    }
}
SOURCES = {
    **CHATS,
    **SHARED,
    "rows.csv": b"text,label\nFine,good\n",
    "recipe.yaml": as_yaml(SEVERAL),
}
TASKS = {"tasks.jsonl": as_lines(LINES)}
SPLITS = {
    f"{split}.jsonl": as_lines([line for line in LINES if line["split"] == split])
    for split in SPLIT_NAMES
}
SAPT = {"task1_a/train.json": OFFICIAL, "task1_a/test.json": OFFICIAL}
LIST = "splits/default/train_tasks.txt"
SUPERNI = {"tasks/task1_a.json": OFFICIAL, LIST: b"task1_a\n", "splits/default/test_tasks.txt": b""}
EXTENDED = {
    "base.yaml": recipe_values("badit"),
    "recipe.yaml": {"extends": "base.yaml", "training": {"seed": 1}},
}
TABLES = [["table", ".", "--format", form] for form in ("text", "markdown", "latex", "csv")]
TABLES += [["table", "results.json", "--by-task"]]
REPORTS = {
    "analysed": [
        f"analysis/{name}.json"
        for name in ("gradient_overall", "gates", "expert_angles", "abilities")
    ],
    "regroupings": [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "scores.json",
        "regroupings.jsonl",
        "predictions/task1_a.jsonl",
    ],
    "sequence": ["scores.json"],
}
ADAPTER = ["adapter_model.safetensors", "adapter_config.json"]
ADAPTERS = {"badit": ADAPTER, "lora": ADAPTER, "full": ["weights.safetensors"]}
MIXED, ALONE = mixed(), "lora, one model per task"
MIXED |= {"methods": [*MIXED["methods"], ALONE], "cells": [*MIXED["cells"], cell(ALONE, 0, 40)]}
GENERATE = [["generate", "run", "Name the capital.", "--max-new-tokens", "1"]]
SUBJECTS = {
    "one file": Subject(partial(write, TASKS), ["tasks.jsonl"], [["tasks", "tasks.jsonl"]]),
    "a file per split": Subject(partial(write, SPLITS), ["train.jsonl"], [["tasks", "."]]),
    "sapt": Subject(partial(write, SAPT), ["task1_a/train.json"], [["tasks", "."]]),
    "chats": Subject(partial(write, CHATS), ["chats.jsonl"], READ_CHATS, 80),
    "sharegpt": Subject(partial(write, SHARED), ["chats.json"], READ_CHATS, 80),
    "saved": Subject(
        saved_dataset,
        [f"saved/{name}" for name in (*SAVED, "dataset_dict.json")],
        [["tasks", "saved"]],
    ),
    "sources": Subject(partial(write, SOURCES), [*SOURCES], [["tasks", "recipe.yaml"]]),
    "superni": Subject(partial(write, SUPERNI), ["tasks/task1_a.json", LIST], [["tasks", "."]]),
    **{
        f"recipe {method}": recipe({"recipe.yaml": recipe_values(method)}, ["recipe.yaml"])
        for method in METHODS
    },
    "extended recipe": recipe(EXTENDED, ["base.yaml", "recipe.yaml", "tasks.jsonl"], 15),
    "mixed": comparison(MIXED, TABLES),
    "sequential": comparison(sequential(), TABLES),
    "analysed results": comparison(MIXED, [["analyze", "."]], 10),
    **{
        f"report {kind}": Subject(
            run_files, [f"{kind}/{name}" for name in names], [["report", kind]], 2
        )
        for kind, names in REPORTS.items()
    },
    **{
        f"adapter {name}": Subject(
            partial(training_run, name), [f"run/adapter/{file}" for file in files], GENERATE, 8
        )
        for name, files in ADAPTERS.items()
    },
}
BROKEN = [(name, file) for name, subject in SUBJECTS.items() for file in subject.broken]
SECTIONS = {name: keys for name, keys in recipe_values("badit").items() if isinstance(keys, dict)}


@pytest.fixture(autouse=True)
def _counted(request, tiny_built_in):
    """Counts the cases of broken input; tests/conftest.py prints the sum."""
    before = command.tried
    yield
    request.node.user_properties.append((COUNTED, command.tried - before))


@pytest.fixture(scope="module")
def valid(material, tmp_path_factory):
    """A function that replaces a folder by a copy of a subject's valid files."""
    made = {}

    def put(name, folder):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("valid")
            SUBJECTS[name].make(made[name], material)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made[name], folder)

    return put


@pytest.mark.parametrize("name", SUBJECTS)
def test_valid_files_are_read(valid, tmp_path, monkeypatch, name):
    valid(name, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    for words in SUBJECTS[name].commands:
        assert ends_well(*words)


@pytest.mark.parametrize(("name", "file"), BROKEN)
def test_damaged_files(valid, tmp_path, monkeypatch, name, file):
    subject, folder = SUBJECTS[name], tmp_path / "case"
    valid(name, folder)
    content = (folder / file).read_bytes()

    @cases(subject.cases)
    @given(data=st.data())
    def try_one(data):
        valid(name, folder)
        monkeypatch.chdir(folder)
        (folder / file).write_bytes(data.draw(broken(file, content)))
        before = written(folder)
        words = data.draw(st.sampled_from(subject.commands))
        done = ends_well(*words)
        if words[0] in ("report", "analyze"):
            assert (folder / "report.html").exists() == done
        elif words[0] != "generate":
            assert written(folder) == before

    try_one()


def broken(file, content):
    readers = {
        ".json": lambda: damaged(json.loads(content), as_json),
        ".jsonl": lambda: damaged(
            [json.loads(line) for line in content.splitlines()[:8]], as_lines
        ),
        ".yaml": lambda: damaged(yaml.safe_load(content), as_yaml),
        ".safetensors": lambda: damaged_tensors(content),
    }
    return readers.get(Path(file).suffix, lambda: damaged_bytes(content))()


@st.composite
def damaged_tensors(draw, content):
    """Draws a safetensors file with damaged header values, header length, tensors or any bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    text = as_json(draw(damaged_value(header)))
    by_header = struct.pack("<Q", len(text)) + text + tensors
    by_length = (
        struct.pack("<Q", draw(st.sampled_from([0, 1, length - 1, length + 1, 2**40, 2**64 - 1])))
        + content[8:]
    )
    by_tensors = content[: 8 + length] + draw(damaged_bytes(tensors))
    return draw(
        st.sampled_from([by_header, by_header, by_length, by_tensors, draw(damaged_bytes(content))])
    )


@pytest.mark.parametrize(("name", "file"), BROKEN)
def test_files_that_are_missing_unreadable_or_not_regular(valid, tmp_path, monkeypatch, name, file):
    folder = tmp_path / "case"
    few = STRESS == 1 and name.startswith("report")
    for replace in (
        REPLACEMENTS[BROKEN.index((name, file)) % len(REPLACEMENTS) :][:1] if few else REPLACEMENTS
    ):
        valid(name, folder)
        monkeypatch.chdir(folder)
        replace(folder / file)
        for words in SUBJECTS[name].commands:
            ends_well(*words)


def test_unusual_task_names(tmp_path):
    names = [
        "two\nlines",
        "\x1b[2J",
        "é" * 110,
        "$HOME",
        "-",
        "CON",
        " ",
        ".hidden",
        "\u202e",
        "\u2028",
    ]
    for i, name in enumerate([*names, "x" * 300, "..", "../x", "/x", "a/b", "a\\b", "", "\0"]):
        ends_well(
            "tasks",
            str(write_rows(tmp_path / "tasks.jsonl", *({**line, "task": name} for line in LINES))),
        )
        if name in names:
            write({f"{i}/{name}.json": OFFICIAL}, tmp_path)
            ends_well("tasks", str(tmp_path / str(i)))


@pytest.mark.parametrize("filler", ["x", "\n", "[", "0", '"'])
def test_ten_megabytes_of_trailing_data(tmp_path, filler):
    for name, content in (("task.json", OFFICIAL), ("tasks.jsonl", as_lines(LINES))):
        (tmp_path / name).write_bytes(content + filler.encode() * 10_000_000)
        ends_well("tasks", str(tmp_path / name if name == "tasks.jsonl" else tmp_path))


@pytest.mark.parametrize(
    "field", [f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys]
)
def test_every_recipe_field_with_unusual_values(valid, tmp_path, monkeypatch, field):
    valid("recipe badit", tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    for value in NASTY_VALUES[:: 1 if STRESS > 1 else 5]:
        try:
            written_out = (
                yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
            )
        except UnicodeEncodeError:
            continue
        ends_well("train", "recipe.yaml", f"{field}={written_out}", "--dry-run")


def yaml_bomb(first, each):
    """Returns YAML in which each line has nine aliases of the previous one."""
    lines = [
        f"{name}: &{name} {each.replace('_', ', '.join([f'*{old}'] * 9))}"
        for old, name in pairwise("abcdefghi")
    ]
    return "\n".join([f"a: &a {first}", *lines, ""])


@pytest.mark.parametrize(
    "text",
    [
        *(
            yaml_bomb("[x, x]", "[_]"),
            yaml_bomb("{x: 1}", "{<<: [_]}"),
            "a: *nowhere\n",
            "? [a, b]\n: c\n",
            "1: 2\n",
        ),
        *(
            "output: !!python/object/apply:os.system ['touch ran']\n",
            "output: !!timestamp 2001-99-99\n",
        ),
        *(
            "output: !!binary aGk=\n",
            "output: !!set {a, b}\n",
            "training: {seed: 1}\r\noutput: x\r\n",
        ),
        *(
            "training: {seed: 1:2:3}\n",
            "training: {num_train_epochs: 1_0.5e+3}\n",
            "\ufefftraining: {seed: 1}\n",
        ),
        *(
            "--- a\n--- b\n",
            "a:\n" + "".join(" " * i + "- \n" for i in range(400)),
            "output: " + "x" * 10_000_000,
        ),
    ],
    ids=lambda text: text[:30],
)
def test_yaml_with_aliases_tags_and_unusual_syntax(tmp_path, monkeypatch, text):
    write(TASKS, tmp_path)
    monkeypatch.chdir(tmp_path)
    source = "" if text[0] in "[#-\ufeff" else "data: {source: tasks.jsonl}\n"
    (tmp_path / "recipe.yaml").write_text(source + text)
    ends_well("train", "recipe.yaml", "--dry-run")
    assert not (tmp_path / "ran").exists()
