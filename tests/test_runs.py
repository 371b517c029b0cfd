"""Files of a run: written whole, read line by line."""

from __future__ import annotations

import json
from pathlib import Path

from badit.files import StepLog, read_jsonl


def test_only_a_line_feed_ends_a_line_and_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    separators = {"text": "one\u2028two\u0085three"}
    path.write_text(json.dumps(separators, ensure_ascii=False) + "\n" + '{"text": "cut', encoding="utf-8")
    assert list(read_jsonl(path)) == [separators]
    assert list(read_jsonl(tmp_path / "missing.jsonl")) == []


def test_a_log_goes_back_to_a_step(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "new" / "log.jsonl", step_key="at")
    log.rewind(0)
    for at in (5, 10, 15):
        log.append({"at": at})
    log.rewind(10)
    assert list(read_jsonl(tmp_path / "new" / "log.jsonl")) == [{"at": 5}, {"at": 10}]
    log.rewind(0)
    assert list(read_jsonl(tmp_path / "new" / "log.jsonl")) == []


def test_lines_that_are_pending_are_logged_again(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl", step_key="at")
    for line in ({"at": 5, "of": 3, "x": 1}, {"at": 10, "of": 6, "x": 1}, {"at": 10, "of": 6, "x": 2}):
        log.append(line)
    log.rewind(10, [{"of": 6, "x": 2}])
    assert [line["x"] for line in read_jsonl(tmp_path / "log.jsonl")] == [1, 1]
