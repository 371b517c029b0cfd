"""The cache of large data: what it is used for, damaged and foreign files, and its lock."""

import errno
import os
import random
import shutil
import threading
import time
from pathlib import Path

import datasets
import pytest

from badit.data import load_tasks
from badit.support.files import lock
from data.examples import ROWS, task_of, write_rows
from refusals import refuses


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cached tables, which all sources use, even small ones."""
    monkeypatch.setenv("BADIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("badit.data.records._LARGE", 1)
    return tmp_path / "cache" / "data"


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", *ROWS)


def cached(cache, source):
    """Loads a source; returns its tasks and the file that keeps them."""
    before = {*cache.glob("*.arrow")}
    tasks = load_tasks(source)
    (file,) = {*cache.glob("*.arrow")} - before
    return tasks, file


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_of_equal_size_and_time_is_read_again(rows, replace):
    """As after rsync -t, which replaces the file, and cp -p, which rewrites it."""
    load_tasks(rows)
    content, stat = rows.read_text(), rows.stat()
    time.sleep(0.02)  # the resolution of the file system's clock
    if replace:
        rows.unlink()
    rows.write_text(content.replace("Paris", "Milan"))
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert rows.stat().st_size == stat.st_size
    assert load_tasks(rows)[0].train[0].outputs == ("Milan",)


def test_a_changed_description_of_a_saved_dataset_is_read_again(tmp_path):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
    )
    folder = tmp_path / "reviews"
    datasets.Dataset.from_dict({"text": ["Fine."], "label": [1]}, features).save_to_disk(folder)
    columns = {"input": "text", "output": "label"}
    assert task_of(folder, columns=columns).train[0].outputs == ("good",)
    description = folder / "dataset_info.json"
    description.write_text(description.read_text().replace("good", "best"))
    assert task_of(folder, columns=columns).train[0].outputs == ("best",)


@pytest.mark.parametrize("suffix", [".arrow", ".partial", ".lock"])
def test_links_in_the_cache_are_not_followed(cache, rows, tmp_path, suffix):
    tasks, file = cached(cache, rows)
    shutil.rmtree(cache)
    cache.mkdir()
    (tmp_path / "victim").write_text("mine")
    file.with_suffix(suffix).symlink_to(tmp_path / "victim")
    if suffix == ".lock":
        refuses(f"cache {cache}: .*; set BADIT_CACHE", load_tasks, rows)
    else:
        assert load_tasks(rows) == tasks
        assert not file.is_symlink()
    assert (tmp_path / "victim").read_text() == "mine"


def damages(content, other):
    """Yields more than 40 damaged contents of a cache file; ``other`` is that of another table."""
    size = len(content)
    numbers = random.Random(0)
    for length in (0, 1, 7, 8, 15, 16, 17, size // 2, size - 17, size - 16, size - 8, size - 1):
        yield content[:length]
    for _ in range(30):
        flipped = bytearray(content)
        flipped[numbers.randrange(size)] ^= 1 << numbers.randrange(8)
        yield bytes(flipped)
    for part in (slice(0, 16), slice(size // 2, size // 2 + 40), slice(size - 16, size)):
        zeros = bytearray(content)
        zeros[part] = bytes(len(zeros[part]))
        yield bytes(zeros)
    yield from (
        other,
        content + b"\0",
        content + content,
        other[: size // 2] + content[size // 2 :],
    )
    yield from (bytes(size), b"{}\n", content[::-1])


def test_damaged_cache_files_are_written_again(cache, rows, tmp_path, capsys):
    tasks, file = cached(cache, rows)
    _, other = cached(cache, write_rows(tmp_path / "other.jsonl", {**ROWS[0], "output": "Lyon"}))
    content = file.read_bytes()
    cases = [*damages(content, other.read_bytes())]
    assert len(cases) >= 40
    for damaged in cases:
        file.unlink()  # `tasks` still has the former one in memory
        file.write_bytes(damaged)
        capsys.readouterr()
        assert load_tasks(rows) == tasks
        assert file.read_bytes() == content
        said = capsys.readouterr().err
        assert said == f"{file}: damaged; written again from the data\n"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_other_things_in_the_place_of_a_cache_file(cache, rows, make):
    tasks, file = cached(cache, rows)
    file.unlink()
    make(file)
    if make is os.mkdir:
        refuses(f"cache {cache}: .*; set BADIT_CACHE", load_tasks, rows)
    else:
        assert load_tasks(rows) == tasks
        assert file.is_file()


def fail(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_complete_cache_needs_no_writing_and_no_lock(cache, rows, monkeypatch):
    tasks, file = cached(cache, rows)
    monkeypatch.setattr("badit.data.files.read_rows", fail)
    with lock(file.with_suffix(".lock")), monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", fail)
        patch.setattr(Path, "chmod", fail)
        assert load_tasks(rows) == tasks


def test_a_damaged_cache_that_cannot_be_written_is_refused(cache, rows, monkeypatch):
    _, file = cached(cache, rows)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1])
    monkeypatch.setattr(Path, "mkdir", fail)
    refuses(f"cache {cache}: cannot be written, .*set BADIT_CACHE", load_tasks, rows)


def test_a_process_that_waits_names_the_one_that_writes(cache, rows, capsys):
    tasks, file = cached(cache, rows)
    file.unlink()
    read = []
    reader = threading.Thread(target=lambda: read.append(load_tasks(rows)))
    said = ""
    lock_file = file.with_suffix(".lock")
    with lock(lock_file):
        reader.start()
        deadline = time.monotonic() + 60
        while "waiting for" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert not read
    reader.join(60)
    assert read == [tasks]
    assert said.startswith(f"{lock_file}: waiting for process {os.getpid()} on ")


def test_the_folder_is_private(cache, rows):
    old = os.umask(0)
    try:
        cache.mkdir(parents=True)
        load_tasks(rows)
    finally:
        os.umask(old)
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["folder", "file", "link"])
def test_folders_and_files_of_other_users_are_refused(cache, rows, monkeypatch, tmp_path, name):
    _, file = cached(cache, rows)
    foreign = {"folder": cache, "file": file, "link": cache}[name]
    if name == "link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    if name != "file":
        file.unlink()
    # Only root can give files away; to another user, those of this test are foreign.
    if os.geteuid() == 0:
        os.chown(foreign, 65534, 65534, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    message = f"{foreign}: belongs to another user; set BADIT_CACHE to a folder of your own"
    refuses(message, load_tasks, rows)
