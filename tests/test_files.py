"""File operations: strict reading, writing, and protection against links out of a folder."""

import errno
import json
from pathlib import Path

import pytest

from badit.support import files
from fuzz.damage import endless_file, folder_in_its_place, pipe_in_its_place
from refusals import refuses


@pytest.fixture
def outside(tmp_path):
    """A file outside ``run``, for links in ``run``."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "outside" / "key.txt").write_text("mine")
    return tmp_path / "outside" / "key.txt"


def test_invalid_json_is_refused_with_file_and_reason(tmp_path):
    file = tmp_path / "value.json"
    for content, message in (
        (b'{"a": "\xc3', "not UTF-8 at byte 7"),
        (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
        (b'{\n"a": }', "invalid JSON at line 2 column 6"),
        (b'{"a":' * 100_000, "maximum recursion depth exceeded"),
        (b"1" * 10_000, "Exceeds the limit"),
        (b'{"a": "\\uD83D"}', "has half a surrogate pair"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' is there twice; keep one (from line 1)"),
        (b"[]", "must hold one JSON object, not a list (line 1)"),
    ):
        file.write_bytes(content)
        assert refuses(".", files.read_json, file).startswith(f"{file}: {message}")


def test_parse_json_constants_surrogate_pairs_and_repeated_keys():
    assert files.parse_json('["\\ud83d\\ude00", Infinity]', file=Path("x"), constants=True) == [
        "😀",
        float("inf"),
    ]
    message = r"^x: -Infinity is not valid JSON; use a number or null \(from line 7\)$"
    refuses(message, files.parse_json, "-Infinity", file=Path("x"), first_line=7)
    text = "{" + ", ".join(f'"{number}": 0' for number in range(50_000)) + ', "49999": 1}'
    refuses("the key '49999' is there twice", files.parse_json, text, file=Path("x"))


@pytest.mark.parametrize("replace", [pipe_in_its_place, endless_file, folder_in_its_place])
def test_reading_refuses_pipes_devices_and_folders(tmp_path, replace):
    replace(tmp_path / "file")
    refuses(
        r"/file: cannot be read \((a pipe or a device|Is a directory)\)",
        files.read_text,
        tmp_path / "file",
    )


def test_jsonl_splits_at_line_feeds_only_and_skips_an_incomplete_last_line(tmp_path):
    path, separators = tmp_path / "log.jsonl", {"text": "one\u2028two\u0085three"}
    path.write_text(
        json.dumps(separators, ensure_ascii=False) + "\n" + '{"text": "cut', encoding="utf-8"
    )
    assert list(files.read_jsonl(path)) == [separators]
    assert list(files.read_jsonl(tmp_path / "missing.jsonl")) == []


def test_rewind_log_removes_lines_after_a_step(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    files.rewind_log(path, 0)
    files.append_to_log(path, {"step": 5}, {"step": 10}, {"step": None}, {})
    files.append_to_log(path, {"step": 10}, {"step": 15})
    files.rewind_log(path, 10)
    assert list(files.read_jsonl(path)) == [{"step": 5}, {"step": 10}, {"step": 10}]
    files.rewind_log(path, 0)
    assert list(files.read_jsonl(path)) == []


def test_failed_writes_leave_no_partial_files(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    files.write_text(folder / "notes.txt", "earlier")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(step, full)
            refuses("the disk .* is full", files.write_text, folder / "notes.txt", "later")
            with pytest.raises(OSError, match="No space left"):
                files.copy_folder(folder, tmp_path / "copy")
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert files.read_text(folder / "notes.txt") == "earlier"


def test_writes_replace_or_refuse_links_and_keep_their_targets(outside, tmp_path):
    run = tmp_path / "run"
    for name in ("scores.json", "scores.json.partial", "log.jsonl"):
        (run / name).symlink_to(outside)
    (run / "adapter").symlink_to(outside.parent)
    (run / "adapter.partial").mkdir()
    files.write_text(run / "scores.json", "theirs")
    with pytest.raises(OSError, match="symbolic links"):
        files.append_to_log(run / "log.jsonl", {})
    files.replace_folder(run / "adapter.partial", run / "adapter")
    assert (run / "scores.json").read_text() == "theirs"
    assert not any(path.is_symlink() for path in (run / "scores.json", run / "adapter"))
    for name in ("predictions", "predictions.partial"):
        (run / name).symlink_to(outside.parent)
    files.copy_folder(run / "adapter", run / "predictions")
    assert not (run / "predictions").is_symlink()
    assert outside.read_text() == "mine"
    refuses(
        r"scores\.json/x: cannot be written \(Not a directory",
        files.write_json,
        run / "scores.json" / "x",
        {},
    )


@pytest.mark.parametrize(
    "target", ["../outside/key.txt", "../outside", "../outside/new.txt", "/etc/passwd", "loop"]
)
def test_folder_with_link_out_of_it_is_refused_and_not_copied(outside, tmp_path, target):
    run = tmp_path / "run"
    (run / "predictions").mkdir()
    (run / "inner").symlink_to("predictions")
    (run / "wandb").mkdir()
    (run / "wandb" / "debug-core.log").symlink_to(outside)  # wandb creates such links
    (tmp_path / "named").symlink_to(run)  # the folder itself may be a link
    files.refuse_links(tmp_path / "named")
    for name in ("wandb/metrics.jsonl", "wandb/stage.log", "debug.log"):
        (run / name).symlink_to(outside.parent if name.endswith("stage.log") else outside)
        refuses(f"{name}: leads out of", files.refuse_links, run)
        (run / name).unlink()
    (run / "predictions" / "loop").symlink_to(f"../{target}" if ".." in target else target)
    refuses("predictions/loop: leads out of", files.refuse_links, tmp_path / "named")
    refuses("leads out of", files.copy_folder, run, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\0b"])
def test_inside_refuses_paths_out_of_the_folder(tmp_path, name):
    refuses("leads out of", files.inside, tmp_path, tmp_path / name)
    assert files.inside(tmp_path, tmp_path / "a" / "b") == tmp_path / "a" / "b"
