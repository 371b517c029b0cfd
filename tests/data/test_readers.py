"""Layouts of task data, and invalid files: reading returns tasks or raises one line that names the file."""

import json
import os
from pathlib import Path

import pytest

from badit import plan
from badit.data import Instance, Source, Task, builtin_tasks, load_sources, load_tasks
from data.examples import CHAT, refusal, write_rows
from refusals import refuses

SUPERNI = os.environ.get("BADIT_SUPERNI")
# Training and test instances per task of the published release.
SUPERNI_SIZES = {
    "073": (975, 100),
    "1572": (160, 20),
    "1590": (126, 16),
    "181": (338, 43),
    "639": (142, 18),
}
SUPERNI_SIZES |= dict.fromkeys(
    ["002", "1290", "1510", "1687", "1729", "363", "511", "591", "748", "875"], (1000, 100)
)
OFFICIAL = {"Contributors": ["someone"], "Definition": ["Name the capital.", "A second wording."]}
OFFICIAL |= {"Categories": ["Question Answering"], "Domains": "Geography"}
OFFICIAL |= {
    "Positive Examples": [{"input": "Italy", "output": "Rome", "explanation": "Since 1871."}]
}
OFFICIAL |= {"Negative Examples": [{"input": "Italy", "output": 3}]}
OFFICIAL |= {
    "Instances": [
        {"id": "x1", "input": "France", "output": ["Paris"]},
        {"input": "Peru", "output": "Lima"},
    ]
}
OFFICIAL["Instances"] += [
    {"input": "a", "output": [""]}
]  # the published data has blank answers, which are kept
ITEM = {"id": "x", "input": "a", "output": "b"}
LINE = {
    "task": "capitals",
    "instruction": "Name the capital.",
    "input": "France",
    "output": "Paris",
}


def write_task(file: Path, instances: int, prefix: str = "x", definition: str = "Do it.") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    items = [
        {"id": f"{prefix}{i}", "input": f"{prefix} {i}", "output": [f"answer {i}"]}
        for i in range(instances)
    ]
    file.write_text(
        json.dumps({"Definition": [definition], "Positive Examples": [], "Instances": items})
    )


def write_lists(folder: Path, train: str, test: str) -> None:
    folder.mkdir(parents=True)
    (folder / "train_tasks.txt").write_text(train)
    (folder / "test_tasks.txt").write_text(test)


def sizes(tasks: list[Task]) -> dict:
    return {task.name: (len(task.train), len(task.validation), len(task.test)) for task in tasks}


@pytest.fixture
def sapt(tmp_path: Path) -> Path:
    for name in ("task363_sst2", "task002_quoref", "plain"):
        for split, count in {"train": 3, "dev": 2, "test": 2}.items():
            write_task(
                tmp_path / name / f"{split}.json", count, split, "" if name == "plain" else "Do it."
            )
    return tmp_path


def test_builtin_suite_and_selected_tasks():
    assert load_tasks("builtin") == builtin_tasks()
    assert [task.name for task in load_tasks("builtin", tasks=["which_day", "got_more"])] == [
        "which_day",
        "got_more",
    ]
    refuses("must be 'builtin'", load_tasks, Source("elsewhere", "builtin"))


def test_sapt_has_no_validation_set_and_reads_only_selected_tasks(sapt):
    tasks = load_tasks(sapt)
    assert list(sizes(tasks).items()) == [
        (name, (3, 0, 2)) for name in ("plain", "task002_quoref", "task363_sst2")
    ]
    assert (tasks[0].test[0].input, tasks[0].definition) == ("test 0", "")
    for wanted in ("task363_sst2", "task363", "363", "0363"):
        assert [task.name for task in load_tasks(sapt, tasks=[wanted, "plain"])] == [
            "task363_sst2",
            "plain",
        ]
    (weighted,) = load_sources([Source(sapt)], ["363"], weights={"plain": 2.0, "363": 3.0})
    assert (weighted.name, weighted.weight) == ("task363_sst2", 3.0), (
        "tasks with weights need not be selected"
    )
    (sapt / "plain" / "train.json").write_text("broken")
    assert len(load_tasks(sapt, tasks=["363"])) == 1
    assert "invalid JSON at line 1 column 1" in refusal(sapt)


