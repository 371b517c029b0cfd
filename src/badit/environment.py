"""The environment of a result: versions, hardware, threads, memory."""

import logging
import os
import platform
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from badit.errors import one_line


def is_main_process() -> bool:
    """Returns whether this is rank 0 (accelerate, torchrun), or the only process."""
    return os.environ.get("RANK", "0") == "0"


def quiet_notices() -> None:
    """Hides log messages of torch, torchao and bitsandbytes at import, and FutureWarnings of transformers and PEFT.

    Logging levels and warning filters set by the user take precedence.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.", append=True)
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


def environment() -> dict[str, Any]:
    """Returns versions, hardware and thread settings of this process."""
    import torch

    packages, commit, processor = {}, None, platform.processor() or platform.machine()
    for name in ("badit", "torch", "transformers", "peft", "accelerate", "safetensors", "scipy", "numpy", "trl"):
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    root = Path(__file__).parents[2]
    if (root / ".git").exists():  # badit is imported from a checkout
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    with suppress(OSError):
        if model := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M):
            processor = model[1].strip()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": packages,
    }


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes: of its GPUs if there are any, else the resident set size."""
    import torch

    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage returns kilobytes, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
