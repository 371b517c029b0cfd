"""File operations: strict reading, atomic writing, and protection against links that lead out of a folder.

Commands on a folder that may be untrusted (a run, a comparison, an export) first call :func:`refuse_links`. File names
that are read from a file are checked by :func:`inside`. BaditError if a file cannot be read or written.
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

from badit.support.errors import BaditError, explained

OWNER = ".owner"  # in a folder that is in use: the name of the process that uses it


def read_text(file: Path) -> str:
    """Returns the text of a UTF-8 file; BaditError for a pipe or a device."""
    return "".join(line for _, line in lines_of(file))


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the numbers (from 1) and lines of a UTF-8 file; only \\n ends a line."""
    with explained(file, action="read"):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise BaditError(f"{file}: cannot be read (a pipe or a device); use a regular file")
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    raise BaditError(
                        f"{file}: starts with a byte order mark; save the file as UTF-8 without one"
                    )
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    error.start += stream.tell() - len(line)  # counted from the start of the file
                    raise
                yield number, text


def parse_json(text: str, *, file: Path, first_line: int = 1, constants: bool = False) -> Any:
    """Parses `text`, which starts at line `first_line` of `file`, as JSON; `constants` allows NaN and infinities."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(entries := dict(pairs)) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {repeated!r:.60} is there twice; keep one")
        return entries

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not valid JSON; use a number or null")

    try:
        value = json.loads(
            text, parse_constant=None if constants else refuse, object_pairs_hook=distinct
        )
        if "\\ud" in text.lower():  # escaped surrogates; encoding fails for a lone one
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise BaditError(
            f"{file}: invalid JSON at line {line} column {error.colno}: {error.msg}"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # also for too deep nesting, and for numbers with thousands of digits
        problem = (
            "has half a surrogate pair"
            if isinstance(error, UnicodeError)
            else str(error).split("; use sys.")[0]
        )
        raise BaditError(f"{file}: {problem} (from line {first_line})") from None
    return value


def read_json(path: Path, text: str | None = None, line: int = 1) -> dict[str, Any]:
    """Reads a file, or the ``text`` of its ``line``, as one JSON object; NaN and infinities are allowed."""
    value = parse_json(
        read_text(path) if text is None else text, file=path, first_line=line, constants=True
    )
    if not isinstance(value, dict):
        raise BaditError(
            f"{path}: must hold one JSON object, not a {type(value).__name__} (line {line})"
        )
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file, none if it is missing; an incomplete last line (after a crash) is skipped."""
    for number, line in lines_of(path) if path.is_file() else ():
        if line.endswith("\n"):
            yield read_json(path, line[:-1], number)


def refuse_other_format(content: Mapping[str, Any], path: Path, known: int) -> None:
    """Raises BaditError unless the ``format`` of a file, the version of its structure, is ``known``."""
    found = content.get("format")
    if found is True or found != known:
        fix = "pip install --upgrade badit, or create the file again"
        raise BaditError(
            f"{path}: format: is {found!r:.60}, this badit version reads {known}: {fix}"
        )


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically: it is complete or unchanged, even if the process or the machine stops."""
    if path.is_dir():
        raise BaditError(f"{path}: is a folder; name a file")
    partial = path.with_name(path.name + ".partial")
    with explained(path, action="written"):
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # "x" does not follow links
            file.write(data)
        sync(partial)
        partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically, see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def rewind_log(path: Path, step: int) -> None:
    """Removes the lines of a JSONL log after ``step``, because a run that resumes at ``step`` logs them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_jsonl(path) if step else ()
    kept = [line for line in lines if isinstance(at := line.get("step"), int) and at <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def append_to_log(path: Path, *lines: Mapping[str, Any]) -> None:
    """Appends lines to a JSONL log; a link at its path is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with open(os.open(path, flags, mode=0o666), "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link (not its target) or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(partial: Path, final: Path) -> None:
    """Renames a complete folder to ``final``, which it replaces. Its files get the folder's read and write mode."""
    for path in [*partial.rglob("*"), partial]:
        if path.is_file():  # safetensors creates files that only the owner can read
            path.chmod(partial.stat().st_mode & 0o666)
        sync(path)
    remove(final)
    os.replace(partial, final)
    sync(final.parent)


def copy_folder(source: Path, target: Path) -> None:
    """Replaces ``target`` by a complete copy of ``source``; BaditError for a link that leads out of ``source``."""
    refuse_links(source)
    partial = target.with_name(target.name + ".partial")
    remove(partial)
    shutil.copytree(source, partial, symlinks=True)
    replace_folder(partial, target)


def refuse_links(folder: Path) -> None:
    """Raises BaditError if a link in the folder leads out of it; the folder itself may be a link."""
    top = folder.resolve()
    for place, folders, files in os.walk(top):  # does not follow links to folders
        for path in (Path(place, name) for name in (*folders, *files)):
            # wandb/ has links to logs in the user's cache, which badit does not read.
            is_log = path.suffix == ".log" and "wandb" in path.parts and not path.is_dir()
            if path.is_symlink() and not is_log:
                inside(folder, folder / path.relative_to(top))


def inside(folder: Path, path: Path) -> Path:
    """Returns the path; BaditError if it leads out of the folder or is not a valid path."""
    try:
        leaves = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a NUL character
        leaves = True
    if leaves:
        raise BaditError(f"{path}: leads out of {folder}; copy the file itself into the folder")
    return path


_held: set[Path] = set()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes within the context; creates it if it does not exist.

    The lock is reentrant and ends with the process. On file systems without locks, the folder is not locked.
    BaditError if another process holds the lock, or a link leads out of the folder.
    """
    place, is_new = folder.resolve(), not folder.exists()
    if place in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / OWNER
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            known = "another process"
            with suppress(BaditError):  # the file is not there yet, or no longer
                known = read_text(owner).strip()
            raise BaditError(
                f"{folder}: is in use by {known}; wait until it ends, or stop it"
            ) from None
        except OSError:
            pass
        _held.add(place)
        refuse_links(folder)
        write_text(owner, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        if place in _held:
            _held.remove(place)
            with suppress(OSError):  # the file system is read-only, or has become so
                owner.unlink()
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
        os.close(descriptor)


def cache_folder() -> Path:
    """Returns `$BADIT_CACHE`, else `$XDG_CACHE_HOME/badit`, else `~/.cache/badit`. The folder may not exist yet."""
    if chosen := os.environ.get("BADIT_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "badit")


def is_number(value: Any) -> bool:
    """Returns whether a value from a JSON file is a finite number."""
    # Not with math.isfinite, which raises OverflowError for very large integers.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
