"""File operations: strict reading, atomic writing, and protection against links out of a folder.

Commands on a folder that may be untrusted (a run, a comparison, an export) first call
:func:`refuse_links`. File names that are read from a file are checked by :func:`inside`.
BaditError if a file cannot be read or written.
"""

import fcntl
import json
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from badit.support.console import say
from badit.support.errors import BaditError, explained

OWNER = ".owner"  # in a folder that is in use: the name of the process that uses it

# The folders that this process has locked.
_locked: set[Path] = set()


def read_text(file: Path) -> str:
    """Returns the text of a UTF-8 file; BaditError for a pipe or a device."""
    return "".join(line for _, line in lines_of(file))


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the numbers (from 1) and lines of a UTF-8 file; only \\n ends a line."""
    with explained(file, action="read"):
        # Opening a pipe would block, and a device may have no end. A folder raises its own error.
        if file.exists() and not file.is_file() and not file.is_dir():
            raise BaditError(f"{file}: cannot be read (a pipe or a device); use a regular file")
        # Text mode would also end lines at \r, and str.splitlines at U+2028 within a string.
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    problem = "starts with a byte order mark; save the file as UTF-8 without one"
                    raise BaditError(f"{file}: {problem}")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    error.start += stream.tell() - len(line)  # counted from the start of the file
                    raise
                yield number, text


def parse_json(text: str, *, file: Path, first_line: int = 1, constants: bool = False) -> Any:
    """Parses text as JSON and refuses repeated keys.

    Args:
        text: the text.
        file: the file that it comes from.
        first_line: the text's first line in the file.
        constants: allow NaN and infinities.
    """
    parse_constant = None if constants else _refuse_constant
    try:
        value = json.loads(text, parse_constant=parse_constant, object_pairs_hook=_distinct)
        if "\\ud" in text.lower():  # escaped surrogates; encoding fails for a lone one
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1} column {error.colno}"
        raise BaditError(f"{file}: invalid JSON at {place}: {error.msg}") from None
    except UnicodeEncodeError:
        raise BaditError(f"{file}: has half a surrogate pair (from line {first_line})") from None
    # Also too deep nesting, and numbers with thousands of digits, with advice for programmers.
    except (ValueError, RecursionError) as error:
        problem = str(error).partition("; use sys.")[0]
        raise BaditError(f"{file}: {problem} (from line {first_line})") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json.loads would silently keep the last value of a repeated key.
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated_key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated_key!r:.60} is there twice; keep one")
    return entries


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON; use a number or null")


def read_json(path: Path, text: str | None = None, line: int = 1) -> dict[str, Any]:
    """Reads a file, or the ``text`` of its ``line``, as one JSON object.

    NaN and infinities are allowed.
    """
    if text is None:
        text = read_text(path)
    value = parse_json(text, file=path, first_line=line, constants=True)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BaditError(f"{path}: must hold one JSON object, not a {kind} (line {line})")
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file, none if it is missing.

    An incomplete last line (after a crash) is skipped.
    """
    if not path.is_file():
        return
    for number, line in lines_of(path):
        if line.endswith("\n"):
            yield read_json(path, line[:-1], number)


def refuse_other_format(content: Mapping[str, Any], path: Path, version: int) -> None:
    """Raises BaditError unless ``version`` is the ``format`` of a file, its structure's version."""
    file_version = content.get("format")
    # In Python, True equals version 1.
    if file_version is True or file_version != version:
        raise BaditError(
            f"{path}: format: is {file_version!r:.60}, this badit version reads {version}; "
            "install a later version of badit, or create the file again"
        )


