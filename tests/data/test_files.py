"""Whatever is in a file, reading it gives tasks or one line that names the file."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from badit.data import Task, load_tasks
from badit.errors import BaditError
from fuzz.damage import endless_file, pipe_in_its_place

GOOD = json.dumps({"Definition": ["Do."], "Instances": [{"id": "x", "input": "a", "output": ["b"]}]}).encode()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
# Values under the names that the readers look at reach further than values under random ones.
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "Definition": JSON,
        "Categories": JSON,
        "Positive Examples": JSON | st.lists(st.fixed_dictionaries({"input": JSON, "output": JSON}), max_size=2),
        "Instances": JSON | st.lists(st.fixed_dictionaries({"input": JSON, "output": JSON, "id": JSON}), max_size=3),
        "task": JSON,
        "instruction": JSON,
        "output": JSON,
    },
)


def refusal(file) -> str:
    with pytest.raises(BaditError) as caught:
        load_tasks(file.parent if file.suffix == ".json" else file)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert file.name in message
    return message


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (GOOD[:-20] + b"\xc3", "not UTF-8 at byte"),
        (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
        (GOOD[:-1], "invalid JSON at line 1 column"),
        (b'{"Definition": NaN}', "NaN is not JSON"),
        (b'{"Definition": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"1" * 10_000, "a number is too long"),
        (GOOD.replace(b'"a"', b'"\\uD83D"'), "half a surrogate pair"),
        (
            GOOD.replace(b'"Definition"', b'"Instances": 1, "Definition"'),
            "the key 'Instances' is there twice; keep one (line 1 on)",
        ),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' is there twice"),
    ],
)
def test_what_is_not_json(tmp_path, suffix, content, message):
    file = tmp_path / f"task1_a{suffix}"
    file.write_bytes(content)
    assert message in refusal(file)


@pytest.mark.parametrize(("content", "kind"), [(b"[]", "list"), (b'"a"', "str"), (b"null", "NoneType"), (b"1", "int")])
def test_the_wrong_type_at_the_top(tmp_path, content, kind):
    file = tmp_path / "task1_a.json"
    file.write_bytes(content)
    assert f"must hold one JSON object, not a {kind}" in refusal(file)


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    (tmp_path / "task1_a.json").write_bytes(GOOD.replace(b'"a"', b'"\\ud83d\\ude00"'))
    assert load_tasks(tmp_path)[0].test[0].input == "😀"


def test_an_empty_file(tmp_path):
    file = tmp_path / "task1_a.json"
    file.write_bytes(b"")
    assert "invalid JSON at line 1 column 1" in refusal(file)


def test_a_folder_in_place_of_a_file(tmp_path):
    file = tmp_path / "task1_a.json"
    file.mkdir()
    assert "cannot be read" in refusal(file)


@pytest.mark.parametrize("replace", [pipe_in_its_place, endless_file])
def test_a_file_that_never_ends(tmp_path, replace):
    file = tmp_path / "task1_a.json"
    replace(file)
    assert "cannot be read (a pipe or a device)" in refusal(file)


def test_a_path_that_no_system_allows():
    with pytest.raises(BaditError) as caught:
        load_tasks("a\0b")
    assert "\0" not in str(caught.value)


def test_a_line_break_in_a_files_name_stays_out_of_the_message(tmp_path):
    folder = tmp_path / "two\nlines"
    folder.mkdir()
    (folder / "task1_a.json").write_text("broken")
    with pytest.raises(BaditError) as caught:
        load_tasks(folder)
    assert "\n" not in str(caught.value)


def outcome(source) -> list[Task] | str:
    try:
        return load_tasks(source)
    except BaditError as error:
        return str(error)


def is_one_line_about(result, file) -> bool:
    return isinstance(result, str) and len(result.splitlines()) == 1 and file.name in result


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | (JSON | RECORDS).map(lambda value: json.dumps(value).encode()))
def test_any_content_gives_tasks_or_one_line(tmp_path, suffix, content):
    file = tmp_path / f"task1_a{suffix}"
    file.write_bytes(content)
    result = outcome(tmp_path if suffix == ".json" else file)
    if isinstance(result, list):
        assert all(instance.outputs for task in result for instance in task.train + task.validation + task.test)
    else:
        assert is_one_line_about(result, file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_one_wrong_byte_gives_tasks_or_one_line(tmp_path, position, byte):
    file = tmp_path / "task1_a.json"
    file.write_bytes(GOOD[:position] + bytes([byte]) + GOOD[position + 1 :])
    result = outcome(tmp_path)
    if isinstance(result, list):
        assert [task.name for task in result] == ["task1_a"]
    else:
        assert is_one_line_about(result, file)
