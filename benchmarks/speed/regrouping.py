"""DOG: its share of a training run, and the cost of one layer by components and weight size.

    python benchmarks/speed/regrouping.py

There are two parts: the Gram matrix of a layer's gradients, computed at every optimizer step, and
the grouping, solved on the mean of the Gram matrices every 20 steps. The exponents are slopes of
log seconds over log size.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import in_turns, keep, options
from transformers import TrainerControl, TrainerState, TrainingArguments
from workload import adapted, batch, fast_dtypes, training_step

from badit import RegroupCallback
from badit.cli.entry import quiet_libraries
from badit.method import cosine_gram, group_components

EVERY = 20
COMPONENTS = (32, 64, 128, 256, 512)
SIZES = (2_000, 5_000, 10_000, 20_000)
EXPERTS = 8


def share(rounds: int, dtype: str) -> dict[str, Any]:
    """Returns seconds of a step without DOG, of its Gram matrices, and of a regrouping."""
    model = adapted("badit", dtype)
    inputs = batch(4, 320)
    step = training_step(model, inputs)
    args = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True)
    state, control = TrainerState(max_steps=10**6, is_world_process_zero=True), TrainerControl()
    seconds: dict[str, list[float]] = {"step": [], "grams": [], "regrouping": []}
    with tempfile.TemporaryDirectory() as folder:
        callback = RegroupCallback(
            every=EVERY, stop=1.0, log_path=Path(folder) / "regroupings.jsonl"
        )
        callback.on_train_begin(args, state, control, model=model)
        step()
        for _ in range(rounds):
            seconds["step"].append(_timed(step))
            state.global_step += EVERY
            _gradients(model)
            seconds["grams"].append(
                _timed(lambda: callback.on_pre_optimizer_step(args, state, control))
            )
            seconds["regrouping"].append(_timed(lambda: callback.on_step_end(args, state, control)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    dog = medians["grams"] + medians["regrouping"] / EVERY
    return {"every": EVERY, "seconds": seconds, "share of training": dog / (medians["step"] + dog)}


def _gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def _timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def one_layer(rounds: int) -> dict[str, Any]:
    """Returns seconds by number of components N (of 8 experts) and by their length D."""
    grams, groupings = {}, {}
    for components in COMPONENTS:
        current = np.arange(components) // (components // EXPERTS)
        pairs = {
            size: (torch.randn(components, size // 2), torch.randn(size // 2, components))
            for size in SIZES
        }
        for size, pair in pairs.items():
            grams[f"N {components}, D {size}"] = lambda pair=pair: cosine_gram(*pair)
        gram = cosine_gram(*pairs[SIZES[-1]]).double().numpy()
        groupings[f"N {components}"] = lambda gram=gram, current=current: group_components(
            gram, current
        )
    gram_seconds = in_turns(grams, rounds=rounds)
    grouping_seconds = in_turns(groupings, rounds=rounds)
    medians = {
        name: statistics.median(values)
        for name, values in (gram_seconds | grouping_seconds).items()
    }
    largest_D = {n: medians[f"N {n}, D {SIZES[-1]}"] for n in COMPONENTS}
    return {
        "gram seconds": gram_seconds,
        "grouping seconds": grouping_seconds,
        "exponents": {
            f"gram in N at D {SIZES[-1]}": _slope(largest_D),
            "gram in D at N 128": _slope({d: medians[f"N 128, D {d}"] for d in SIZES}),
            "grouping in N": _slope({n: medians[f"N {n}"] for n in COMPONENTS}),
        },
        f"one layer at N 128, D {SIZES[-1]}: seconds": medians[f"N 128, D {SIZES[-1]}"]
        + medians["N 128"],
    }


def _slope(seconds: dict[int, float]) -> float:
    """Returns the least-squares slope of log seconds on log size."""
    x = [math.log(size) for size in seconds]
    y = [math.log(value) for value in seconds.values()]
    return statistics.linear_regression(x, y).slope


def main(arguments: argparse.Namespace) -> None:
    dtype = fast_dtypes()[0]
    keep(
        "regrouping",
        {
            "dtype": dtype,
            **share(arguments.rounds, dtype),
            "one layer": one_layer(arguments.rounds),
        },
    )


if __name__ == "__main__":
    quiet_libraries()
    main(options(__doc__, rounds=7).parse_args())