def is_number(value: Any) -> bool:
    """Returns whether a value from a JSON file is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # math.isfinite raises OverflowError for very large integers.
    return abs(value) <= sys.float_info.max


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically.

    The file is complete or unchanged, even if the process or the machine stops.
    """
    if path.is_dir():
        raise BaditError(f"{path}: is a folder; name a file")
    # In the same folder: a rename is atomic only within one file system.
    partial = path.with_name(path.name + ".partial")
    with explained(path, action="written"):
        # A process that was killed while writing may have left it.
        partial.unlink(missing_ok=True)
        try:
            with partial.open("xb") as file:  # "x" does not follow links
                file.write(data)
            # Else a power failure after the rename could leave an empty file.
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # after an error, such as a full disk


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically, see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rewind_log(path: Path, step: int) -> None:
    """Removes the lines of a JSONL log after ``step``.

    A run that resumes at ``step`` logs them again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_jsonl(path) if step else ()
    earlier = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in earlier))


def append_to_log(path: Path, *lines: Mapping[str, Any]) -> None:
    """Appends lines to a JSONL log; a link at its path is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    # As open() does: the default mode of os.open would make the log executable.
    with open(os.open(path, flags, mode=0o666), "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def remove(path: Path) -> None:
    """Removes a file, a link (not its target) or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(partial: Path, final: Path) -> None:
    """Renames a complete folder to ``final``, which it replaces.

    Its files get the folder's read and write mode.
    """
    # The content must be on disk before the new name is.
    for path in [*partial.rglob("*"), partial]:
        if path.is_file():  # safetensors creates files that only the owner can read
            path.chmod(partial.stat().st_mode & 0o666)
        sync(path)
    remove(final)  # os.replace does not replace a folder with files
    os.replace(partial, final)
    # A rename is a change of the parent folder.
    sync(final.parent)


def copy_folder(source: Path, target: Path) -> None:
    """Replaces ``target`` by a complete copy of ``source``.

    BaditError for a link that leads out of ``source``.
    """
    refuse_links(source)
    partial = target.with_name(target.name + ".partial")
    remove(partial)  # of a killed process
    try:
        shutil.copytree(source, partial, symlinks=True)
        replace_folder(partial, target)
    finally:
        remove(partial)  # after an error, such as a full disk


def refuse_links(folder: Path) -> None:
    """Raises BaditError if a link in the folder leads out of it.

    The folder itself may be a link.
    """
    top = folder.resolve()
    for place, folders, files in os.walk(top):  # does not follow links to folders
        for path in (Path(place, name) for name in (*folders, *files)):
            # wandb/ has links to logs in the user's cache, which badit does not read.
            is_log = path.suffix == ".log" and "wandb" in path.parts and not path.is_dir()
            if path.is_symlink() and not is_log:
                # Under the folder's given name, which the error message shows.
                inside(folder, folder / path.relative_to(top))


def inside(folder: Path, path: Path) -> Path:
    """Returns the path; BaditError if it leads out of the folder or is not a valid path."""
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a NUL character
        is_inside = False
    if not is_inside:
        raise BaditError(f"{path}: leads out of {folder}; copy the file itself into the folder")
    return path


def cache_folder() -> Path:
    """Returns `$BADIT_CACHE`, else `$XDG_CACHE_HOME/badit`, else `~/.cache/badit`.

    The folder may not exist yet.
    """
    badit_cache = os.environ.get("BADIT_CACHE")
    if badit_cache:
        return Path(os.path.expanduser(badit_cache))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "badit")


@contextmanager
def lock(file: Path) -> Iterator[None]:
    """Locks a file, which is created, against other processes within the context.

    Waits for the process that holds the lock, and names it. The lock ends with its process. On file
    systems without locks, nothing is locked. OSError for a link.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode=0o600)
    with open(descriptor, "r+", encoding="utf-8", errors="replace") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{file}: waiting for {stream.readline().strip() or 'another process'}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        stream.truncate(0)
        stream.seek(0)
        stream.write(_this_process())
        stream.flush()
        yield


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes within the context; creates it if it does not exist.

    The lock is reentrant and ends with the process. On file systems without locks, the folder is
    not locked. BaditError if another process holds the lock, or a link leads out of the folder.
    """
    place = folder.resolve()
    # flock would refuse a second descriptor of the folder, even in the same process.
    if place in _locked:
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / OWNER
    # The folder itself is locked: the kernel releases the lock even if the process is killed.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(folder, descriptor)
        _locked.add(place)
        refuse_links(folder)
        # For the error message of other processes.
        write_text(owner, _this_process())
        yield
    finally:
        # Only if the lock was taken: else the owner's file belongs to another process.
        if place in _locked:
            _locked.remove(place)
            with suppress(OSError):  # the file system is read-only, or has become so
                owner.unlink()
            # A command that fails before it writes anything leaves no folder.
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
        os.close(descriptor)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}\n"


def _lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        user = "another process"
        with suppress(BaditError):  # the file is not there yet, or no longer
            user = read_text(folder / OWNER).strip()
        raise BaditError(f"{folder}: is in use by {user}; wait until it ends, or stop it") from None
    except OSError:  # a file system without locks
        pass
