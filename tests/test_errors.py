"""Known exceptions become one line with the place and the reason; unknown exceptions propagate."""

import errno
import io
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from pydantic import TypeAdapter
from safetensors import SafetensorError

from badit.support.console import one_line, show
from badit.support.errors import BaditError, explained

FULL = "place: cannot be written, the disk (or a quota) is full; free some space"
READ_ONLY = "place: cannot be written, the file system is read-only; choose a folder"


def system_error(number, file=None):
    return OSError(number, os.strerror(number), file)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TypeAdapter(list[float]).validate_python([1, "x"]),
            "place: 1: input should be a valid number",
        ),
        (lambda: json.loads('{"a": }'), "place: invalid JSON at line 1 column 7"),
        (lambda: b"a\xff".decode(), "place: not UTF-8 at byte 1; save the file as UTF-8"),
        (lambda: Path("place").read_bytes(), "place: cannot be used (No such file or directory)"),
        (lambda: Path("no").read_bytes(), "place: cannot be used (No such file or directory: no)"),
        (lambda: Path("\0").read_bytes(), "place: cannot be used (not a valid path)"),
        (lambda: torch.save({}, "/proc/no"), "place: cannot be used ("),
    ],
)
def test_exceptions_of_calls_become_one_line_errors(call, message):
    with pytest.raises(BaditError) as caught, explained("place", action="used"):
        call()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (system_error(errno.ENOSPC, "x"), FULL),
        (system_error(errno.EDQUOT, "x"), FULL),
        (system_error(errno.EFBIG, "x"), FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7 vs 5"), FULL),
        (system_error(errno.EROFS), READ_ONLY),
        (RuntimeError("open file failed with strerror: Read-only file system"), READ_ONLY),
        (RuntimeError("inline_container: open file failed"), "place: cannot be used (inline"),
        (SafetensorError("bad header"), "place: cannot be used (bad header)"),
        (ValueError("set trust_remote_code=True"), "place: cannot be used without the model's"),
        (HFValidationError("bad name"), "place: bad name"),
        (OfflineModeIsEnabled("offline"), "place: the hub cannot be reached (offline); try"),
        (BaditError("mine: as it was"), "mine: as it was"),
    ],
)
def test_exceptions_of_libraries_become_one_line_errors(error, message):
    with pytest.raises(BaditError) as caught, explained("place", action="used"):
        raise error
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("no"), KeyError("k"), BrokenPipeError()]
)
def test_unknown_exceptions_propagate_unchanged(error):
    with pytest.raises(type(error)) as caught, explained("place"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (
            RuntimeError("shapes differ.\nand more"),
            {"where": "place", "action": "loaded", "fix": "fetch", "any_error": True},
            r"^place: cannot be loaded \(shapes differ\); fetch$",
        ),
        (torch.OutOfMemoryError("tried"), {}, r"^the device is out of memory \(tried\); lower"),
        (
            system_error(errno.ENOENT, "elsewhere"),
            {},
            r"^elsewhere: cannot be read or written \(No such file or directory\)$",
        ),
    ],
)
def test_place_action_and_fix_are_in_the_message(error, options, message):
    with pytest.raises(BaditError, match=message), explained(**options):
        raise error


def test_control_characters_are_escaped(monkeypatch):
    text = "a\x1b[2J\nb\u202e\ud800é"
    assert str(BaditError(text)) == one_line(text) == r"a\x1b[2J\nb\u202e\ud800é"
    monkeypatch.setattr("sys.stdout", stdout := io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    show("é ─\x1b")
    assert stdout.buffer.getvalue() == b"\xe9 \\u2500\\u001b\n"


def test_long_lines_are_shortened_in_the_middle():
    message = r"^place/999.*999: cannot be read or written .*; shorten it$"
    place = "place/" + "9" * 5000
    with pytest.raises(BaditError, match=message) as caught, explained(place, fix="shorten it"):
        raise system_error(errno.ENAMETOOLONG)
    assert len(str(caught.value)) < 1200
