"""BAD: the randomised SVD against torch's exact SVD, and the time to initialise BADIT on SmolLM2.

    python benchmarks/speed/decomposition.py

The matrix is 4096 × 14336, the size of Llama-3-8B's gate projection, with a spectrum that decays
like that of a trained weight (σ_i ∝ i^−0.3). The 32 leading singular triples are computed.
"""

from __future__ import annotations

import argparse
import time

import torch
from measure import in_turns, keep, options, ratio
from peft import get_peft_model
from workload import EXPERTS, RANK, TARGETS, base

from badit import BaditConfig
from badit.cli.entry import quiet_libraries
from badit.method import top_singular_triples

ROWS, COLUMNS, WANTED = 4096, 14336, 32


def weight() -> torch.Tensor:
    """Returns a random matrix with that spectrum: orthogonal bases of scaled Gaussian matrices."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=generator))
    return left * torch.arange(1, ROWS + 1) ** -0.3 @ right.T


def errors(matrix: torch.Tensor) -> dict[str, float]:
    """Returns a triple's largest residual ‖W v − σ u‖ / σ, and the largest relative error of σ."""
    triples = top_singular_triples(matrix, WANTED)
    u, s, v = (tensor.double() for tensor in triples)
    v = v if v.shape[0] == matrix.shape[1] else v.T
    residual = torch.linalg.vector_norm(matrix.double() @ v - u * s, dim=0) / s
    exact = torch.arange(1, WANTED + 1, dtype=torch.float64) ** -0.3
    return {
        "residual": float(residual.max()),
        "singular value": float(((s - exact).abs() / exact).max()),
    }


def initialisation(rounds: int) -> list[float]:
    """Returns seconds of ``get_peft_model`` on a loaded SmolLM2: 30 layers, 32 components each."""
    seconds = []
    for _ in range(rounds):
        model = base("bfloat16")
        config = BaditConfig.released(
            num_experts=EXPERTS, r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        started = time.perf_counter()
        get_peft_model(model, config)
        seconds.append(time.perf_counter() - started)
    return seconds


def main(arguments: argparse.Namespace) -> None:
    matrix = weight()
    ways = {
        "exact": lambda: torch.linalg.svd(matrix, full_matrices=False),
        "randomised": lambda: top_singular_triples(matrix, WANTED, method="randomized"),
    }
    samples = in_turns(ways, rounds=arguments.rounds, warmup=0)
    keep(
        "decomposition",
        {
            "shape": [ROWS, COLUMNS],
            "triples": WANTED,
            "seconds": samples,
            "exact / randomised": ratio(samples, "exact", "randomised"),
            "largest relative error": errors(matrix),
            "initialisation seconds": initialisation(arguments.rounds),
        },
    )


if __name__ == "__main__":
    quiet_libraries()
    main(options(__doc__).parse_args())
