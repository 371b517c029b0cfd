#!/usr/bin/env python3
"""Regrouping on the rig (benchmarks/experiments/rig-dog.md): expert gates with and without DOG.

python benchmarks/rig/stage_dog.py
"""

import itertools

from stage_a import options_of, run, varied

VARIANTS = {
    "20": ["--dog", "20"],
    "80": ["--dog", "80"],
    "20-must-pay": ["--dog", "20", "--must-pay"],
}
CELLS = [("orthogonal", variant) for variant in VARIANTS] + [("adamw", "20")]

for seed, (optimizer, variant) in itertools.product(range(3), CELLS):
    options = [*options_of(("expert", optimizer), 2e-3), *VARIANTS[variant], *varied(seed)]
    run(f"dog-{variant}_{optimizer}_s{seed}", options)
