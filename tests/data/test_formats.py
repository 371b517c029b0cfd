"""Row layouts in files of every format, mixtures of sources, and cached data."""

from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from badit.data import (
    Instance,
    Source,
    Task,
    build_prompt,
    encode_examples,
    encode_tasks,
    load_sources,
    load_tasks,
    quotas,
)
from badit.data.encoding import labels_of
from data.examples import CHAT, CHATML, encode_prompt, make_tokenizer, refusal, write_rows
from refusals import refuses

ROWS = [
    {"task": "capitals", "instruction": "Name the capital.", "input": "France", "output": "Paris"},
    {
        "task": "capitals",
        "instruction": "Name the capital.",
        "input": 'Peru, "the" one',
        "output": "Lima",
    },
    {"task": "sums", "instruction": "Add.", "input": "1 + 1", "output": "2"},
]
HELLO = {"prompt": "Say hello", "completion": "hello"}


def task_of(path, **options):
    (task,) = load_tasks(Source(path, **options))
    return task


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow", "json", "jsonl", "saved"])
def test_same_rows_give_the_same_tasks_in_every_format(tmp_path, suffix):
    capitals, sums = load_tasks(write_rows(tmp_path / f"rows [1].{suffix}", *ROWS))
    assert (capitals.name, capitals.definition) == ("capitals", "Name the capital.")
    france = Instance(id="capitals-0", input="France", outputs=("Paris",))
    peru = Instance(id="capitals-1", input='Peru, "the" one', outputs=("Lima",))
    assert capitals.train == (france, peru)
    assert sums.train[0].outputs == ("2",)


def test_csv_values_stay_text_and_malformed_files_are_refused(tmp_path):
    file = tmp_path / "codes.csv"
    file.write_text("\ufeffinput,output,split\n007,NA,train\nnull,1e3,dev\n", encoding="utf-8")
    task = task_of(file)
    assert (task.name, task.definition, task.train[0].input, task.train[0].outputs) == (
        "codes",
        None,
        "007",
        ("NA",),
    )
    assert (task.validation[0].input, task.validation[0].outputs) == ("null", ("1e3",))
    file.write_text("input;output\nGreat food, really;positive\n")
    assert task_of(file).train[0].input == "Great food, really"
    file.write_text("input,output\nGreat food, really,positive\n")
    assert "row 1 has more values than the first line has names" in refusal(file)
    file.write_text("input,output,input\na,b,c\n")
    assert "codes.csv: column 'input' occurs 2 times; rename or remove the others" in refusal(file)
    file.write_text('input,output\n"Great food,positive\nBad,negative\n')
    assert 'codes.csv: after line 1: unexpected end of data; write " within a value as' in refusal(
        file
    )
    file = tmp_path / "reviews.tsv"
    file.write_text('input\toutput\n"Bad\tneg\nthe screen is 5"\tpos\n')
    assert "reviews.tsv: row 1 has a tab within quotes; write" in refusal(file)
    file.write_text("Task\tinstruction\tinput\toutput\na\tDo it\tb\tc\n")
    assert "row 1: found 'Task', did you mean 'task'?" in refusal(file)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_task_may_have_several_instructions_and_empty_inputs(tmp_path, suffix):
    rows = [{"topic": "sums", "do": "Add.", "context": "1 1", "answer": "2"}]
    rows += [{"topic": "sums", "do": "Greet.", "context": None, "answer": "Hi"}]
    columns = {"task": "topic", "instruction": "do", "input": "context", "output": "answer"}
    task = task_of(write_rows(tmp_path / f"alpaca.{suffix}", *rows), columns=columns)
    assert (task.name, [one.input for one in task.train]) == ("sums", ["1 1", ""])
    assert [build_prompt(task, one).head.split("\n")[0] for one in task.train] == ["Add.", "Greet."]
    task = task_of(
        write_rows(tmp_path / f"some.{suffix}", rows[0], {**rows[0], "do": None}), columns=columns
    )
    assert build_prompt(task, task.train[1]).is_message, (
        "a row without an instruction has none of another row"
    )
    task = task_of(tmp_path / f"some.{suffix}", columns=columns, instruction="Say it.")
    assert build_prompt(task, task.train[1]).head.startswith("Say it.")


