"""Saved datasets and those on the hub: class labels, columns of media, and named splits."""

import struct
from pathlib import Path

import datasets
import pytest

from badit.data import Source, load_tasks
from data.examples import HELLO, refusal, task_of, write_rows
from refusals import refuses

REVIEWS = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
)
COLUMNS = {"input": "text", "output": "label"}
SPLIT_SIZES = {"train_sft": 3, "train_gen": 1, "test_sft": 2, "Test": 1}
SPLITS = {"train_sft": "train", "train_gen": "train", "test_sft": "test"}


@pytest.fixture
def reviews(tmp_path):
    rows = {"text": ["Fine", "Dull"], "label": [1, 0]}
    data = datasets.Dataset.from_dict(rows, features=REVIEWS)
    splits = datasets.DatasetDict({"train": data, "validation": data.select([0])})
    splits.save_to_disk(tmp_path / "reviews")
    return tmp_path / "reviews"


def test_class_labels_become_their_names(reviews, tmp_path):
    task = task_of(reviews, columns=COLUMNS, instruction="Judge.")
    assert (task.name, task.definition) == ("reviews", "Judge.")
    outputs = [instance.outputs for instance in (*task.train, *task.validation)]
    assert outputs == [("good",), ("bad",), ("good",)]
    assert "found text, label; name the columns with data.columns" in refusal(reviews)

    unlabelled = datasets.Dataset.from_dict({"text": ["Fine"], "label": [-1]}, features=REVIEWS)
    unlabelled.save_to_disk(tmp_path / "unlabelled")
    message = refusal(Source(tmp_path / "unlabelled", columns=COLUMNS))
    assert "row 1: label: has no answer" in message


def test_files_outside_of_a_saved_dataset_are_not_read(reviews):
    state = reviews / "train" / "state.json"
    state.write_text(state.read_text().replace('"data-', '"../validation/../../data-'))
    assert "leads out of" in refusal(reviews)


@pytest.mark.parametrize("name", ["saved", "rows.arrow"])
def test_damaged_offsets_are_refused(tmp_path, name):
    """Arrow would read the text that they describe out of bounds."""
    path = write_rows(tmp_path / name, *[HELLO] * 10)
    file = next(path.rglob("*.arrow"), path)
    offsets = struct.pack("<3i", 9, 18, 27)  # of the column "prompt"
    assert offsets in file.read_bytes()
    damaged = struct.pack("<3i", 9, 2**30, 2**30 + 9)
    file.write_bytes(file.read_bytes().replace(offsets, damaged))
    assert refusal(path).startswith(f"{path}: ")


def test_a_damaged_description_is_named(reviews):
    file = reviews / "train" / "dataset_info.json"
    file.write_text(file.read_text()[:-9])
    assert refusal(reviews).startswith(f"{file}: invalid JSON")


@pytest.mark.parametrize("is_nested", [False, True])
def test_images_are_not_opened(tmp_path, is_nested):
    text = datasets.Value("string")
    kind, value = datasets.Image(), {"bytes": b"no image", "path": None}
    if is_nested:
        kind, value = {"Json(": text, "image": kind}, {"Json(": "", "image": value}
    features = datasets.Features({"input": text, "output": text, "i": kind})
    rows = {"input": ["a"], "output": ["b"], "i": [value]}
    file = tmp_path / "images.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    assert task_of(file).train[0].input == "a"


def test_named_splits_of_datasets_files_and_rows(tmp_path):
    parts = {name: datasets.Dataset.from_list([HELLO] * n) for name, n in SPLIT_SIZES.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for name, size in SPLIT_SIZES.items():
        write_rows(tmp_path / f"files/{name}-00000-of-00001.jsonl", *[HELLO] * size)
    rows = [{"prompt": "Say hello", "completion": "", "split": "Test"}]
    for name in SPLITS:
        rows += [{**HELLO, "split": name}] * SPLIT_SIZES[name]
    for file in ("rows.csv", "tasks/a.csv", "tasks/b.csv"):
        write_rows(tmp_path / file, *rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")

    for place in ("saved", "files", "rows.csv", "one"):
        task = task_of(tmp_path / place, splits=SPLITS)
        assert (task.name, len(task.train), len(task.test)) == (Path(place).stem, 4, 2)
    tasks = load_tasks(Source(tmp_path / "tasks", splits=SPLITS))
    assert [(task.name, len(task.train)) for task in tasks] == [("a", 4), ("b", 4)]

    message = refusal(tmp_path / "saved")
    assert f"unknown split 'train_sft'; found: {', '.join(SPLIT_SIZES)}; choose" in message
    message = r"/saved: data.splits: unknown 'train' \(did you mean 'train_.*'\?\); known: train_s"
    refuses(message, load_tasks, Source(tmp_path / "saved", splits={"train": "train"}))


def test_hub_dataset_with_configuration_and_connection_error(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_list([HELLO])

    def load_dataset(*names):
        asked.append(names)
        if names[1] is None:
            raise ConnectionError("no network")
        return datasets.DatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = task_of("someone/things:small")
    assert (task.name, len(task.train), len(task.test)) == ("things", 1, 1)
    assert asked == [("someone/things", "small")]
    assert "someone/things: no such file or folder" in refusal(Path("someone/things"))
