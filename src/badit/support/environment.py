"""The environment of a result: versions, hardware, threads, memory."""

import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from badit.support.console import one_line

#: The environment variable with what pip installs badit from, for model cards.
INSTALL_FROM = "BADIT_INSTALL_FROM"
_PACKAGES = [
    "badit",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "scipy",
    "numpy",
    "trl",
]


def environment() -> dict[str, Any]:
    """Returns versions, hardware and thread settings of this process."""
    import torch

    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        # Virtual machines of one processor name differ in the instructions.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": _versions(),
    }


def how_to_install() -> str:
    """Returns what loading an adapter requires, with the command that installs it, in Markdown.

    Without the setting no address is known: badit may not be on an index, and the place that it was
    installed from here may be private.
    """
    place = one_line(os.environ.get(INSTALL_FROM, "")).replace("`", "").strip()
    command = f" (`pip install {shlex.quote(place)}`)" if place else ""
    return f"the Python package badit{command}"


def peak_memory() -> float:
    """Returns the peak memory of this process in GiB.

    This is the memory of its GPUs if there are any, else the resident set size.
    """
    import torch

    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        peak_bytes = sum(torch.cuda.max_memory_allocated(i) for i in devices)
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform != "darwin":  # elsewhere, the unit is the kilobyte
            peak_bytes *= 1024
    return round(peak_bytes / 2**30, 2)


def _commit() -> str | None:
    """Returns the checked out commit if badit is imported from a checkout."""
    root = Path(__file__).parents[3]
    # git would also find a repository around an installed package, with its own commits.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return git.stdout.strip()
    return None


def _processor() -> str:
    # On Linux, platform.processor() is empty or only the architecture.
    with suppress(OSError):
        model_name = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
        if model_name:
            return model_name[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        # trl comes only with an extra.
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