def test_values_that_other_formats_have_as_text_and_system_prompts_are_kept(tmp_path):
    file = write_rows(
        tmp_path / "rows.jsonl", {"task": "a", "input": "x", "outputs": ["y", "z"], "id": 0}
    )
    assert task_of(file).train[0] == Instance(id="0", input="x", outputs=("y", "z"))
    assert task_of(write_rows(file, {"input": "x", "output": 0.5})).train[0].outputs == ("0.5",)
    assert task_of(write_rows(file, {"input": 7, "output": "x"})).train[0].input == "7"
    write_rows(file, {"text": "x", "output": "y", "context": "z"})
    assert task_of(file, columns={"input": "text"}).train[0].input == "x"
    of_conversation = task_of(write_rows(file, {"system": "Be brief.", "conversations": CHAT[1:]}))
    assert of_conversation == task_of(write_rows(file, {"messages": CHAT}))


def test_files_of_one_name_are_refused_and_links_have_their_own(tmp_path):
    for folder in ("de", "fr", "train"):
        write_rows(tmp_path / folder / "items.csv", HELLO)
    assert "task 'items' is also in" in refusal(f"{tmp_path}/*/items.csv")
    assert len(task_of(f"{tmp_path}/*/items.csv", task="items").train) == 3
    (tmp_path / "links").mkdir()
    for name in ("train", "test"):
        (tmp_path / "links" / f"{name}.csv").symlink_to(
            tmp_path / ("de" if name == "train" else "fr") / "items.csv"
        )
    task = task_of(tmp_path / "links")
    assert (task.name, len(task.train), len(task.test)) == ("links", 1, 1)
    sources = [Source(tmp_path / "de" / "items.csv"), Source(tmp_path / "links" / "test.csv")]
    refuses(r"test.csv is named after a split, not a task; give the folder", load_sources, sources)


def test_file_names_in_a_folder_or_glob_set_splits_and_tasks(tmp_path):
    for name in (
        "train-00000-of-00002.parquet",
        "train-00001-of-00002-a09b.parquet",
        "Val.csv",
        "test.jsonl",
    ):
        write_rows(tmp_path / name, HELLO)
    task = task_of(tmp_path)
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == (
        tmp_path.name,
        2,
        1,
        1,
    )
    assert [one.id[-2:] for one in (*task.train, *task.validation, *task.test)] == [
        "-0",
        "-1",
        "-2",
        "-3",
    ]
    write_rows(tmp_path / "greeting.csv", HELLO)
    assert [task.name for task in load_tasks(tmp_path)] == sorted(["greeting", tmp_path.name])
    assert [task.name for task in load_tasks(f"{tmp_path}/gree*.csv")] == ["greeting"]
    assert "no tasks found" in refusal(tmp_path / "none*.csv")
    write_rows(tmp_path / "test.jsonl", {**HELLO, "split": "train"})
    assert "test.jsonl: line 1: split: must be 'test', as in the file's name; change" in refusal(
        tmp_path
    )


