"""Files of rows: every format, CSV, and the splits and tasks that their names stand for."""

from pathlib import Path

import pytest

from badit.data import Instance, Source, load_sources, load_tasks
from data.examples import HELLO, ROWS, refusal, task_of, write_rows
from refusals import refuses


def sizes(task):
    return len(task.train), len(task.validation), len(task.test)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow", "json", "jsonl", "saved"])
def test_same_rows_give_the_same_tasks_in_every_format(tmp_path, suffix):
    capitals, sums = load_tasks(write_rows(tmp_path / f"rows [1].{suffix}", *ROWS))
    assert (capitals.name, capitals.definition) == ("capitals", "Name the capital.")
    assert capitals.train == (
        Instance(id="capitals-0", input="France", outputs=("Paris",)),
        Instance(id="capitals-1", input='Peru, "the" one', outputs=("Lima",)),
    )
    assert sums.train[0].outputs == ("2",)


def test_csv_values_stay_text(tmp_path):
    file = tmp_path / "codes.csv"
    file.write_text("\ufeffinput,output,split\n007,NA,train\nnull,1e3,dev\n", encoding="utf-8")
    task = task_of(file)
    assert (task.name, task.definition) == ("codes", None)
    assert (task.train[0].input, task.train[0].outputs) == ("007", ("NA",))
    assert (task.validation[0].input, task.validation[0].outputs) == ("null", ("1e3",))
    file.write_text("input;output\nGreat food, really;positive\n")
    assert task_of(file).train[0].input == "Great food, really"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "input,output\nGreat, really,good\n", "row 1 has more values than the first li"),
        ("a.csv", "input,output,input\na,b,c\n", "column 'input' occurs 2 times; rename or remove"),
        (
            "a.csv",
            'input,output\n"Great,good\nBad,poor\n',
            "after line 1: unexpected end of data; ",
        ),
        (
            "a.tsv",
            'input\toutput\n"Bad\tpoor\na 5"\tgood\n',
            "row 1 has a tab within quotes; write",
        ),
        ("a.tsv", "Task\tinput\toutput\na\tb\tc\n", "row 1: found 'Task', did you mean 'task'?"),
        (
            "a.csv",
            "question,answer,splits\na,b,c\n",
            "row 1: found 'splits', did you mean 'split'?",
        ),
        ("a.csv", "question,answer,tasks\na,b,c\n", "row 1: found 'tasks', did you mean 'task'?"),
        ("a.jsonl", "", "has no rows"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    assert refusal(file).startswith(f"{file}: {message}")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("damage", ["text", "truncated", "data"])
def test_corrupt_tables_are_refused_in_one_line(tmp_path, command, suffix, damage):
    file = write_rows(tmp_path / f"rows.{suffix}", *[HELLO] * 100)
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        {
            "text": b'input,output\n"a,b\x00\xff' * 3,
            "truncated": content[:middle],
            "data": content[:8] + b"\xff" * middle + content[8 + middle :],
        }[damage]
    )
    assert f"{file}: cannot be read (" in command("tasks", file, code=2)


@pytest.mark.parametrize(
    "name", ["a::b.parquet", "a::b.arrow", "zip::c.parquet", "50%20 {x}.arrow"]
)
def test_names_of_tables_are_not_interpreted(tmp_path, name):
    file = write_rows(tmp_path / f"plain{Path(name).suffix}", HELLO).rename(tmp_path / name)
    assert task_of(file).train[0].outputs == ("hello",)


def test_files_of_one_name_are_refused_and_links_have_their_own(tmp_path):
    for folder in ("de", "fr", "train"):
        write_rows(tmp_path / folder / "items.csv", HELLO)
    assert "task 'items' is also in" in refusal(f"{tmp_path}/*/items.csv")
    assert len(task_of(f"{tmp_path}/*/items.csv", task="items").train) == 3
    (tmp_path / "links").mkdir()
    for split, folder in {"train": "de", "test": "fr"}.items():
        (tmp_path / "links" / f"{split}.csv").symlink_to(tmp_path / folder / "items.csv")
    task = task_of(tmp_path / "links")
    assert (task.name, sizes(task)) == ("links", (1, 0, 1))
    sources = [Source(tmp_path / "de" / "items.csv"), Source(tmp_path / "links" / "test.csv")]
    refuses(r"test.csv is named after a split, not a task; give the folder", load_sources, sources)


def test_file_names_in_a_folder_or_glob_set_splits_and_tasks(tmp_path):
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002-a09b.parquet"]
    for name in (*names, "Val.csv", "test.jsonl"):
        write_rows(tmp_path / name, HELLO)
    task = task_of(tmp_path)
    assert (task.name, sizes(task)) == (tmp_path.name, (2, 1, 1))
    ids = [instance.id for split in (task.train, task.validation, task.test) for instance in split]
    assert ids == [f"{tmp_path.name}-{number}" for number in range(4)]

    write_rows(tmp_path / "greeting.csv", HELLO)
    assert [task.name for task in load_tasks(tmp_path)] == sorted(["greeting", tmp_path.name])
    assert [task.name for task in load_tasks(f"{tmp_path}/gree*.csv")] == ["greeting"]
    assert "no tasks found" in refusal(tmp_path / "none*.csv")
    write_rows(tmp_path / "test.jsonl", {**HELLO, "split": "train"})
    assert "test.jsonl: line 1: split: must be 'test', as in the file's name" in refusal(tmp_path)
