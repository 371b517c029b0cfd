from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from badit.data.schema import task_from_superni
from pydantic import ValidationError

from badit.data import Instance, Task
from badit.errors import BaditError
from data.examples import make_task

FILE = Path("capitals.json")


def record(**changes):
    return {
        "Contributors": ["someone"],
        "Definition": ["Name the capital.", "A second wording."],
        "Categories": ["Question Answering"],
        "Domains": "Geography",
        "Positive Examples": [{"input": "Italy", "output": "Rome", "explanation": "Since 1871."}],
        "Negative Examples": [{"input": "Italy", "output": 3}],
        "Instances": [{"id": "x1", "input": "France", "output": ["Paris"]}, {"input": "Peru", "output": "Lima"}],
        **changes,
    }


def read(changes=None, split="train"):
    return task_from_superni(record(**(changes or {})), name="capitals", split=split, file=FILE)


def refusal(changes) -> str:
    with pytest.raises(BaditError) as caught:
        read(changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_official_record():
    task = read()
    assert task.definition == "Name the capital."
    assert (task.categories, task.domains, task.abilities) == (("Question Answering",), ("Geography",), ())
    assert task.demonstrations[0].explanation == "Since 1871."
    assert task.train[0] == Instance(id="x1", input="France", outputs=("Paris",))
    assert task.train[1] == Instance(id="capitals-1", input="Peru", outputs=("Lima",))
    assert (task.validation, task.test) == ((), ())
    assert read(split="test").test == task.train


def test_models_are_frozen():
    with pytest.raises(ValidationError):
        make_task().name = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Instances": []}, "capitals.json: field 'Instances': must be a list of at least one instance"),
        ({"Instances": {"a": 1}}, "capitals.json: field 'Instances': must be a list of at least one instance"),
        ({"Instances": ["France"]}, "capitals.json: instance 0: input should be"),
        ({"Instances": [{"input": "France"}]}, "capitals.json: instance 0: field 'output': field required"),
        (
            {"Instances": [{"id": "x", "input": "a", "output": "b"}, {"id": "y", "output": "b"}]},
            "capitals.json: instance 1 (id 'y'): field 'input': field required",
        ),
        (
            {"Instances": [{"id": "x", "input": "a", "output": []}]},
            "capitals.json: instance 0 (id 'x'): field 'output': must hold at least one answer",
        ),
        (
            {"Instances": [{"id": "x", "input": "a", "output": ["b", 3]}]},
            "capitals.json: instance 0 (id 'x'): field 'output': must be a string or a list of strings",
        ),
        (
            {"Instances": [{"id": 7, "input": "a", "output": "b"}]},
            "capitals.json: instance 0: field 'id': input should be",
        ),
        (
            {"Instances": [{"id": "x", "input": "a", "output": "b"}] * 2},
            "capitals.json: field 'Instances': two instances have the id 'x'; give each its own",
        ),
        ({"Definition": 3}, "capitals.json: field 'Definition': must be a string or a list of strings"),
        ({"Definition": []}, "capitals.json: field 'Definition': must hold at least one string"),
        ({"Domains": None}, "capitals.json: field 'Domains': must be a string or a list of strings"),
        (
            {"Positive Examples": [{"input": "a"}]},
            "capitals.json: field 'Positive Examples': 0: output: field required",
        ),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    assert refusal(changes).startswith(message)


def test_a_record_without_a_definition():
    incomplete = record()
    del incomplete["Definition"]
    with pytest.raises(BaditError, match="field 'Definition': field required"):
        task_from_superni(incomplete, name="capitals", split="train", file=FILE)


def test_a_blank_answer_of_the_published_data_is_kept():
    assert read({"Instances": [{"input": "a", "output": [""]}]}).train[0].outputs == ("",)


@pytest.mark.parametrize(
    "name", ["", " ", ".hidden", "a/b", "a\\b", "a\nb", "a\x7fb", "a\u2028b", "x" * 121, "語" * 81]
)
def test_names_that_cannot_be_file_names_are_refused(name):
    with pytest.raises(BaditError, match="field 'name'") as caught:
        task_from_superni(record(), name=name, split="train", file=FILE)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["x" * 120, "語" * 80, "task 1 (new)", "a..b"])
def test_other_names_are_fine(name):
    assert Task(name=name, definition="d").name == name


def test_importing_the_room_is_cheap():
    code = (
        "import sys, badit.data as d; print([m for m in ('torch', 'transformers') if m in sys.modules], d.load_tasks)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("[] ")


def test_an_unknown_attribute_of_the_room():
    import badit.data

    with pytest.raises(AttributeError, match="no_such_thing"):
        badit.data.no_such_thing  # noqa: B018