def test_row_layouts_without_a_task_name(tmp_path):
    file = tmp_path / "rows.jsonl"
    for row, prompt, answer in (
        ({"instruction": "Square it.", "input": 0, "output": "0"}, "Square it.\n\n0", "0"),
        ({"instruction": "", "question": "Why?", "answer": "So."}, "Why?", "So."),
        (
            {"instruction": "Name it.", "input": "France", "output": "Paris", "text": ""},
            "Name it.\n\nFrance",
            "Paris",
        ),
        ({"instruction": "Say hello.", "output": "hello"}, "Say hello.", "hello"),
        ({"instruction": "", "input": "France?", "output": "Paris"}, "France?", "Paris"),
        ({"messages": CHAT, "prompt": CHAT[0]["content"]}, "And of Peru?", "Lima"),
        ({"inputs": "1 + 1 =", "targets": "2", "task_source": "Flan2021"}, "1 + 1 =", "2"),
        (
            {
                "inputs_pretokenized": "Good?",
                "targets_pretokenized": "no",
                "inputs": [3],
                "targets": [5],
            },
            "Good?",
            "no",
        ),
        ({"question": "Why?", "answer": "So."}, "Why?", "So."),
        ({"input": "1 + 1", "output": 2}, "1 + 1", "2"),
        ({"prompt": CHAT[1:2], "completion": CHAT[2:3]}, "Capital of France?", "Paris"),
        ({"messages": CHAT}, "And of Peru?", "Lima"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[2]]},
            "Hi",
            "Paris",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            "Hi",
            "Ho",
        ),
    ):
        task = task_of(write_rows(file, row))
        assert (task.name, task.definition) == ("rows", None)
        assert (task.train[0].input, task.train[0].outputs) == (prompt, (answer,))
    assert task_of(file, task="mine").name == "mine"
    for row in (
        {"messages": CHAT, "about": "Do."},
        {"prompt": "Why?", "completion": "So.", "about": "Do."},
    ):
        assert task_of(write_rows(file, row), columns={"instruction": "about"}).definition == "Do."
    write_rows(file, {"messages": CHAT, "prompt": "a", "completion": "b", "ask": "c", "say": "d"})
    assert task_of(file, columns={"input": "ask", "output": "say"}).train[0].input == "c"
    message = "instruction: not used in a row with question and answer; name the columns with data.columns.input="
    assert message in refusal(
        write_rows(file, {"instruction": "Answer.", "question": "Why?", "answer": "So."})
    )
    assert "line 1: output: has no answer; remove the row" in refusal(
        write_rows(file, {"input": "a", "output": None})
    )
    for key in ("splits", "tasks"):
        write_rows(tmp_path / "rows.csv", {"question": "Why?", "answer": "So.", key: "test"})
        assert refusal(tmp_path / "rows.csv").endswith(
            f"row 1: found '{key}', did you mean '{key[:-1]}'?"
        )


def test_columns_instruction_and_class_labels_of_a_saved_dataset(tmp_path):
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = datasets.Dataset.from_dict(
        {"text": ["Fine", "Dull"], "label": [1, 0]}, features=features
    )
    datasets.DatasetDict({"train": rows, "validation": rows.select([0])}).save_to_disk(
        tmp_path / "reviews"
    )
    task = task_of(
        tmp_path / "reviews", columns={"input": "text", "output": "label"}, instruction="Judge."
    )
    assert (task.name, task.definition) == ("reviews", "Judge.")
    assert [each.outputs for each in (*task.train, *task.validation)] == [
        ("good",),
        ("bad",),
        ("good",),
    ]
    assert "found text, label; name the columns with data.columns" in refusal(tmp_path / "reviews")
    unknown = datasets.Dataset.from_dict({"text": ["Fine"], "label": [-1]}, features=features)
    unknown.save_to_disk(tmp_path / "unknown")
    columns = {"input": "text", "output": "label"}
    assert "row 1: label: has no answer" in refusal(Source(tmp_path / "unknown", columns=columns))
    image = {"i": [{"bytes": b"no image", "path": None}]}
    both = datasets.Dataset.from_dict({"input": ["a"], "output": ["b"], **image}).cast_column(
        "i", datasets.Image()
    )
    both.to_parquet(tmp_path / "images.parquet")
    assert task_of(tmp_path / "images.parquet").train[0].input == "a", "the image is not opened"
    hidden = {"i": [{"Json(": "", "image": {"bytes": b"no image", "path": None}}]}
    kinds = {"input": datasets.Value("string"), "output": datasets.Value("string")}
    kinds["i"] = {"Json(": datasets.Value("string"), "image": datasets.Image()}
    both = datasets.Dataset.from_dict(
        {"input": ["a"], "output": ["b"], **hidden}, features=datasets.Features(kinds)
    )
    both.to_parquet(tmp_path / "images.parquet")
    assert task_of(tmp_path / "images.parquet").train[0].input == "a", "nor one within a structure"
    state = tmp_path / "unknown" / "state.json"
    state.write_text(state.read_text().replace('"data-', '"../reviews/train/data-'))
    assert "leads out of" in refusal(tmp_path / "unknown")
    wrong = Source(tmp_path / "reviews", columns={"input": "txt"})
    assert "train: row 1: data.columns: there is no column 'txt'; found: text, label" in refusal(
        wrong
    )


