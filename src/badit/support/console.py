"""What badit prints: results to stdout, messages and a status line to stderr."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

_Item = TypeVar("_Item")

# Terminal control characters, bidirectional text marks and lone surrogates;
# not line feeds and tabs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Escapes line breaks and control characters, because a terminal could execute the latter."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def say(line: str, *, red: bool = False) -> None:
    """Prints a line to stderr, escaped by :func:`one_line`.

    ``red`` has an effect on terminals only, and not if NO_COLOR is set.
    """
    line = one_line(line)
    if red and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\x1b[31m{line}\x1b[0m"
    print(line, file=sys.stderr, flush=True)


def say_once(line: str) -> None:
    """Prints a line that all ranks have; rank 0 prints it."""
    if is_main_process():
        say(line)


def show(text: str) -> None:
    """Prints a result to stdout.

    Escapes what the encoding of stdout lacks, and control characters except line feeds and tabs.
    """
    # This form of escape is also valid in JSON.
    escaped = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    encoding = sys.stdout.encoding or "utf-8"
    # Flushed at once, so that main() catches the error of a closed pipe, not Python's exit.
    print(escaped.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def is_main_process() -> bool:
    """Returns whether this is rank 0 (accelerate, torchrun), or the only process."""
    # The launchers' variable, because torch.distributed is known only after importing torch.
    return os.environ.get("RANK", "0") == "0"


def quiet_notices() -> None:
    """Hides notices of torch, torchao, bitsandbytes, transformers and PEFT.

    Log levels and warning filters that the user has set stay.
    """
    # Appended, so that filters of the user (-W, PYTHONWARNINGS) are matched first.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft)\.", append=True
    )
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


_is_waiting = False  # a status line is shown
_is_announced = False  # in a log: the next line of a nested status would only add detail
_is_quiet = False
_PATIENCE = 3.0  # seconds of a wait after which its bar is shown


@contextmanager
def status(text: str, *, in_logs: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows a status line on a terminal within the context, unless nested.

    Yields a function that changes its text. ``in_logs``: without a terminal, the text is printed
    once, if the wait takes over three seconds.
    """
    global _is_waiting, _is_announced
    if in_logs and not sys.stderr.isatty() and is_main_process() and not _is_quiet:
        if _is_announced:
            yield lambda text: None
            return
        timer = threading.Timer(_PATIENCE, say, [f"badit: {text} …"])
        timer.daemon = True
        timer.start()
        _is_announced = True
        try:
            yield lambda text: None
        finally:
            _is_announced = False
            timer.cancel()
        return
    # Two live displays, also those of two ranks, would overwrite each other's line.
    if _is_waiting or not sys.stderr.isatty() or not is_main_process():
        yield lambda text: None
        return

    from rich.console import Console
    from rich.text import Text

    _is_waiting = True
    try:
        with Console(stderr=True).status("") as status_line:

            def change(text: str) -> None:
                line = Text(one_line(f"badit: {text} …"))
                # The spinner and a space take two columns; a longer text would wrap.
                line.truncate(status_line.console.width - 2, overflow="ellipsis")
                # With a spinner, the line is shown immediately.
                status_line.update(line, spinner="dots")

            change(text)
            yield change
    finally:
        _is_waiting = False


def loading_libraries() -> AbstractContextManager[Any]:
    """A status for imports of torch and other libraries, which take seconds; also in a log."""
    return status("loading libraries", in_logs=True)


@contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """A context without the bars of :func:`waiting`, if ``is_quiet``."""
    global _is_quiet
    before = _is_quiet
    _is_quiet = before or is_quiet
    try:
        yield
    finally:
        _is_quiet = before


def waiting(items: Collection[_Item], text: str, unit: str) -> Iterator[_Item]:
    """Yields the items, and shows their number on stderr once the wait takes over three seconds.

    ``text`` says what is done with them.
    """
    from tqdm import tqdm

    # One bar at a time: a status line and a bar would overwrite each other.
    is_hidden = _is_quiet or _is_waiting or not is_main_process()
    bar = tqdm(
        items,
        desc=text,
        unit=unit,
        delay=_PATIENCE,
        disable=is_hidden,
        leave=False,
        dynamic_ncols=True,
    )
    yield from bar
