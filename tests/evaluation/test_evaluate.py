"""Scoring a model on tasks, and the files of its answers."""

from __future__ import annotations

import pytest

from badit.data import Instance, Task
from badit.errors import BaditError
from badit.evaluate import evaluate, read_predictions, score_model, write_predictions
from badit.metrics import Prediction, group_by_task, instance_scores, mean_scores
from badit.recipe import build_recipe

RECIPE = build_recipe({"evaluation": {"max_new_tokens": 4, "batch_size": 2}, "prompt": {"chat_template": "never"}})


def tasks_of(*answers):
    """Two tasks, of three instances and one, with these references."""
    instances = [
        Instance(id=f"i{i}", input=text, outputs=("zzz", answer))
        for i, (text, answer) in enumerate(zip(["w5 w6 w7", "w9", "w3 w3 w3 w3 w90", "w77 w8"], answers, strict=True))
    ]
    right = Task(name="right", definition="w1", test=tuple(instances[:3]), validation=tuple(instances[:1]))
    return [right, Task(name="wrong", definition="w1", test=tuple(instances[3:]))]


def test_scores_and_predictions_belong_to_their_instances(model, tokenizer):
    _, answers = score_model(model, tokenizer, RECIPE, tasks_of(*"abcd"), "test", progress=False)
    own = [answer.prediction for answer in answers]
    tasks = tasks_of(*own[:3], "d")
    scores, predictions = score_model(model, tokenizer, RECIPE, tasks, "test", progress=False)
    assert scores["tasks"]["right"] == {"rouge_l": 100.0, "exact_match": 100.0, "instances": 3}
    assert scores["tasks"]["wrong"] == {"rouge_l": 0.0, "exact_match": 0.0, "instances": 1}
    assert (scores["rouge_l"], scores["rouge_l_instances"]) == (50.0, 75.0)
    ids = [(p.task, p.instance_id) for p in predictions]
    assert ids == [("right", "i0"), ("right", "i1"), ("right", "i2"), ("wrong", "i3")]
    for prediction, instance in zip(predictions, [i for task in tasks for i in task.test], strict=True):
        assert instance.input in prediction.prompt
        assert prediction.references == instance.outputs
    _, predictions = score_model(model, tokenizer, RECIPE, tasks[:1], "validation", progress=False)
    assert [p.instance_id for p in predictions] == ["i0"]


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(BaditError, match=r"none of test, validation \(did you mean 'test'\?\)"):
        evaluate(tmp_path, split="tests")  # pyright: ignore[reportArgumentType]


AWKWARD = [
    Prediction("task b", "1", 'line\nbreak \u2028 and "quotes"', ("ü", "中"), "p\r\n"),
    Prediction("a", "2", "", ("x",), ""),
    Prediction("task b", "0", "y", ("x",), "p"),
]


def test_predictions_survive_the_files(tmp_path):
    write_predictions(tmp_path / "new" / "folder", AWKWARD)
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["a.jsonl", "task b.jsonl"]
    again = read_predictions(tmp_path / "new" / "folder")
    assert again == [AWKWARD[1], AWKWARD[0], AWKWARD[2]]
    scores = (mean_scores(instance_scores(group_by_task(predictions))) for predictions in (again, AWKWARD))
    assert next(scores) == next(scores)


def test_an_interrupted_write_leaves_the_former_file(tmp_path, monkeypatch):
    write_predictions(tmp_path, AWKWARD)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_predictions(tmp_path, [Prediction("task b", "9", "", ("x",), "")])
    assert len(read_predictions(tmp_path)) == 3


@pytest.mark.parametrize("name", ["", " ", "../up", "a/b", "a\\b", ".hidden", "new\nline"])
def test_a_task_name_never_leaves_the_folder(tmp_path, name):
    with pytest.raises(BaditError, match="cannot be a file name"):
        write_predictions(tmp_path / "inside", [Prediction(name, "1", "", ("x",), "")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["{", "[]", '{"task": "a"}', '{"references": [], "surplus": 1}'])
def test_a_bad_line_is_named(tmp_path, line):
    write_predictions(tmp_path, AWKWARD[1:2])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(BaditError, match=r"a\.jsonl: (line 2: .*evaluate again|invalid JSON at line 2)"):
        read_predictions(tmp_path)
    with pytest.raises(BaditError, match=r"no \.jsonl files"):
        read_predictions(tmp_path / "empty")