def test_invalid_task_selections_are_refused(sapt):
    write_task(sapt / "task2_b" / "train.json", 2)
    for wanted, message in (
        (["task363_sst"], "unknown task 'task363_sst' (did you mean 'task363_sst2'"),
        (["36"], "unknown task '36'"),
        (["363", "task363"], "'task363_sst2' is listed twice"),
        ([], "the list is empty"),
        ("task363", "must be a list of names"),
        (["2"], "'2' matches 2 tasks"),
    ):
        assert message in refusal(sapt, tasks=wanted)


def test_superni_split_lists_and_the_default_of_100_test_instances(tmp_path):
    for name in ("task1_a", "task2_b", "task3_c"):
        write_task(tmp_path / "tasks" / f"{name}.json", 130)
    tasks = load_tasks(tmp_path)
    assert set(sizes(tasks).values()) == {(30, 0, 100)}
    assert (tasks[0].test[0].id, tasks[0].train[0].id) == ("x0", "x100")
    write_lists(tmp_path / "splits" / "mine", "task3_c", "task2_b")
    assert sizes(load_tasks(tmp_path)) == {"task2_b": (0, 0, 100), "task3_c": (130, 0, 0)}
    assert "130 training, 100 test" in repr(plan(data={"source": str(tmp_path)})), (
        "tasks score the model of others"
    )
    write_lists(tmp_path / "splits" / "more", "", "")
    assert "2 split lists and no 'default'" in refusal(tmp_path)
    write_lists(tmp_path / "splits" / "default", "task1_a\nmissing\n", "task2_b\n\n")
    for source in (tmp_path, tmp_path / "tasks"):
        assert sizes(load_tasks(source)) == {"task1_a": (130, 0, 0), "task2_b": (0, 0, 100)}
    (tmp_path / "splits" / "default" / "test_tasks.txt").write_text("task1_a")
    assert "'task1_a' is in both" in refusal(tmp_path)


@pytest.mark.parametrize(
    "option", [{"task": "one"}, {"columns": {"input": "text"}}, {"splits": {"dev": "test"}}]
)
def test_options_of_rows_are_refused_for_other_layouts(tmp_path, option):
    write_task(tmp_path / "task1_a.json", 130)
    for source in ("builtin", tmp_path):
        assert f"data.{next(iter(option))}: does not apply to {source}, " in refusal(
            Source(source, **option)
        )


def test_missing_sources_and_corrupt_tables_are_refused(tmp_path):
    assert "no tasks found" in refusal(tmp_path)
    assert refusal(write_rows(tmp_path / "empty.jsonl")).endswith("empty.jsonl: has no rows")
    (tmp_path / "empty.jsonl").unlink()
    assert "no tasks found; expected rows in files" in refusal(Source(tmp_path, "sapt"))
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "did you mean 'superni'" in refusal(Source(tmp_path, "supernu"))
    assert "\0" not in refusal(Path("a\0b"))
    table = tmp_path / "rows.parquet"
    table.write_bytes(b'input,output\n"a,b\x00\xff' * 3)
    assert refusal(table).startswith(f"{table}: ")


@pytest.mark.skipif(not SUPERNI, reason="BADIT_SUPERNI does not name a copy of the benchmark")
def test_published_superni_benchmark():
    tasks = load_tasks(str(SUPERNI))
    found = {task.name.removeprefix("task").split("_")[0]: task for task in tasks}
    assert {
        number: (len(task.train), len(task.test)) for number, task in found.items()
    } == SUPERNI_SIZES
    assert all(not task.validation and task.demonstrations and task.categories for task in tasks)
    assert {instance.outputs for instance in found["363"].test} == {("POS",), ("NEG",)}
    assert sum(len(instance.outputs) > 1 for instance in found["002"].test) == 17
    order = ["1572", "363", "1290", "181", "002"]
    assert load_tasks(str(SUPERNI), tasks=order) == [found[number] for number in order]


