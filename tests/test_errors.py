"""Known exceptions become one line with the place and the reason; unknown exceptions propagate."""

import errno
import io
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from pydantic import TypeAdapter
from safetensors import SafetensorError

from badit.support.console import one_line, show
from badit.support.errors import BaditError, explained

FULL = r"place: cannot be written, the disk (or a quota) is full; free some space and run the same command again"
READ_ONLY = (
    "place: cannot be written, the file system is read-only; choose a folder that can be written"
)


def system_error(number, file=None):
    return OSError(number, os.strerror(number), file)


def test_known_exceptions_become_one_line_errors():
    for error, message in (
        (
            lambda: TypeAdapter(list[float]).validate_python([1, "x"]),
            "place: 1: input should be a valid number",
        ),
        (lambda: json.loads('{"a": }'), "place: invalid JSON at line 1 column 7"),
        (lambda: b"a\xff".decode(), "place: not UTF-8 at byte 1; save the file as UTF-8"),
        (lambda: Path("place").read_bytes(), "place: cannot be used (No such file or directory)"),
        (lambda: Path("\0").read_bytes(), "place: cannot be used (not a valid path)"),
        (lambda: torch.save({}, "/proc/no"), "place: cannot be used ("),
        *(
            (system_error(number, "x"), FULL)
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7 vs 5"), FULL),
        (system_error(errno.EROFS), READ_ONLY),
        (RuntimeError("open file failed with strerror: Read-only file system"), READ_ONLY),
        (HFValidationError("bad name"), "place: bad name"),
        (BaditError("mine: as it was"), "mine: as it was"),
    ):
        with pytest.raises(BaditError) as caught, explained("place", action="used"):
            Mock(side_effect=error)()
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("no"), KeyError("k"), BrokenPipeError()]
)
def test_unknown_exceptions_propagate_unchanged(error):
    with pytest.raises(type(error)) as caught, explained("place"):
        raise error
    assert caught.value is error


def test_options_and_escaping_of_control_characters(monkeypatch):
    message = r"^place: cannot be loaded \(shapes differ\); fetch"
    with (
        pytest.raises(BaditError, match=message),
        explained("place", action="loaded", fix="fetch", any_error=True),
    ):
        raise RuntimeError("shapes differ.\nand more")
    with (
        pytest.raises(BaditError, match=r"^the device is out of memory \(tried\); lower training"),
        explained(),
    ):
        raise torch.OutOfMemoryError("tried")
    with (
        pytest.raises(BaditError, match=r"^elsewhere: cannot be read or written \(No such"),
        explained(),
    ):
        Path("elsewhere").read_bytes()
    assert str(BaditError("a\x1b[2J\nb\u202e\ud800é")) == one_line("a\x1b[2J\nb\u202e\ud800é")
    assert one_line("a\x1b[2J\nb\u202e\ud800é") == r"a\x1b[2J\nb\u202e\ud800é"
    monkeypatch.setattr("sys.stdout", stdout := io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    show("é ─\x1b")
    assert stdout.buffer.getvalue() == b"\xe9 \\u2500\\u001b\n"


def test_long_lines_are_shortened_in_the_middle():
    message = r"^place/999.*999: cannot be read or written .*; shorten it$"
    with (
        pytest.raises(BaditError, match=message) as caught,
        explained("place/" + "9" * 5000, fix="shorten it"),
    ):
        raise system_error(errno.ENAMETOOLONG)
    assert len(str(caught.value)) < 1200
