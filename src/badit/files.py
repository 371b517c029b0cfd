"""File operations: strict reading, writing each file whole or not at all, and no way out of a folder by a link.

Commands on a folder that may come from elsewhere (a run, a comparison, an export) begin with :func:`refuse_links`.
Names that are read from a file go through :func:`inside`. What cannot be read or written is a BaditError.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from badit.errors import BaditError, explained

# In a folder that is in use: the process that uses it.
OWNER = ".owner"


def read_text(file: Path) -> str:
    """The text of a UTF-8 file; a pipe or a device is refused."""
    return "".join(line for _, line in lines_of(file))


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, read one by one; only \\n ends a line."""
    with explained(file, action="read"):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise BaditError(f"{file}: cannot be read (a pipe or a device); put a file there")
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    raise BaditError(f"{file}: starts with a byte order mark; save the file as UTF-8 without one")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    place = stream.tell() - len(line) + error.start
                    raise BaditError(f"{file}: not UTF-8 at byte {place}; save the file as UTF-8") from None
                yield number, text


def parse_json(text: str, *, file: Path, first_line: int = 1, constants: bool = False) -> Any:
    """The JSON value in `text`, which starts at line `first_line` of `file`, with NaN and infinities if `constants`."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(entries := dict(pairs)) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {repeated!r:.60} is there twice; keep one")
        return entries

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON; use a number or null")

    try:
        value = json.loads(text, parse_constant=None if constants else refuse, object_pairs_hook=distinct)
        if "\\ud" in text.lower():  # an escaped surrogate; encoding finds one without its other half
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise BaditError(f"{file}: invalid JSON at line {line} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # also nested too deeply, or a number of thousands of digits
        raise BaditError(f"{file}: {error} (line {first_line} on)") from None
    return value


def read_json(path: Path, text: str | None = None, line: int = 1) -> dict[str, Any]:
    """The one JSON object of a file, or of its ``line`` with this ``text``; numbers may be NaN or infinite."""
    value = parse_json(read_text(path) if text is None else text, file=path, first_line=line, constants=True)
    if not isinstance(value, dict):
        raise BaditError(f"{path}: must hold one JSON object, not a {type(value).__name__} (line {line})")
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, none if it is missing; a last line that a crash cut short is left out."""
    for number, line in lines_of(path) if path.is_file() else ():
        if line.endswith("\n"):
            yield read_json(path, line[:-1], number)


def refuse_other_format(content: Mapping[str, Any], path: Path, known: int) -> None:
    """Raises BaditError unless a file's ``format``, the version of its structure, is the known one."""
    found = content.get("format")
    if found is True or found != known:
        fix = "pip install --upgrade badit, or make the file again"
        raise BaditError(f"{path}: format: is {found!r:.60}, this badit reads {known}: {fix}")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: never half of it, even if the process or the machine stops."""
    partial = path.with_name(path.name + ".partial")
    with explained(path, action="written"):
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8", newline="\n") as file:  # "x" follows no link
            file.write(text)
        sync(partial)
        partial.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object whole, as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def rewind_log(path: Path, step: int) -> None:
    """Drops the lines of a log, JSON objects with a ``step``, that a run resumed at ``step`` logs again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in (read_jsonl(path) if step else ()) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def append_to_log(path: Path, *lines: Mapping[str, Any]) -> None:
    """Adds lines; a link in the log's place is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with open(os.open(path, flags, mode=0o666), "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link (but not its target) or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(partial: Path, final: Path) -> None:
    """Replaces an older folder by a finished one, whose files can be read by whom the folder can be."""
    for path in [*partial.rglob("*"), partial]:
        if path.is_file():  # safetensors makes its files private
            path.chmod(partial.stat().st_mode & 0o666)
        sync(path)
    remove(final)
    os.replace(partial, final)
    sync(final.parent)


def copy_folder(source: Path, target: Path) -> None:
    """Replaces ``target`` by a copy of ``source``, whole or not at all; a link out of ``source`` is refused."""
    refuse_links(source)
    partial = target.with_name(target.name + ".partial")
    remove(partial)
    shutil.copytree(source, partial, symlinks=True)
    replace_folder(partial, target)


def refuse_links(folder: Path) -> None:
    """Raises BaditError if something in the folder is a link out of it; the folder itself may be a link."""
    top = folder.resolve()
    for place, folders, files in os.walk(top):  # not through links to folders
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink():
                inside(folder, folder / path.relative_to(top))
        if "config.yaml" in files or Path(place).parent.name == "stages":  # a run, or a stage of one
            # Where wandb has links to its logs in the user's cache; badit reads nothing there.
            folders[:] = [name for name in folders if name != "wandb"]


def inside(folder: Path, path: Path) -> Path:
    """The path; raises BaditError if it leads out of the folder, or if no system allows it."""
    try:
        leaves = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link that leads to itself, or a NUL
        leaves = True
    if leaves:
        raise BaditError(f"{path}: leads out of {folder}; put the file itself there")
    return path


_held: set[Path] = set()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Within, other processes are kept out of a folder, which is made if it is not there.

    The lock ends with the process, which may enter again what it holds already. File systems without locks are used
    without one. BaditError if another process holds the folder, or a link leads out of it.
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
            known = read_text(owner).strip() if owner.is_file() else "another process"
            raise BaditError(f"{folder}: is in use by {known}; wait until it has ended, or stop it") from None
        except OSError:
            pass
        _held.add(place)
        refuse_links(folder)
        write_text(owner, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        if place in _held:
            _held.remove(place)
            with suppress(OSError):  # on a file system that is read-only, or has become so
                owner.unlink()
        os.close(descriptor)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def cache_folder() -> Path:
    """`$BADIT_CACHE`, else `$XDG_CACHE_HOME/badit`, else `~/.cache/badit`. The folder may not exist yet."""
    if chosen := os.environ.get("BADIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "badit"
