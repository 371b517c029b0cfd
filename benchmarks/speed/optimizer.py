"""One optimizer step of SmolLM2-135M's adapters: orthogonal updates against AdamW.

    python benchmarks/speed/optimizer.py

30 layers, gate_proj 576 → 1536, N = 32, on existing gradients. The share is the extra cost of
orthogonal updates over AdamW, divided by a whole training step with AdamW, round by round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, keep, options, ratio
from torch import nn
from workload import adapted, batch, fast_dtypes, training_step

from badit.cli.entry import quiet_libraries
from badit.training.optimizers import OrthogonalUpdates, lora_plus_groups

ROWS, TOKENS = 4, 320
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(lora_plus_groups(model, 1e-4, 1.0)),
    "lora+": lambda model: torch.optim.AdamW(lora_plus_groups(model, 1e-4)),
    "orthogonal": lambda model: OrthogonalUpdates(model, 1e-4),
}
STEPS = 5  # optimizer steps per sample; one step is too short to be timed reliably


def optimizer_steps(name: str, dtype: str) -> Callable[[], None]:
    model: nn.Module = adapted("badit", dtype)
    optimizer = OPTIMIZERS[name](model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.step()

    return steps


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    alternatives: dict[str, Callable[[], None]] = {
        name: optimizer_steps(name, dtype) for name in OPTIMIZERS
    }
    alternatives["training step"] = training_step(adapted("badit", dtype), batch(ROWS, TOKENS))
    samples = in_turns(alternatives, rounds=rounds, warmup=2)
    for name in OPTIMIZERS:
        samples[name] = [seconds / STEPS for seconds in samples[name]]
    shares = [
        (ours - adamw) / step
        for ours, adamw, step in zip(
            samples["orthogonal"], samples["adamw"], samples["training step"], strict=True
        )
    ]
    return {
        "seconds": samples,
        "ratio to adamw": {name: ratio(samples, name, "adamw") for name in ("lora+", "orthogonal")},
        "share of a training step": {"median": statistics.median(shares), "values": shares},
    }


def main(arguments: argparse.Namespace) -> None:
    result = {dtype: measure(dtype, arguments.rounds) for dtype in fast_dtypes()}
    keep("optimizer", {"rows": ROWS, "tokens": TOKENS, **result})


if __name__ == "__main__":
    quiet_libraries()
    main(options(__doc__, rounds=7).parse_args())
