#!/usr/bin/env python3
"""Screens the forms of the paper's system: stage 2 of the abilities experiments, "codes".

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/experiments/abilities_codes.py          # trains all cells; resumable
    python benchmarks/experiments/abilities_codes.py table    # prints the results as Markdown
    python benchmarks/experiments/abilities_codes.py phases   # the same for parts of the training

The question, the cells and the decision rules are in abilities-codes.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from screening import BENCHMARKS, Cell, Experiment

SEED = 20  # of the first part
FURTHER_SEEDS = (21, 22)  # of the second part
LORA = {"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05}
EXPERTS = {"name": "badit", "num_experts": 8, "r": 4, "lora_dropout": 0.05}
BAD = {**EXPERTS, "init_weights": "bad", "gated": "change"}
DIRECTIONS = {**EXPERTS, "init_weights": "directions"}
CLUSTERS = {"gates": "clusters", "key": "embedding", "regroup": None}
# As in the released code: in each tenth of the first half of the training. Gates of the change need
# no rescaling.
PUBLISHED = {"every": 0.1, "stop": 0.5, "solver": "paper", "restarts": 10, "rescale": False}
LAYER_CLUSTERS = {"gates": "clusters", "key": "layer", "regroup": None}
RANDOM_START = {**EXPERTS, "init_weights": "lora"}  # with clusters of each layer: cluster-gates
# Moves only the 5 % of components with the smallest changes, and starts them again.
RESET = {"every": 0.1, "stop": 0.5, "reset_smallest": 0.05}
ROUTER = {"gates": "mean_one"}
SLOW_ROUTER = {"router_lr_ratio": 0.3}


def clusters(start: Mapping[str, Any], codes: str, **options: Any) -> dict[str, Any]:
    """Returns a method with clusters of the key whose codes are of this kind."""
    return {**start, **CLUSTERS, "codes": codes, **options}


def layer_clusters(start: Mapping[str, Any], codes: str, **options: Any) -> dict[str, Any]:
    """Returns a method with clusters of each layer's input whose codes are of this kind."""
    return {**start, **LAYER_CLUSTERS, "codes": codes, **options}


def router(learning_rate: float, **options: Any) -> Cell:
    return Cell({**BAD, **ROUTER, "regroup": None, **options}, learning_rate, SLOW_ROUTER)


# In the order of training.
FIRST_PART = {
    "lora@2e-3": Cell(LORA, 2e-3),
    "bad-grouped@2e-3": Cell(clusters(BAD, "grouped"), 2e-3),
    "bad-matched@2e-3": Cell(clusters(BAD, "matched"), 2e-3),
    "bad-layer@2e-3": Cell(layer_clusters(BAD, "random"), 2e-3),
    "bad-layer-grouped@2e-3": Cell(layer_clusters(BAD, "grouped"), 2e-3),
    "bad-router-regroup@1e-3": router(1e-3, regroup=PUBLISHED),
    "bad-layer-grouped@4e-3": Cell(layer_clusters(BAD, "grouped"), 4e-3),
    "bad-layer-grouped-permuted@2e-3": Cell(
        layer_clusters(BAD, "grouped", permute_codes=True), 2e-3
    ),
    "bad-layer-regroup@2e-3": Cell(layer_clusters(BAD, "random", regroup=PUBLISHED), 2e-3),
    "bad-router-regroup@5e-4": router(5e-4, regroup=PUBLISHED),
    "bad-layer-grouped-regroup@2e-3": Cell(layer_clusters(BAD, "grouped", regroup=PUBLISHED), 2e-3),
    "directions-layer-grouped@2e-3": Cell(layer_clusters(DIRECTIONS, "grouped"), 2e-3),
    "bad-layer-grouped@1e-3": Cell(layer_clusters(BAD, "grouped"), 1e-3),
}
# Seed 20 of the first two of the second part.
STAGE_1 = {
    "lora@1e-3": BENCHMARKS / "results" / "abilities-cause" / "lora-20.json",
    "cluster-gates@2e-3": BENCHMARKS / "results" / "abilities-cause" / "badit-20.json",
}
SECOND_PART = {
    "lora@1e-3": Cell(LORA, 1e-3),
    "cluster-gates@2e-3": Cell(layer_clusters(RANDOM_START, "random"), 2e-3),
    **{
        name: FIRST_PART[name]
        for name in (
            "bad-layer-grouped@2e-3",
            "bad-layer@2e-3",
            "bad-layer-grouped-permuted@2e-3",
            "bad-layer-grouped-regroup@2e-3",
            "directions-layer-grouped@2e-3",
            "bad-router-regroup@5e-4",
        )
    },
}
# Added after two seeds: the groups of the gradients without their codes.
ADDED = {"bad-layer-grouped-random@2e-3": Cell(layer_clusters(BAD, "grouped-random"), 2e-3)}
# Added after the default was decided: later regrouping that starts the moved components again.
RESET_PART = {
    "bad-layer-grouped-reset@2e-3": Cell(layer_clusters(BAD, "grouped", regroup=RESET), 2e-3)
}
# Cells that can no longer become the candidate for the default; trained after the others.
LAST = ("bad-layer-grouped-regroup@2e-3", "bad-router-regroup@5e-4")
CELLS = {**FIRST_PART, **ADDED, **SECOND_PART, **RESET_PART}

# Parts of the training, by their steps.
PHASES = (range(1, 21), range(21, 51), range(51, 81), range(81, 114))


def main() -> None:
    experiment = Experiment("abilities-codes", CELLS, STAGE_1)
    if sys.argv[1:] == ["phases"]:
        for steps in PHASES:
            print(f"\nSteps {steps[0]} to {steps[-1]}:\n")
            print(experiment.table(CELLS, reference="lora@1e-3", steps=steps))
        return
    if sys.argv[1:] != ["table"]:
        experiment.train([(name, SEED) for name in {**FIRST_PART, **ADDED}])
        jobs = [(name, seed) for seed in FURTHER_SEEDS for name in {**SECOND_PART, **ADDED}]
        jobs.sort(key=lambda job: job[0] in LAST)
        jobs = [(name, seed) for seed in (SEED, *FURTHER_SEEDS) for name in RESET_PART] + jobs
        experiment.train(jobs)
    print(experiment.table(CELLS, reference="lora@1e-3"))


if __name__ == "__main__":
    main()
