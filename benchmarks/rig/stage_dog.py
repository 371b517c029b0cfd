#!/usr/bin/env python3
"""Regrouping on the rig (docs/experiments/rig-dog.md): expert gates with and without DOG, after stage A's search.

python benchmarks/rig/stage_dog.py
"""

import itertools

from stage_a import ADAPTERS, OPTIMIZERS, run, search, varied

VARIANTS = {
    "none": [],
    "20": ["--dog", "20"],
    "80": ["--dog", "80"],
    "20-must-pay": ["--dog", "20", "--must-pay"],
}

for seed, optimizer, (variant, options) in itertools.product(range(3), ("orthogonal", "adamw"), VARIANTS.items()):
    rate = f"{search('expert', optimizer)[0]:g}"
    cell = [*ADAPTERS["expert"], *OPTIMIZERS[optimizer][0], "--lr", rate, *options, *varied(seed)]
    run(f"dog-{variant}_{optimizer}_s{seed}", cell)
