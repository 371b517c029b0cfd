"""What badit prints: results to stdout, messages and a status line to stderr."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Terminal control characters, bidirectional text marks and lone surrogates; not line feeds and tabs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Escapes line breaks and control characters, because a terminal could execute the latter."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def say(line: str, *, red: bool = False) -> None:
    """Prints a line to stderr, escaped by :func:`one_line`; red on a terminal unless NO_COLOR is set."""
    in_red = red and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(
        f"\x1b[31m{one_line(line)}\x1b[0m" if in_red else one_line(line),
        file=sys.stderr,
        flush=True,
    )


def show(text: str) -> None:
    """Prints a result to stdout; escapes what its encoding lacks, and control characters except line feeds and tabs."""
    encoding = sys.stdout.encoding or "utf-8"
    escaped = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # valid in JSON too
    print(escaped.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def is_main_process() -> bool:
    """Returns whether this is rank 0 (accelerate, torchrun), or the only process."""
    return os.environ.get("RANK", "0") == "0"


def quiet_notices() -> None:
    """Hides notices of torch, torchao, bitsandbytes, transformers and PEFT; levels and filters of the user stay."""
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft)\.", append=True
    )
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        if (logger := logging.getLogger(name)).level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


_waiting = False


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows a status line on a terminal within the context, unless nested; yields a function that changes its text."""
    global _waiting
    if _waiting or not sys.stderr.isatty() or not is_main_process():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.text import Text

    _waiting = True
    try:
        with Console(stderr=True).status("") as shown:

            def change(text: str) -> None:
                line = Text(one_line(f"badit: {text} …"))
                line.truncate(shown.console.width - 2, overflow="ellipsis")
                shown.update(line, spinner="dots")  # with a spinner, the line is shown immediately

            change(text)
            yield change
    finally:
        _waiting = False