def test_official_superni_task_and_invalid_fields(tmp_path):
    (tmp_path / "capitals.json").write_text(json.dumps(OFFICIAL))
    (task,) = load_tasks(tmp_path)
    assert (task.name, task.definition) == ("capitals", "Name the capital.")
    assert (task.categories, task.domains, task.abilities) == (
        ("Question Answering",),
        ("Geography",),
        (),
    )
    assert task.demonstrations[0].explanation == "Since 1871."
    expected = {"x1": ("France", "Paris"), "capitals-1": ("Peru", "Lima"), "capitals-2": ("a", "")}
    assert task.test == tuple(
        Instance(id=key, input=text, outputs=(out,)) for key, (text, out) in expected.items()
    )
    for changes, message in (
        ({"Instances": []}, "Instances: list should have at least 1 item"),
        ({"Instances": [ITEM, {"id": "y", "output": "b"}]}, "Instances.1.input: field required"),
        (
            {"Instances": [{**ITEM, "output": []}]},
            "Instances.0.output: value should have at least 1 item",
        ),
        ({"Domains": None}, "Domains: must be a text or a list of texts"),
    ):
        (tmp_path / "capitals.json").write_text(json.dumps({**OFFICIAL, **changes}))
        assert refusal(tmp_path).startswith(f"{tmp_path}/capitals.json: {message}")


def test_jsonl_file_with_two_tasks(tmp_path):
    bare = {
        "task": "advice",
        "instruction": "Give advice.",
        "outputs": ["Rest.", ""],
        "split": "validation",
    }
    third = {**LINE, "id": "x", "input": "Peru\u2028!", "split": "test"}
    file = tmp_path / "all.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in (LINE, bare, third)]
    file.write_text("\r\n\r\n".join(lines), encoding="utf-8", newline="")
    advice, capitals = load_tasks(file)
    assert (advice.name, advice.definition) == ("advice", "Give advice.")
    assert advice.validation[0] == Instance(id="advice-0", input="", outputs=("Rest.", ""))
    assert [i.id for i in (*capitals.train, *capitals.test)] == ["capitals-0", "x"]
    assert capitals.test[0].input == "Peru\u2028!"
    assert load_tasks(Source(file, "jsonl"), tasks=["capitals"]) == [capitals]


def test_invalid_rows_are_refused_with_their_line_number(tmp_path):
    same = {**LINE, "id": "same"}
    for rows, message in (
        (
            [{**LINE, "output": " "}],
            "line 1: output: must hold at least one answer that is not blank",
        ),
        ([{**LINE, "output": {"text": "a"}}], "line 1: output: must be a text or a list of texts"),
        (
            [{**LINE, "outputs": ["a"]}],
            "line 1: output, outputs: a row has one of them; remove the other",
        ),
        (
            [{"task": "a", "instruction": "b"}],
            "line 1: unknown form of row: found task, instruction; name",
        ),
        ([{**LINE, "inptu": "x"}], "line 1: inptu: unknown key (did you mean 'input'?)"),
        (
            [{**LINE, "split": "later"}],
            "line 1: split: input should be 'train', 'validation' or 'test'",
        ),
        (
            [LINE, {**LINE, "instruction": "Other."}],
            "line 2: instruction: differs from other rows of task 'capitals'",
        ),
        ([{**LINE, "task": "../escape"}], "line 1: task: '../escape' cannot be a file name"),
        (
            [LINE, ["France", "Paris"]],
            "line 2: must be an object with keys, not ['France', 'Paris']",
        ),
        ([same, same], "task 'capitals': train: two instances have the id 'same'"),
        (
            [{"instruction": "a", "inptu": "b", "output": "c"}],
            "line 1: found 'inptu', did you mean 'input'?",
        ),
        ([{"messages": CHAT[:2]}], "line 1: messages: there is no assistant message"),
        (
            [{"messages": [CHAT[0], CHAT[2]]}],
            "line 1: messages.1: an assistant message must follow a user message",
        ),
        ([{"messages": "[]"}], "line 1: messages: must be a list of messages, not '[]'"),
        (
            [{"task": "a", "instrution": "b", "input": "c", "output": "d"}],
            "line 1: found 'instrution', did you mean",
        ),
        (
            [{"context": "b", "question": "c", "answer": "d"}],
            "line 1: context: not used in a row with question and an",
        ),
        (
            [{"instruction": "b", "system": "c", "output": "d"}],
            "line 1: system: not used in a row with instruction",
        ),
        (
            [{"messages": CHAT, "instruction": "b"}],
            "line 1: instruction: not used in a row with messages; remove it",
        ),
        ([{"messages": CHAT, "tools": ["f"]}], "line 1: tools: not used in a row with messages"),
        (
            [{"messages": [{**CHAT[0], "tool_calls": ["f"]}]}],
            "line 1: messages.0: must have a role and text as",
        ),
    ):
        file = write_rows(tmp_path / "rows.jsonl", *rows)
        assert refusal(file).startswith(f"{file}: {message}")
