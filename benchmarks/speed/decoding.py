"""Decoding with an adapter: tokens per second against the base model, and with a merged weight.

    python benchmarks/speed/decoding.py

Greedy, one and eight prompts of 128 tokens at a time, 64 new tokens each, end tokens disabled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, keep, options, ratio
from workload import adapted, base, fast_dtypes

from badit.cli.entry import quiet_libraries

PROMPT, NEW = 128, 64
ROWS = (1, 8)


def decoder(model: Any, rows: int) -> Callable[[], object]:
    prompts = torch.randint(0, 49_000, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), **settings
    )


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    models: dict[str, Any] = {"base": base(dtype).eval()}
    models |= {name: adapted(name, dtype).eval() for name in ("lora", "badit")}
    models["merged"] = adapted("lora", dtype).eval().merge_and_unload()  # pyright: ignore
    result: dict[str, Any] = {}
    for rows in ROWS:
        samples = in_turns(
            {name: decoder(model, rows) for name, model in models.items()}, rounds=rounds
        )
        speeds = {
            name: [rows * NEW / value for value in values] for name, values in samples.items()
        }
        ratios = {name: ratio(samples, "base", name) for name in models if name != "base"}
        result[f"{rows} prompts at a time"] = {
            "tokens per second": speeds,
            "speed to the base model's": ratios,
        }
    return result


def main(arguments: argparse.Namespace) -> None:
    by_dtype = {dtype: measure(dtype, arguments.rounds) for dtype in fast_dtypes()}
    keep("decoding", {"prompt tokens": PROMPT, "new tokens": NEW, **by_dtype})


if __name__ == "__main__":
    quiet_libraries()
    main(options(__doc__, rounds=7).parse_args())
