"""Scaling of BADIT's training step with components, sequence length, batch and tasks.

    python benchmarks/speed/scaling.py

Seconds and peak memory of a step on SmolLM2-135M, one quantity varied at a time from 8 experts of
rank 4 and 4 rows of 320 tokens. BADIT has gated change and a router. The number of tasks does not
affect BADIT, which has no parameters per task. The baseline for tasks is MTL-LoRA, which has one
matrix per task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from measure import in_turns, keep, options, own_peak_memory, peak_memory_of
from workload import adapted, base, batch, fast_dtypes, training_step

from badit import hooks_of
from badit.cli.entry import quiet_libraries
from badit.recipe.method import resolve_method
from badit.training.methods import training_method

START = {"experts": 8, "rank": 4, "rows": 4, "tokens": 320}
VARIED: dict[str, list[int]] = {"experts": [2, 8, 64], "tokens": [80, 320, 1024], "rows": [1, 4, 8]}
TASKS = (4, 16, 64)


def step_of(
    name: str, dtype: str, experts: int, rank: int, rows: int, tokens: int
) -> Callable[[], None]:
    return training_step(adapted(name, dtype, experts=experts, rank=rank), batch(rows, tokens))


def step_by_tasks(method: str, dtype: str, tasks: int) -> Callable[[], None]:
    """Returns a step of a method with the given number of tasks."""
    names = [f"task {i}" for i in range(tasks)]
    resolved = resolve_method({"name": method})
    model = training_method(resolved).apply(base(dtype), names).train()
    inputs: dict[str, Any] = {**batch(START["rows"], START["tokens"])}
    if method == "badit":  # a step is refused without clusters
        hooks_of(model).start_task({"all": [inputs]})
    inputs["tasks"] = names[: START["rows"]]
    return training_step(model, inputs)


def main(arguments: argparse.Namespace) -> None:
    if arguments.memory_of:
        step = step_of(**json.loads(arguments.memory_of))
        step()
        step()
        print(own_peak_memory())
        return
    dtype = fast_dtypes()[0]
    result: dict[str, Any] = {}
    for quantity, values in VARIED.items():
        points = {
            f"{name}, {value}": {"name": name, "dtype": dtype, **START, quantity: value}
            for name in ("gated change", "lora")
            for value in values
        }
        result[quantity] = {
            "seconds": in_turns(
                {key: step_of(**point) for key, point in points.items()}, rounds=arguments.rounds
            ),
            "peak bytes": {
                k: peak_memory_of(__file__, "--memory-of", json.dumps(p)) for k, p in points.items()
            },
        }
    steps = {f"{m}, {n}": step_by_tasks(m, dtype, n) for m in ("badit", "mtl-lora") for n in TASKS}
    result["tasks"] = {"seconds": in_turns(steps, rounds=arguments.rounds)}
    keep("scaling", {"start": START, "dtype": dtype, **result})


if __name__ == "__main__":
    quiet_libraries()
    parser = options(__doc__)
    parser.add_argument(
        "--memory-of", help="a point as JSON: print the peak memory of two steps in bytes, and exit"
    )
    main(parser.parse_args())
