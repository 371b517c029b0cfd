"""Measurements of the speed benchmarks: alternatives in turns, ratios within a round.

The speed of shared machines drifts slowly, by more than the differences of interest. Each round
therefore runs every alternative once. Ratios are computed within a round, and the median over
rounds is reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from badit.support.environment import environment
from badit.support.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "speed"

Samples = dict[str, list[float]]


def in_turns(
    alternatives: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> Samples:
    """Returns wall-clock seconds by alternative and round, without the warm-up calls."""
    samples: Samples = {name: [] for name in alternatives}
    for number in tqdm(range(warmup + rounds), desc="Rounds", unit="round", leave=False):
        for name, call in alternatives.items():
            gc.collect()
            started = time.perf_counter()
            call()
            if number >= warmup:
                samples[name].append(time.perf_counter() - started)
    return samples


def ratio(
    samples: Mapping[str, Sequence[float]], numerator: str, denominator: str
) -> dict[str, Any]:
    """Returns the ratio of two alternatives, round by round, and its median."""
    values = [a / b for a, b in zip(samples[numerator], samples[denominator], strict=True)]
    return {"median": statistics.median(values), "values": values}


def peak_memory_of(script: str, *arguments: str) -> int:
    """Returns peak memory in bytes of a process ``python SCRIPT ARGUMENTS``, which prints it."""
    done = subprocess.run(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def own_peak_memory() -> int:
    """Returns peak memory in bytes of this process only; getrusage includes the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; the memory benchmarks need Linux")


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Writes ``results/speed/NAME.json``, with versions and hardware, and prints its medians."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"environment": environment(), **result})
    print(json.dumps(_medians(result), indent=1))


def _medians(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _medians(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return f"median {statistics.median(value):.4g} of {len(value)}"
    return value


def options(description: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """Returns a script's argument parser, with its docstring's first line and ``--rounds``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"measured rounds (default: {rounds})"
    )
    return parser


def matmul_peak(dtype: torch.dtype, *, size: int = 2048, rounds: int = 7) -> float:
    """Returns operations per second of one large square matrix product, the best of some rounds."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    seconds = in_turns({"product": lambda: a @ b}, rounds=rounds)["product"]
    return 2 * size**3 / min(seconds)


def memory_bandwidth(*, bytes_: int = 2**29, rounds: int = 5) -> float:
    """Returns bytes per second, read and written, of copying a large tensor, the best of rounds."""
    source = torch.ones(bytes_, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]
    return 2 * bytes_ / min(seconds)
