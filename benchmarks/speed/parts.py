"""The cost of the default's parts on SmolLM2-135M: a step by kind of gates, and before training.

    python benchmarks/speed/parts.py [--data FOLDER]

Without gates there is one expert of rank 32, the rank of PEFT's LoRA. Steps are also measured with
64 experts, N = 256. Before training, BADIT decomposes every adapted weight (except for
``cluster-gates``), finds its clusters on up to 256 prompts and computes their codes from gradients
(``start_task``). The share is that of a run of 113 steps of 8 rows of the same data.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
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
from badit.presets import with_preset
from badit.training.attention import fast_on_short_sequences

ROWS, TOKENS = 4, 320
STEPS = 113  # of a run
WITHOUT, PEFT = "without gates", "PEFT's LoRA"
GATES: dict[str, dict[str, Any]] = {
    WITHOUT: {"num_experts": 1, "r": 32, "lora_alpha": 256, "gates": "mean_one"},
    "badit": {"name": "badit"},
    "cluster-gates": {"name": "cluster-gates"},
    "a trained router": {"name": "cluster-gates", "gates": "mean_one"},
}
MANY = {"badit": {"name": "badit", "num_experts": 64}}
# Random codes need no gradients, so the last one's time is that of its key.
STARTED: dict[str, dict[str, Any]] = {
    "badit": {"name": "badit"},
    "cluster-gates": {"name": "cluster-gates"},
    "key of embeddings": {"name": "badit", "key": "embedding", "codes": "random"},
}


def adapted(dtype: str, **section: Any) -> nn.Module:
    experts = {"num_experts": 8, "r": 4, "lora_alpha": 32}
    values = {**experts, **with_preset(section)}
    config = BaditConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **values)
    return get_peft_model(base(dtype), config).train()


def lora(dtype: str, rank: int) -> nn.Module:
    # With BADIT's default dropout, which costs time too.
    config = LoraConfig(
        r=rank,
        lora_alpha=8 * rank,
        lora_dropout=0.05,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base(dtype), config).train()


def prompts(source: str) -> list[Any]:
    """Returns batches of the first training prompts of all tasks, mixed as in training."""
    tokenizer = load_base_model(MODEL, dtype="float32")[1]
    rows = instances(tokenizer, source, 64)
    random.Random(0).shuffle(rows)
    collate: Any = AnswerCollator(tokenizer.pad_token_id)
    return [collate(rows[i : i + 8]) for i in range(0, len(rows), 8)]


def steps_of(dtype: str, sections: Mapping[str, Any], rank: int, rounds: int) -> dict[str, Any]:
    """Measures steps of BADIT's forms against PEFT's LoRA of the same rank."""
    inputs = batch(ROWS, TOKENS)
    steps = {}
    for name, section in sections.items():
        model = adapted(dtype, **section)
        # A step is refused without clusters; its time does not depend on their prompts.
        hooks_of(model).start_task({"all": [inputs]})
        steps[name] = training_step(model, inputs)
    steps[PEFT] = training_step(lora(dtype, rank), inputs)
    samples = in_turns(steps, rounds=rounds, warmup=2)
    ratios = {name: ratio(samples, name, PEFT) for name in sections}
    return {"seconds of a step": samples, "ratio to PEFT's LoRA": ratios}


def before_training(dtype: str, batches: Sequence[Any]) -> dict[str, Any]:
    """Measures the start of training, and its share of a run."""
    seconds: dict[str, Any] = {}
    for name, section in STARTED.items():
        started = time.perf_counter()
        model: Any = adapted(dtype, **section)
        created = time.perf_counter()
        with fast_on_short_sequences(model.get_base_model()):  # as in training
            hooks_of(model).start_task({"all": batches})
            ready = time.perf_counter()
            # After a first step, which allocates memory.
            training_step(model, batches[0])()
            steps = [training_step(model, inputs) for inputs in batches[:: len(batches) // 8]]
            begun = time.perf_counter()
            for step in steps:
                step()
        of_step = (time.perf_counter() - begun) / len(steps)
        seconds[name] = {
            "the adapters": created - started,
            "clusters and codes": ready - created,
            "a step of the data": of_step,
            f"share of {STEPS} steps": (ready - started) / (STEPS * of_step),
        }
    return seconds


def main(arguments: argparse.Namespace) -> None:
    batches = prompts(arguments.data)
    dtype = fast_dtypes()[0]
    result = {
        dtype: {
            "rank 32": steps_of(dtype, GATES, 32, arguments.rounds),
            "rank 256": steps_of(dtype, MANY, 256, arguments.rounds),
            "before training": before_training(dtype, batches),
        }
    }
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
