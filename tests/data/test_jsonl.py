from __future__ import annotations

import json

import pytest

from badit.data import load_tasks
from badit.errors import BaditError


def write(file, *records, end="\n"):
    file.write_text(
        end.join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8", newline=""
    )
    return file


def line(**changes):
    return {"task": "capitals", "instruction": "Name the capital.", "input": "France", "output": "Paris", **changes}


def test_a_file_of_two_tasks(tmp_path):
    bare = {"task": "advice", "instruction": "Give advice.", "outputs": ["Rest.", ""], "split": "validation"}
    file = write(tmp_path / "all.jsonl", line(), bare, line(id="x", input="Peru\u2028!", split="test"), end="\r\n\r\n")
    advice, capitals = load_tasks(file)
    assert (advice.name, advice.definition) == ("advice", "Give advice.")
    assert advice.validation[0].model_dump() == {"id": "advice-0", "input": "", "outputs": ("Rest.", "")}
    assert [i.id for i in capitals.train + capitals.test] == ["capitals-0", "x"]
    assert capitals.test[0].input == "Peru\u2028!"
    assert load_tasks(file, tasks=["capitals"], format="jsonl") == [capitals]


def test_a_folder_whose_files_are_the_splits(tmp_path):
    write(tmp_path / "train.jsonl", line(), line())
    write(tmp_path / "test.jsonl", line(split="test"))
    (task,) = load_tasks(tmp_path)
    assert [i.id for i in task.train + task.test] == ["capitals-0", "capitals-1", "capitals-2"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (line(output=""), "line 2: field 'output': must hold at least one answer that is not blank"),
        (line(output=[]), "line 2: field 'output': must hold at least one answer"),
        (line(output=3), "line 2: field 'output': must be a string or a list of strings"),
        ({"task": "a", "instruction": "b"}, "line 2: field 'output': field required"),
        ({"instruction": "b", "output": "c"}, "line 2: field 'task': field required"),
        (line(outputs=["Paris"]), "line 2: field 'outputs': "),
        (line(inptu="x"), "line 2: field 'inptu': extra inputs are not permitted (did you mean 'input'?)"),
        (line(split="dev"), "line 2: field 'split': input should be 'train', 'validation' or 'test'"),
        (line(instruction="Name a city."), "line 2: field 'instruction': task 'capitals' has another one above"),
        (line(task="../escape"), "line 2: field 'task': '../escape' cannot be a file name"),
        (["France", "Paris"], "line 2: input should be a valid dictionary"),
        (line(id="same"), "task 'capitals': split 'train': two instances have the id 'same'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, record, message):
    file = write(tmp_path / "all.jsonl", line(id="same"), record)
    with pytest.raises(BaditError) as caught:
        load_tasks(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_a_split_against_the_files_name_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", line(split="test"))
    with pytest.raises(BaditError, match="field 'split': the file's name says 'train'"):
        load_tasks(tmp_path)


def test_invalid_json_is_named_by_its_line_in_the_file(tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_text(json.dumps(line()) + "\n\n" + '{"task": }\n')
    with pytest.raises(BaditError, match="invalid JSON at line 3 column 10"):
        load_tasks(file)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(BaditError, match="holds no tasks"):
        load_tasks(write(tmp_path / "all.jsonl"))