def test_named_splits_of_datasets_files_and_rows(tmp_path):
    sizes = {"train_sft": 3, "train_gen": 1, "test_sft": 2, "Test": 1}
    parts = {name: datasets.Dataset.from_list([HELLO] * size) for name, size in sizes.items()}
    splits = {"train_sft": "train", "train_gen": "train", "test_sft": "test"}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for name, size in sizes.items():
        write_rows(tmp_path / f"files/{name}-00000-of-00001.jsonl", *[HELLO] * size)
    unlabelled = {"prompt": "Say hello", "completion": "", "split": "Test"}
    rows = [
        {**HELLO, "split": name}
        for name, size in sizes.items()
        if name != "Test"
        for _ in range(size)
    ]
    write_rows(tmp_path / "rows.csv", unlabelled, *rows)
    datasets.Dataset.from_list([unlabelled, *rows]).save_to_disk(tmp_path / "one")
    for name in "ab":
        write_rows(tmp_path / f"tasks/{name}.csv", unlabelled, *rows)
    several = load_tasks(Source(tmp_path / "tasks", splits=splits))
    assert [(task.name, len(task.train), len(task.test)) for task in several] == [
        ("a", 4, 2),
        ("b", 4, 2),
    ]
    for place in ("saved", "files", "rows.csv", "one"):
        task = task_of(tmp_path / place, splits=splits)
        assert (task.name, len(task.train), len(task.test)) == (Path(place).stem, 4, 2)
    fix = "; choose the splits to read, such as data.splits.train_sft=train"
    assert refusal(tmp_path / "saved").endswith(
        f"unknown split 'train_sft'; found: {', '.join(sizes)}{fix}"
    )
    missing = (
        r"/saved: data.splits: unknown 'train' \(did you mean 'train_.*'\?\); known: train_sft, "
    )
    refuses(missing, load_tasks, Source(tmp_path / "saved", splits={"train": "train"}))


def test_all_turns_become_instances_with_their_own_prompts(tmp_path):
    task = task_of(write_rows(tmp_path / "chat.jsonl", {"messages": CHAT, "id": "x"}), turns="all")
    expected = [("x", "Capital of France?", ("Paris",), 1), ("x-1", "And of Peru?", ("Lima",), 3)]
    assert [
        (each.id, each.input, each.outputs, len(each.history)) for each in task.train
    ] == expected
    tokenizer, plain = make_tokenizer(chat_template=CHATML), make_tokenizer(chat_template=None)
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    (example,) = encode_examples(tokenizer, [(task, task.train[1])])
    assert tokenizer.decode(example["input_ids"]) == text.rstrip("\n")
    text = str(plain.decode(encode_prompt(plain, build_prompt(task, task.train[1]), 500)))
    assert text.endswith(
        "user: Capital of France?\n\nassistant: Paris\n\nuser: And of Peru?\n\nassistant: "
    )


def test_long_chats_drop_the_oldest_messages_first():
    tokenizer = make_tokenizer(chat_template=CHATML)
    turns = [
        ("user", "first question"),
        ("assistant", "first answer"),
        ("user", "second"),
        ("assistant", "reply"),
    ]
    history = (("system", "Brief."), ("developer", "Calm."), *turns)
    instance = Instance(id="x", input="third", outputs=("end",), history=history)
    task = Task(name="chat", definition=None, train=(instance,))
    seen = set()
    for most in range(8, 120):
        text = tokenizer.decode(encode_prompt(tokenizer, build_prompt(task, instance), most))
        assert "third" in text
        kept = [content for _, content in turns if f"\n{content}<" in text]
        assert kept == [content for _, content in turns][len(turns) - len(kept) :]
        seen.add(len(kept))
        assert not kept or ("Brief." in text and "Calm." in text)
    assert seen == {0, 2, 4}


