"""Encoded examples: the cache of large data, batches, and the command that shows them."""

import pytest
import torch

from badit.data import AnswerCollator, batches_by_task, encode_examples, encode_tasks, load_tasks
from data.examples import CHATML, ROWS, make_tokenizer, write_rows

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1, "task": "a"},
    {"input_ids": [8], "labels": [8], "prompt_length": 0, "task": "b"},
]
LONG = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}
PADDED = {
    "right": {"input_ids": [8, 9, 9], "attention_mask": [1, 0, 0], "labels": [8, -100, -100]},
    "left": {"input_ids": [9, 9, 8], "attention_mask": [0, 0, 1], "labels": [-100, -100, 8]},
}


def without(example, key):
    return {name: value for name, value in example.items() if name != key}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("key", ["labels", "prompt_length"])
def test_labels_are_given_or_those_after_the_prompt(side, key):
    batch = AnswerCollator(9, side)([without(example, key) for example in EXAMPLES])
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    rows = [{name: tensor[i].tolist() for name, tensor in batch.items()} for i in (0, 1)]
    assert rows == [LONG, PADDED[side]]
    assert "labels" not in AnswerCollator(9)([{"input_ids": [5]}])


def test_batches_have_one_task_each():
    examples = [*EXAMPLES, *EXAMPLES, EXAMPLES[0]]
    batches = batches_by_task(examples, AnswerCollator(0, with_tasks=True), 2)
    names = {task: [batch["tasks"] for batch in group] for task, group in batches.items()}
    assert names == {"a": [["a", "a"], ["a"]], "b": [["b", "b"]]}


def test_large_data_is_parsed_and_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BADIT_CACHE", str(tmp_path / "cache"))
    rows = [{**ROWS[i % 2 * 2], "input": f"country {i}"} for i in range(50)]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    small = load_tasks(path)
    for name, value in {
        "records._LARGE": 1,
        "records._ROWS_PER_BATCH": 7,
        "examples._LARGE": 1,
        "examples._EXAMPLES_PER_BATCH": 7,
    }.items():
        monkeypatch.setattr(f"badit.data.{name}", value)
    tasks = load_tasks(path)
    assert tasks == small
    assert [task.fingerprint for task in tasks] == [task.fingerprint for task in small]
    inputs = [instance.input for instance in tasks[1].train[-1:2:-9]]
    assert inputs == ["country 49", "country 31", "country 13"]

    tokenizer = make_tokenizer(chat_template=CHATML)
    options = {"max_answer_tokens": 5}
    order = [*reversed(range(50))]
    examples = encode_tasks(tokenizer, tasks, options, order)
    pairs = [(task, instance) for task in small for instance in task.train]
    expected = encode_examples(tokenizer, [pairs[i] for i in order], **options)
    assert list(examples) == [examples[i] for i in range(50)]
    assert list(examples) == [without(example, "labels") for example in expected]
    batch, expected_batch = (AnswerCollator(0)(list(rows)) for rows in (examples, expected))
    assert torch.equal(batch["labels"], expected_batch["labels"])
    assert examples.lengths == [len(example["input_ids"]) for example in expected]
    assert examples.tasks == [example["task"] for example in expected]
    assert examples.largest_id == max(max(example["input_ids"]) for example in expected)

    def fail_if_called(*arguments, **options):
        raise AssertionError("it is in the cache")

    monkeypatch.setattr("badit.data.files.read_rows", fail_if_called)
    monkeypatch.setattr("badit.data.examples.encode_examples", fail_if_called)
    assert load_tasks(path) == small
    assert list(encode_tasks(tokenizer, tasks, options, order)) == list(examples)
    write_rows(path, ROWS[0])
    with pytest.raises(AssertionError, match="in the cache"):
        load_tasks(path)


def test_tasks_command_shows_mixture_prompts_and_repeated_inputs(tmp_path, command, recipe_file):
    path = write_rows(tmp_path / "rows.jsonl", *ROWS, ROWS[0], {**ROWS[0], "split": "test"})
    shares = command("tasks", path, "data.sampling=balanced")
    assert "capitals      3           0     1    50.0%  Name the capital." in shares
    shown = command("tasks", recipe_file, f"data.source={path}", "--show", 1)
    assert "Input: France\nOutput: " in shown
    assert "⟦Paris" in shown
    statistics = [line for line in shown.splitlines() if line.startswith("capitals ")][-1]
    # One repeated input; two training inputs are also in the test set.
    assert statistics.split()[-2:] == ["1", "2"]
