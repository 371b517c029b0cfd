from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from badit.data import builtin_tasks, load_tasks
from badit.errors import BaditError

SUPERNI = os.environ.get("BADIT_SUPERNI")
# Training and test instances per task of the published release.
SUPERNI_SIZES = {
    "002": (1000, 100), "073": (975, 100), "1290": (1000, 100), "1510": (1000, 100), "1572": (160, 20),
    "1590": (126, 16), "1687": (1000, 100), "1729": (1000, 100), "181": (338, 43), "363": (1000, 100),
    "511": (1000, 100), "591": (1000, 100), "639": (142, 18), "748": (1000, 100), "875": (1000, 100),
}  # fmt: skip


def write_task(file: Path, instances: int, prefix: str = "x") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    items = [{"id": f"{prefix}{i}", "input": f"{prefix} {i}", "output": [f"answer {i}"]} for i in range(instances)]
    file.write_text(json.dumps({"Definition": ["Do it."], "Positive Examples": [], "Instances": items}))


def sizes(tasks):
    return {task.name: (len(task.train), len(task.validation), len(task.test)) for task in tasks}


@pytest.fixture
def sapt(tmp_path):
    for name in ("task363_sst2", "task002_quoref", "task073_csqa", "plain"):
        write_task(tmp_path / name / "train.json", 3, "train")
        write_task(tmp_path / name / "dev.json", 2, "test")
        write_task(tmp_path / name / "test.json", 2, "test")
    return tmp_path


@pytest.fixture
def official(tmp_path):
    for name in ("task1_a", "task2_b", "task3_c"):
        write_task(tmp_path / "tasks" / f"{name}.json", 130)
    return tmp_path


def write_lists(folder: Path, train: str, test: str) -> None:
    folder.mkdir(parents=True)
    (folder / "train_tasks.txt").write_text(train)
    (folder / "test_tasks.txt").write_text(test)


def test_the_builtin_suite():
    assert load_tasks("builtin") == builtin_tasks()
    assert [task.name for task in load_tasks("builtin", tasks=["which_day", "got_more"])] == ["which_day", "got_more"]
    with pytest.raises(BaditError, match="must be 'builtin'"):
        load_tasks("elsewhere", format="builtin")


def test_sapt_leaves_the_validation_empty(sapt):
    tasks = load_tasks(sapt)
    assert sizes(tasks) == dict.fromkeys(sorted(["plain", "task002_quoref", "task073_csqa", "task363_sst2"]), (3, 0, 2))
    assert [task.name for task in tasks] == sorted(task.name for task in tasks)
    assert tasks[0].test[0].input == "test 0"


@pytest.mark.parametrize("wanted", ["task363_sst2", "task363", "363", "0363"])
def test_a_task_by_name_or_number(sapt, wanted):
    assert [task.name for task in load_tasks(sapt, tasks=[wanted, "plain"])] == ["task363_sst2", "plain"]


@pytest.mark.parametrize("wanted", ["task002", "002", "2"])
def test_leading_zeros_do_not_matter(sapt, wanted):
    assert load_tasks(sapt, tasks=[wanted])[0].name == "task002_quoref"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["task363_sst"], "unknown task 'task363_sst' .did you mean 'task363_sst2'"),
        (["36"], "unknown task '36'"),
        (["plain", "plain"], "'plain' is named twice"),
        (["363", "task363"], "'task363_sst2' is named twice"),
        ([], "the list is empty"),
        ("task363", "must be a list of names"),
    ],
)
def test_wrong_selections_are_refused(sapt, wanted, message):
    with pytest.raises(BaditError, match=message):
        load_tasks(sapt, tasks=wanted)


def test_an_ambiguous_number_is_refused(tmp_path):
    for name in ("task7_a", "task007_b"):
        write_task(tmp_path / f"{name}.json", 2)
    with pytest.raises(BaditError, match="'7' fits 2 tasks"):
        load_tasks(tmp_path, tasks=["7"])


def test_only_the_selected_files_are_read(sapt):
    (sapt / "plain" / "train.json").write_text("broken")
    assert len(load_tasks(sapt, tasks=["363"])) == 1
    with pytest.raises(BaditError, match="invalid JSON at line 1 column 1"):
        load_tasks(sapt)


def test_a_missing_test_file_is_named(sapt):
    (sapt / "plain" / "test.json").unlink()
    with pytest.raises(BaditError, match=r"plain.test\.json: cannot be read \(No such file"):
        load_tasks(sapt)


@pytest.mark.parametrize("source", [".", "tasks"])
def test_the_official_lists_decide(official, source):
    write_lists(official / "splits" / "default", "task1_a\nmissing\n", "task2_b\n\n")
    write_lists(official / "splits" / "xlingual", "task3_c\n", "")
    assert sizes(load_tasks(official / source)) == {"task1_a": (130, 0, 0), "task2_b": (0, 0, 100)}


def test_the_only_list_needs_no_special_name(official):
    write_lists(official / "splits" / "mine", "task3_c", "task2_b")
    assert sizes(load_tasks(official)) == {"task2_b": (0, 0, 100), "task3_c": (130, 0, 0)}


def test_several_lists_without_a_default_are_refused(official):
    write_lists(official / "splits" / "one", "", "")
    write_lists(official / "splits" / "two", "", "")
    with pytest.raises(BaditError, match="2 split lists and no 'default'"):
        load_tasks(official)


def test_a_task_in_both_lists_is_refused(official):
    write_lists(official / "splits" / "default", "task1_a", "task1_a")
    with pytest.raises(BaditError, match="'task1_a' is in both"):
        load_tasks(official)


def test_without_lists_the_first_hundred_are_the_test_set(official):
    tasks = load_tasks(official)
    assert set(sizes(tasks).values()) == {(30, 0, 100)}
    assert (tasks[0].test[0].id, tasks[0].train[0].id) == ("x0", "x100")


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(BaditError, match="no tasks found"):
        load_tasks(tmp_path)
    with pytest.raises(BaditError, match="holds no tasks"):
        load_tasks(tmp_path, format="sapt")
    with pytest.raises(BaditError, match="no such file or folder"):
        load_tasks(tmp_path / "nowhere")
    with pytest.raises(BaditError, match="did you mean 'superni'"):
        load_tasks(tmp_path, format="supernu")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not SUPERNI, reason="BADIT_SUPERNI does not name a copy of the benchmark")
def test_the_published_benchmark():
    tasks = load_tasks(str(SUPERNI))
    found = {task.name.removeprefix("task").split("_")[0]: task for task in tasks}
    assert {number: (len(task.train), len(task.test)) for number, task in found.items()} == SUPERNI_SIZES
    assert all(not task.validation and task.demonstrations and task.categories for task in tasks)
    assert {instance.outputs for instance in found["875"].test} <= {
        (feeling,) for feeling in ("joy", "love", "anger", "fear", "surprise", "sadness")
    }
    assert {instance.outputs for instance in found["363"].test} == {("POS",), ("NEG",)}
    assert {instance.outputs for instance in found["1687"].test} == {("positive",), ("negative",)}
    assert sum(len(instance.outputs) > 1 for instance in found["002"].test) == 17
    assert sum(len(instance.outputs) > 1 for instance in found["748"].test) == 23
    order = ["1572", "363", "1290", "181", "002"]
    assert load_tasks(str(SUPERNI), tasks=order) == [found[number] for number in order]
