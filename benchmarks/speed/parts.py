"""The cost of the default's parts on SmolLM2-135M: a step by kind of gates, and before training.

    python benchmarks/speed/parts.py [--data FOLDER]

Without gates there is one expert of rank 32, the rank of PEFT's LoRA. Before training, BADIT finds
its clusters of prompts on 512 of them (``start_task``), and ``init_weights="directions"``
decomposes every adapted weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from measure import in_turns, keep, options, ratio
from peft import LoraConfig, get_peft_model
from torch import nn
from workload import (
    MODEL,
    TARGETS,
    base,
    batch,
    data_options,
    fast_dtypes,
    instances,
    training_step,
)

from badit import BaditConfig, hooks_of, load_base_model
from badit.cli.entry import quiet_libraries
from badit.data import AnswerCollator

ROWS, TOKENS = 4, 320
WITHOUT, PEFT = "without gates", "PEFT's LoRA"
GATES: dict[str, dict[str, Any]] = {
    WITHOUT: {"num_experts": 1, "r": 32, "lora_alpha": 256, "gates": "mean_one"},
    "clusters": {"num_experts": 8, "r": 4, "lora_alpha": 32},
    "a trained router": {"num_experts": 8, "r": 4, "lora_alpha": 32, "gates": "mean_one"},
}


def adapted(dtype: str, **values: Any) -> nn.Module:
    return get_peft_model(
        base(dtype), BaditConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **values)
    ).train()


def prompts(source: str) -> list[Any]:
    """Returns batches of the first training prompts of all tasks, as a training sees them."""
    tokenizer = load_base_model(MODEL, dtype="float32")[1]
    rows = instances(tokenizer, source, 64)
    collate: Any = AnswerCollator(tokenizer.pad_token_id)
    return [collate(rows[i : i + 8]) for i in range(0, len(rows), 8)]


def measure(dtype: str, batches: list[Any], rounds: int) -> dict[str, Any]:
    steps: dict[str, Callable[[], None]] = {}
    for name, values in GATES.items():
        model = adapted(dtype, **values)
        if name == "clusters":
            hooks_of(model).start_task({"all": batches})
        steps[name] = training_step(model, batch(ROWS, TOKENS))
    # With BADIT's default dropout, which costs time too.
    lora = LoraConfig(
        r=32, lora_alpha=256, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    steps[PEFT] = training_step(get_peft_model(base(dtype), lora).train(), batch(ROWS, TOKENS))
    before = {
        "the adapters": partial(adapted, dtype),
        "the adapters and the clusters": lambda: hooks_of(adapted(dtype)).start_task(
            {"all": batches}
        ),
        "the adapters from the directions": partial(adapted, dtype, init_weights="directions"),
    }
    samples = in_turns(steps, rounds=rounds, warmup=2)
    return {
        "seconds of a step": samples,
        "ratio to a step without gates": {
            name: ratio(samples, name, WITHOUT) for name in GATES if name != WITHOUT
        },
        "ratio to PEFT's LoRA": {name: ratio(samples, name, PEFT) for name in GATES},
        "seconds before training": in_turns(before, rounds=1, warmup=0),
    }


def main(arguments: argparse.Namespace) -> None:
    batches = prompts(arguments.data)
    dtype = fast_dtypes()[0]
    result = {dtype: measure(dtype, batches, arguments.rounds)}
    keep(
        "parts",
        {
            "rows": ROWS,
            "tokens": TOKENS,
            "data": "SuperNI" if arguments.data != "builtin" else "builtin",
            **result,
        },
    )


if __name__ == "__main__":
    quiet_libraries()
    main(data_options(options(__doc__, rounds=7)).parse_args())
