"""Known exceptions become one line that names the place and the reason; unknown ones stay as they are."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from badit.errors import BaditError, explained, one_line


class Settings(BaseModel):
    rates: list[float]


def system_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


def refused(status: int) -> RepositoryNotFoundError:
    request = httpx2.Request("GET", "https://hub")
    return RepositoryNotFoundError(f"{status} refused.\nmore", response=httpx2.Response(status, request=request))


def raise_it(error: Exception) -> None:
    raise error


FULL = r"place: cannot be written, the disk (or a quota) is full; make room and run the same command again"
READ_ONLY = "place: cannot be written, the file system is read-only; choose a folder that can be written"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Settings.model_validate({"rates": [1, "x"]}), "place: rates.1: input should be a valid number"),
        (lambda: json.loads('{"a": }'), "place: invalid JSON at line 1 column 7"),
        (lambda: b"a\xff".decode(), "place: not UTF-8 at byte 1; save the file as UTF-8"),
        (lambda: Path("place").read_bytes(), "place: cannot be used (No such file or directory)"),
        (lambda: Path("elsewhere").read_bytes(), "place: cannot be used (No such file or directory: elsewhere)"),
        (lambda: Path("\0").read_bytes(), "place: cannot be used (not a valid path)"),
        (lambda: safe_open("/dev/null", framework="pt"), "place: cannot be used ("),
        (lambda: torch.save({}, "/proc/no"), "place: cannot be used ("),
        *((lambda n=n: raise_it(system_error(n, "x")), FULL) for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        (lambda: raise_it(SafetensorError("I/O error: No space left on device (os error 28)")), FULL),
        (lambda: raise_it(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7 vs 5")), FULL),
        (lambda: raise_it(RuntimeError("basic_ios::clear: iostream error")), FULL),
        (lambda: raise_it(system_error(errno.EROFS)), READ_ONLY),
        (lambda: raise_it(RuntimeError("open file failed with strerror: Read-only file system")), READ_ONLY),
        (lambda: raise_it(refused(404)), "place: the hub refuses: 404 refused"),
        (lambda: raise_it(refused(401)), "place: the hub refuses: 401 refused; the token is not valid"),
        (lambda: raise_it(httpx2.ConnectError("no route")), "place: the hub cannot be reached (no route)"),
        (lambda: raise_it(OfflineModeIsEnabled("offline")), "place: the hub cannot be reached (offline)"),
        (lambda: raise_it(HFValidationError("bad name")), "place: bad name"),
        (lambda: raise_it(BaditError("mine: as it was")), "mine: as it was"),
    ],
)
def test_a_known_exception_is_one_line(action, message):
    with pytest.raises(BaditError) as caught, explained("place", action="used"):
        action()
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), KeyError("k"), BrokenPipeError()])
def test_an_unknown_exception_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, explained("place"):
        raise error
    assert caught.value is error


def test_any_error_is_for_libraries_that_parse_foreign_files():
    message = r"^place: cannot be loaded \(shapes differ\); fetch it again$"
    options = {"action": "loaded", "fix": "fetch it again", "any_error": True}
    with pytest.raises(BaditError, match=message), explained("place", **options):
        raise RuntimeError("shapes differ\nand more")


def test_without_a_place_the_file_is_named():
    with pytest.raises(BaditError, match=r"^elsewhere: cannot be read or written \(No such"), explained():
        Path("elsewhere").read_bytes()


def test_a_message_holds_no_command_to_a_terminal():
    assert str(BaditError("a\x1b[2J\nb\u202e\ud800é")) == one_line("a\x1b[2J\nb\u202e\ud800é")
    assert one_line("a\x1b[2J\nb\u202e\ud800é") == r"a\x1b[2J\nb\u202e\ud800é"
