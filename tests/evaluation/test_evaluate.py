from dataclasses import dataclass

import pytest

from badit.errors import BaditError
from badit.evaluation.evaluate import evaluate_tasks, group_by_task, read_predictions, write_predictions
from badit.generation import generate_answers
from badit.metrics import Prediction, score_tasks


@dataclass(frozen=True)
class FakeInstance:
    id: str
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class FakeTask:
    name: str
    test: tuple[FakeInstance, ...] = ()
    validation: tuple[FakeInstance, ...] = ()


def evaluate(model, tokenizer, tasks, **options):
    return evaluate_tasks(
        model,
        tokenizer,
        tasks,
        encode_prompt=lambda task, instance: tokenizer(instance.input)["input_ids"],
        max_new_tokens=4,
        progress=False,
        **options,
    )


@pytest.fixture
def tasks(model, tokenizer):
    """Two tasks; the model's own answers are the references of the first, so that its scores are known."""
    inputs = ["w5 w6 w7", "w9", "w3 w3 w3 w3 w90", "w77 w8"]
    own = generate_answers(model, tokenizer, [tokenizer(text)["input_ids"] for text in inputs], max_new_tokens=4)
    right = tuple(FakeInstance(f"r{i}", inputs[i], ("zzz", own[i])) for i in range(3))
    return [
        FakeTask("right", test=right, validation=right[:1]),
        FakeTask("wrong", (FakeInstance("x", inputs[3], ("zzz",)),)),
    ]


def test_scores_and_predictions_belong_to_their_instances(model, tokenizer, tasks):
    scores, predictions = evaluate(model, tokenizer, tasks, batch_size=2)
    assert scores["tasks"]["right"] == {"rouge_l": 100.0, "exact_match": 100.0, "instances": 3}
    assert scores["tasks"]["wrong"] == {"rouge_l": 0.0, "exact_match": 0.0, "instances": 1}
    assert scores["rouge_l"] == 50.0
    assert scores["rouge_l_instances"] == 75.0
    assert [(p.task, p.instance_id) for p in predictions] == [
        ("right", "r0"),
        ("right", "r1"),
        ("right", "r2"),
        ("wrong", "x"),
    ]
    assert [p.prompt for p in predictions] == [instance.input for task in tasks for instance in task.test]
    assert predictions[2].prediction == predictions[2].references[1]


def test_the_split_decides_which_instances_are_used(model, tokenizer, tasks):
    _, predictions = evaluate(model, tokenizer, tasks[:1], split="validation")
    assert [p.instance_id for p in predictions] == ["r0"]


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (lambda tasks: tasks, "tests", "did you mean 'test'"),
        (lambda tasks: tasks, "validation", "wrong: has no validation instances"),
        (lambda tasks: [*tasks, tasks[0]], "test", "right is given more than once"),
    ],
)
def test_refuses_tasks_that_cannot_be_evaluated(model, tokenizer, tasks, change, split, message):
    with pytest.raises(BaditError, match=message):
        evaluate(model, tokenizer, change(tasks), split=split)


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
    assert score_tasks(group_by_task(again)) == score_tasks(group_by_task(AWKWARD))


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


def test_an_empty_folder_has_no_predictions(tmp_path):
    with pytest.raises(BaditError, match=r"no \.jsonl files"):
        read_predictions(tmp_path)
