"""One training step of SmolLM2-135M: BADIT, plain LoRA of the same rank, and usual mixtures.

    python benchmarks/speed/training_step.py

The floor is the arithmetic of the frozen base model, at the speed of a large matrix product: each
weight once forward and once backward (to the layer's input), for every token.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measure import in_turns, keep, matmul_peak, options, own_peak_memory, peak_memory_of, ratio
from workload import ADAPTERS, adapted, base, batch, fast_dtypes, training_step

from badit.cli.entry import quiet_libraries

ROWS, TOKENS = 4, 320


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    inputs = batch(ROWS, TOKENS)
    steps = {name: training_step(adapted(name, dtype), inputs) for name in ADAPTERS}
    samples = in_turns(steps, rounds=rounds)
    memory = {
        name: peak_memory_of(__file__, "--memory-of", name, "--dtype", dtype) for name in ADAPTERS
    }
    return {
        "seconds": samples,
        "ratio to lora": {name: ratio(samples, name, "lora") for name in ADAPTERS[1:]},
        "ratio to badit": {name: ratio(samples, name, "badit") for name in ADAPTERS[2:]},
        "peak bytes": memory,
        "peak ratio to lora": {name: memory[name] / memory["lora"] for name in ADAPTERS[1:]},
        "floor seconds": floor(dtype),
    }


def floor(dtype: str) -> float:
    """Returns seconds of the base model's matrix products, with logits only for labelled tokens."""
    model = base(dtype)
    head = model.get_output_embeddings().weight
    body = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and p is not head
    )
    labelled = int((batch(ROWS, TOKENS)["labels"] != -100).sum())
    operations = 4 * (body * ROWS * TOKENS + head.numel() * labelled)
    return operations / matmul_peak(getattr(torch, dtype))


def print_memory_of(name: str, dtype: str) -> None:
    step = training_step(adapted(name, dtype), batch(ROWS, TOKENS))
    for _ in range(2):  # the optimizer's state exists from the second step on
        step()
    print(own_peak_memory())


def main(arguments: argparse.Namespace) -> None:
    if arguments.memory_of:
        print_memory_of(arguments.memory_of, arguments.dtype)
        return
    result = {dtype: measure(dtype, arguments.rounds) for dtype in fast_dtypes()}
    keep("training_step", {"rows": ROWS, "tokens": TOKENS, **result})


if __name__ == "__main__":
    quiet_libraries()
    parser = options(__doc__, rounds=7)
    parser.add_argument(
        "--memory-of",
        choices=ADAPTERS,
        help="print the peak memory of two steps in bytes, and exit",
    )
    parser.add_argument("--dtype", default="float32")
    main(parser.parse_args())