def test_hub_dataset_with_configuration_and_connection_error(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_list([HELLO])

    def load_dataset(*names):
        asked.append(names)
        if names[1] is None:
            raise ConnectionError("no network")
        return datasets.DatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (task,) = load_tasks("someone/things:small")
    assert (task.name, len(task.train), len(task.test), asked) == (
        "things",
        1,
        1,
        [("someone/things", "small")],
    )
    assert "someone/things: no such file or folder" in refusal(Path("someone/things"))


def test_source_weights_set_the_mixture_and_conflicts_are_refused(tmp_path):
    a, b = (
        write_rows(tmp_path / f"{name}.csv", *[HELLO] * count)
        for name, count in (("a", 30), ("b", 10))
    )
    tasks = load_sources([Source(b, weight=3.0), Source(a)], weights={"a": 2.0})
    assert [(task.name, task.weight) for task in tasks] == [("a", 2.0), ("b", 3.0)]
    assert quotas(tasks) == {"a": 27, "b": 13}
    assert [task.name for task in load_sources([Source(b), Source(a)], ["b"])] == ["b"]
    refuses("has task a of another source; set a new task", load_sources, [Source(a)] * 2)
    refuses(r"data.weights: unknown task 'c'", load_sources, [Source(a)], weights={"c": 2.0})


@given(sizes=st.lists(st.integers(1, 99), min_size=1, max_size=6), temperature=st.floats(1, 50))
def test_quotas_scale_task_sizes_by_temperature(sizes, temperature):
    instances = [
        tuple(Instance(id=str(i), input="", outputs=("a",)) for i in range(size)) for size in sizes
    ]
    tasks = [Task(name=f"t{i}", definition="", train=train) for i, train in enumerate(instances)]
    assert quotas(tasks) is None
    found = quotas(tasks, temperature=temperature) or dict(
        zip((t.name for t in tasks), sizes, strict=True)
    )
    powers = [size ** (1 / temperature) for size in sizes]
    assert list(found.values()) == [
        max(1, round(sum(sizes) * power / sum(powers))) for power in powers
    ]


def test_large_data_is_parsed_and_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BADIT_CACHE", str(tmp_path / "cache"))
    rows = [{**ROWS[i % 2 * 2], "input": f"country {i}"} for i in range(50)]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    small = load_tasks(path)
    for module in ("records", "examples"):
        monkeypatch.setattr(f"badit.data.{module}._LARGE", 1)
    monkeypatch.setattr("badit.data.records._ROWS_PER_BATCH", 7)
    tokenizer, order = make_tokenizer(chat_template=CHATML), [*reversed(range(50))]
    tasks = load_tasks(path)
    examples = encode_tasks(tokenizer, tasks, {"max_answer_tokens": 5}, order)
    assert tasks == small
    assert [task.fingerprint for task in tasks] == [task.fingerprint for task in small]
    assert [one.input for one in tasks[1].train[-1:2:-9]] == [
        "country 49",
        "country 31",
        "country 13",
    ]
    pairs = [(task, instance) for task in small for instance in task.train]
    expected = encode_examples(tokenizer, [pairs[i] for i in order], max_answer_tokens=5)
    assert list(examples) == [examples[i] for i in range(50)]
    assert [{**example, "labels": labels_of(example)} for example in examples] == expected
    assert examples.lengths == [len(each["input_ids"]) for each in expected]
    assert examples.tasks == [each["task"] for each in expected]
    assert examples.largest_id == max(max(each["input_ids"]) for each in expected)

    def fail_if_called(*arguments, **options):
        raise AssertionError("it is in the cache")

    monkeypatch.setattr("badit.data.files.read_rows", fail_if_called)
    monkeypatch.setattr(
        encode_tasks.__globals__["encode_examples"], "__code__", fail_if_called.__code__
    )
    assert load_tasks(path) == small
    assert len(encode_tasks(tokenizer, tasks, {"max_answer_tokens": 5}, order)) == 50
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
    (row,) = [
        line for line in shown.splitlines() if line.startswith("capitals ") and "Name" not in line
    ]
    assert row.split()[-2:] == ["1", "2"], (
        "one repeated input; two training inputs are also in the test set"
    )
