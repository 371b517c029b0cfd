"""Time of a training step and of a decoded token by kind of operation, for every adapter.

    python benchmarks/speed/step_profile.py

Uses torch's profiler. The time of an operation excludes the operations it calls. Medians over
rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from decoding import decoder
from measure import keep, options
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from training_step import ROWS, TOKENS
from workload import ADAPTERS, adapted, base, batch, fast_dtypes, training_step

from badit.cli.entry import quiet_libraries

# An operation belongs to the first kind that has a part of the operation's name.
KINDS = {
    "matrix products": ("::mm", "::addmm", "::bmm", "linear", "::matmul", "::mv", "einsum"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("adam", "foreach"),
    "copies and casts": (
        "copy_",
        "::cat",
        "clone",
        "contiguous",
        "index",
        "stack",
        "::fill_",
        "zero_",
    ),
    "element by element": (
        *("::mul", "::add", "::sub", "::div", "::neg", "::pow", "rsqrt"),
        *("silu", "softmax", "::mean", "::sum"),
    ),
}
OTHERS = "the rest"


def kind_of(operation: str) -> str:
    for kind, words in KINDS.items():
        if any(word in operation.lower() for word in words):
            return kind
    return OTHERS


def seconds_by_kind(call: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    seconds: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def median_by_kind(call: Callable[[], object], rounds: int) -> dict[str, float]:
    call()
    profiles = [seconds_by_kind(call) for _ in range(rounds)]
    return {
        kind: statistics.median(seconds.get(kind, 0.0) for seconds in profiles)
        for kind in (*KINDS, OTHERS)
    }


def main(arguments: argparse.Namespace) -> None:
    result: dict[str, Any] = {}
    for dtype in fast_dtypes():
        steps, tokens = {}, {}
        for name in tqdm(ADAPTERS, desc=dtype, leave=False):
            steps[name] = median_by_kind(
                training_step(adapted(name, dtype), batch(ROWS, TOKENS)), arguments.rounds
            )
        for name in tqdm(("base", "lora", "badit"), desc=dtype, leave=False):
            model = base(dtype) if name == "base" else adapted(name, dtype)
            tokens[name] = median_by_kind(decoder(model.eval(), 1), arguments.rounds)
        result[dtype] = {"seconds of a step": steps, "seconds of 64 tokens": tokens}
    keep("step_profile", {"rows": ROWS, "tokens": TOKENS, **result})


if __name__ == "__main__":
    quiet_libraries()
    main(options(__doc__, rounds=3).parse_args())
