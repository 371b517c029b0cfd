#!/usr/bin/env python3
"""Gates on the rig (docs/experiments/rig-b.md): router's rate, half of the experts, components.

python benchmarks/rig/stage_b.py OPTIMIZER
"""

import itertools
import sys

from stage_a import ADAPTERS, OPTIMIZERS, run, search, varied

# "component" has additional parameters, so its learning rate is searched separately.
RATES = {"expert-1": 2e-3, "shared": 2e-3, "component": None}

optimizer = sys.argv[1]
for seed, (adapter, rate) in itertools.product(range(3), RATES.items()):
    rate = rate or search(adapter, optimizer)[0]
    options = [*ADAPTERS[adapter], *OPTIMIZERS[optimizer][0], "--lr", f"{rate:g}", *varied(seed)]
    run(f"{adapter}_{optimizer}_s{seed}", options)
