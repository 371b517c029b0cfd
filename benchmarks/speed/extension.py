"""The training step of an added task, by the number of earlier tasks, against PEFT's LoRA.

    python benchmarks/speed/extension.py

SmolLM2-135M, 4 rows of 320 tokens. The run has 8 experts of rank 4. An added task has an expert of
rank 32, the default, or one of rank 5 and gates on 4 of the run's experts. LoRA has the total rank
that the task's rows use. Also the seconds of ``start_task``, before the training, by the number of
earlier tasks.
"""

from __future__ import annotations

import time
from typing import Any

from measure import in_turns, keep, options, ratio
from peft import LoraConfig, get_peft_model
from torch import nn
from workload import TARGETS, base, batch, fast_dtypes, training_step

from badit import BaditConfig
from badit.cli.entry import quiet_libraries
from badit.presets import with_preset
from badit.tuner import hooks_of

EXPERTS, RANK = 8, 4
CASES = ((32, 0), (5, 4))  # the rank of an added expert, and the earlier experts that it uses
EARLIER = (0, 31, 63)
ROWS, TOKENS = 4, 320
START_ROWS = 32  # of start_task, as many as it reads


def extended(dtype: str, earlier: int, own_rank: int, reused: int) -> tuple[nn.Module, float]:
    """Returns a model in the training of a task after ``earlier`` others, and start_task's time."""
    values = {"name": "cluster-gates", "num_experts": EXPERTS, "r": RANK, "lora_dropout": 0.0}
    config = BaditConfig(**with_preset(values), target_modules=TARGETS, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base(dtype), config)
    hooks: Any = hooks_of(model)
    hooks.start_task({"first": [batch(4, 32)]})
    for number in range(earlier):
        # A rank of its own and gates on earlier experts, as those of the last task.
        hooks.add_tasks([f"task {number}"], rank=own_rank, reused=reused, start=1.0)
        hooks.start_task({f"task {number}": [batch(2, 32)]})
    hooks.add_tasks(["last"], rank=own_rank, reused=reused)
    started = time.perf_counter()
    hooks.start_task({"last": [batch(ROWS, TOKENS)] * (START_ROWS // ROWS)})
    return model.train(), time.perf_counter() - started


def lora(dtype: str, rank: int) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base(dtype), config).train()


def main() -> None:
    rounds = options(__doc__, rounds=7).parse_args().rounds
    dtype = fast_dtypes()[0]
    inputs = batch(ROWS, TOKENS)
    result: dict[str, Any] = {"dtype": dtype, "rows": ROWS, "tokens": TOKENS}
    for own_rank, reused in CASES:
        rank = own_rank + reused * RANK
        steps = {"lora": training_step(lora(dtype, rank), inputs)}
        starts = {}
        for earlier in EARLIER:
            model, starts[earlier] = extended(dtype, earlier, own_rank, reused)
            steps[f"{earlier} earlier tasks"] = training_step(model, inputs)
        samples = in_turns(steps, rounds=rounds)
        result[f"rank {own_rank}, {reused} earlier experts used"] = {
            "rank": rank,
            "seconds": samples,
            "ratio to LoRA": {
                name: ratio(samples, name, "lora") for name in samples if name != "lora"
            },
            "seconds of start_task": starts,
        }
    keep("extension", result)


if __name__ == "__main__":
    quiet_libraries()
    main()
