"""Layouts of task data: the built-in suite, Super-NaturalInstructions, and several sources."""

import json
import os
from pathlib import Path

import pytest

from badit import plan
from badit.data import Instance, Source, Task, builtin_tasks, load_sources, load_tasks, quotas
from data.examples import HELLO, refusal, write_rows
from refusals import refuses

SUPERNI = os.environ.get("BADIT_SUPERNI")
LARGE = ["002", "1290", "1510", "1687", "1729", "363", "511", "591", "748", "875"]
# Training and test instances per task of the published release.
SUPERNI_SIZES = {
    "073": (975, 100),
    "1572": (160, 20),
    "1590": (126, 16),
    "181": (338, 43),
    "639": (142, 18),
    **dict.fromkeys(LARGE, (1000, 100)),
}
OFFICIAL = {
    "Contributors": ["someone"],
    "Definition": ["Name the capital.", "A second wording."],
    "Categories": ["Question Answering"],
    "Domains": "Geography",
    "Positive Examples": [{"input": "Italy", "output": "Rome", "explanation": "Since 1871."}],
    "Negative Examples": [{"input": "Italy", "output": 3}],
    "Instances": [
        {"id": "x1", "input": "France", "output": ["Paris"]},
        {"input": "Peru", "output": "Lima"},
        {"input": "a", "output": [""]},  # the published data has blank answers, which are kept
    ],
}
ITEM = {"id": "x", "input": "a", "output": "b"}


def write_task(file: Path, instances: int, prefix: str = "x", definition: str = "Do it.") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    items = [
        {"id": f"{prefix}{i}", "input": f"{prefix} {i}", "output": [f"answer {i}"]}
        for i in range(instances)
    ]
    task = {"Definition": [definition], "Positive Examples": [], "Instances": items}
    file.write_text(json.dumps(task))


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
            definition = "" if name == "plain" else f"Do it, {split}."
            write_task(tmp_path / name / f"{split}.json", count, split, definition)
    return tmp_path


def test_builtin_suite_and_selected_tasks():
    assert load_tasks("builtin") == load_tasks(Path("builtin")) == builtin_tasks()
    names = ["which_day", "got_more"]
    assert [task.name for task in load_tasks("builtin", tasks=names)] == names
    refuses("must be 'builtin'", load_tasks, Source("elsewhere", "builtin"))


def test_sapt_has_no_validation_set_and_reads_only_selected_tasks(sapt):
    tasks = load_tasks(sapt)
    assert [task.name for task in tasks] == ["plain", "task002_quoref", "task363_sst2"]
    assert set(sizes(tasks).values()) == {(3, 0, 2)}
    assert (tasks[0].test[0].input, tasks[0].definition) == ("test 0", "")
    assert (tasks[1].test[0].instruction, tasks[1].definition) == (None, "Do it, train.")
    for wanted in ("task363_sst2", "task363", "363", "0363"):
        selected = load_tasks(sapt, tasks=[wanted, "plain"])
        assert [task.name for task in selected] == ["task363_sst2", "plain"]
    (weighted,) = load_sources([Source(sapt)], ["363"], weights={"plain": 2.0, "363": 3.0})
    assert (weighted.name, weighted.weight) == ("task363_sst2", 3.0)
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
    # A task may score the model of others.
    assert "130 training, 100 test" in repr(plan(data={"source": str(tmp_path)}))
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
        message = refusal(Source(source, **option))
        assert f"data.{next(iter(option))}: does not apply to {source}, " in message


def test_missing_sources_are_refused(tmp_path):
    assert "no tasks found" in refusal(tmp_path)
    assert "no tasks found" in refusal(Source(tmp_path, "sapt"))
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "did you mean 'superni'" in refusal(Source(tmp_path, "supernu"))
    assert "\0" not in refusal(Path("a\0b"))


@pytest.mark.skipif(not SUPERNI, reason="BADIT_SUPERNI does not name a copy of the benchmark")
def test_published_superni_benchmark():
    tasks = load_tasks(str(SUPERNI))
    by_number = {task.name.removeprefix("task").split("_")[0]: task for task in tasks}
    counts = {number: (len(task.train), len(task.test)) for number, task in by_number.items()}
    assert counts == SUPERNI_SIZES
    assert all(not task.validation and task.demonstrations and task.categories for task in tasks)
    assert {instance.outputs for instance in by_number["363"].test} == {("POS",), ("NEG",)}
    assert sum(len(instance.outputs) > 1 for instance in by_number["002"].test) == 17
    order = ["1572", "363", "1290", "181", "002"]
    assert load_tasks(str(SUPERNI), tasks=order) == [by_number[number] for number in order]


def test_official_superni_task_and_invalid_fields(tmp_path):
    (tmp_path / "capitals.json").write_text(json.dumps(OFFICIAL))
    (task,) = load_tasks(tmp_path)
    assert (task.name, task.definition) == ("capitals", "Name the capital.")
    assert (task.categories, task.domains) == (("Question Answering",), ("Geography",))
    assert task.demonstrations[0].explanation == "Since 1871."
    assert task.test == (
        Instance(id="x1", input="France", outputs=("Paris",)),
        Instance(id="capitals-1", input="Peru", outputs=("Lima",)),
        Instance(id="capitals-2", input="a", outputs=("",)),
    )
    for changes, message in (
        ({"Instances": []}, "Instances: "),
        ({"Instances": [ITEM, {"id": "y", "output": "b"}]}, "Instances.1.input: "),
        ({"Instances": [{**ITEM, "output": []}]}, "Instances.0.output: "),
        ({"Domains": None}, "Domains: must be a text or a list of texts"),
    ):
        (tmp_path / "capitals.json").write_text(json.dumps({**OFFICIAL, **changes}))
        assert refusal(tmp_path).startswith(f"{tmp_path}/capitals.json: {message}")


def test_source_weights_set_the_mixture_and_conflicts_are_refused(tmp_path):
    a = write_rows(tmp_path / "a.csv", *[HELLO] * 30)
    b = write_rows(tmp_path / "b.csv", *[HELLO] * 10)
    tasks = load_sources([Source(b, weight=3.0), Source(a)], weights={"a": 2.0})
    assert [(task.name, task.weight) for task in tasks] == [("a", 2.0), ("b", 3.0)]
    assert quotas(tasks) == {"a": 27, "b": 13}
    assert [task.name for task in load_sources([Source(b), Source(a)], ["b"])] == ["b"]
    refuses("has task a of another source; set a new task", load_sources, [Source(a)] * 2)
    refuses(r"data.weights: unknown task 'c'", load_sources, [Source(a)], weights={"c": 2.0})
