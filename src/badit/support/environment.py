"""The environment of a result: versions, hardware, threads, memory."""

import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Returns versions, hardware and thread settings of this process."""
    import torch

    packages, commit, processor = {}, None, platform.processor() or platform.machine()
    for name in (
        "badit",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "scipy",
        "numpy",
        "trl",
    ):
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    if ((root := Path(__file__).parents[3]) / ".git").exists():  # badit is imported from a checkout
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
    with suppress(OSError):
        if model := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M):
            processor = model[1].strip()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),  # virtual machines of one name differ in them
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": packages,
    }


def peak_memory() -> float:
    """Returns the peak memory of this process in GiB: of its GPUs if there are any, else the resident set size."""
    import torch

    if torch.cuda.is_available():
        most = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    else:  # getrusage returns kilobytes, on macOS bytes
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return round(most / 2**30, 2)
