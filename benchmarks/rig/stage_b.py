#!/usr/bin/env python3
"""Gates on the rig (benchmarks/experiments/rig-b.md).

The router's rate, half of the experts without gates, component gates:

    python benchmarks/rig/stage_b.py OPTIMIZER
"""

import itertools
import sys

from stage_a import options_of, run, search, varied

# "component" has additional parameters, so its learning rate is searched separately.
RATES = {"expert-1": 2e-3, "shared": 2e-3, "component": None}

optimizer = sys.argv[1]
for seed, (adapter, rate) in itertools.product(range(3), RATES.items()):
    cell = (adapter, optimizer)
    options = options_of(cell, rate or search(cell)[0])
    run(f"{adapter}_{optimizer}_s{seed}", [*options, *varied(seed)])
