"""A whole training run: BADIT with badit's trainer, against PEFT's LoRA with TRL's SFTTrainer.

    python benchmarks/speed/end_to_end.py [--data FOLDER]

Both train one epoch on the same tokenised instances with a loss on the answers only, the same model
in bfloat16 (or float32 on processors without bfloat16 instructions), batch size and optimizer. TRL
uses its fastest settings on a CPU: batches grouped by length, no gradient checkpointing, its loss
in chunks over labelled tokens only. The result is the number of tokens per second, without padding.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from measure import in_turns, keep, options, ratio
from peft import LoraConfig
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from workload import EXPERTS, RANK, TARGETS, adapted, base, data_options, fast_dtypes, instances

from badit import RegroupCallback, load_base_model
from badit.cli.entry import quiet_libraries
from badit.data import AnswerCollator
from badit.training.trainer import AnswerTrainer

BATCH, PER_TASK = 4, 2
DTYPE = fast_dtypes()[0]
SHARED: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-4,
    "use_cpu": True,
    "bf16": False,  # the base weights already have this dtype, the adapters are in float32
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1000,
    "disable_tqdm": True,
}


def ours(name: str, examples: list[dict[str, Any]], pad: int, folder: str) -> Callable[[], object]:
    trainer = AnswerTrainer(
        model=adapted(name, DTYPE),
        args=TrainingArguments(output_dir=folder, remove_unused_columns=False, **SHARED),
        train_dataset=examples,  # pyright: ignore[reportArgumentType] (a list is accepted)
        data_collator=AnswerCollator(pad),
        callbacks=[RegroupCallback(every=20)] if name == "badit" else [],
    )
    return trainer.train


def theirs(
    examples: list[dict[str, Any]], tokenizer: Any, folder: str, attention: str
) -> Callable[[], object]:
    rows = [
        {
            "input_ids": example["input_ids"],
            "completion_mask": [int(label != -100) for label in example["labels"]],
        }
        for example in examples
    ]
    model = base(DTYPE)
    model.set_attn_implementation(attention)
    width = EXPERTS * RANK
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            completion_only_loss=True,
            gradient_checkpointing=False,
            max_length=None,
            **SHARED,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=width, lora_alpha=8 * width, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    )
    return trainer.train


def main(arguments: argparse.Namespace) -> None:
    _, tokenizer = load_base_model("smollm2-135m", dtype=DTYPE)  # pyright: ignore[reportArgumentType]
    examples = instances(tokenizer, arguments.data, PER_TASK)
    tokens = sum(len(example["input_ids"]) for example in examples)
    pad = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "TRL, LoRA": theirs(examples, tokenizer, folder, "sdpa"),
            "TRL, LoRA, eager attention": theirs(examples, tokenizer, folder, "eager"),
            "badit, LoRA": ours("lora", examples, pad, folder),  # pyright: ignore[reportArgumentType]
            "badit, BADIT": ours("badit", examples, pad, folder),  # pyright: ignore[reportArgumentType]
        }
        samples = in_turns(runs, rounds=arguments.rounds)
    keep(
        "end_to_end",
        {
            "data": arguments.data if arguments.data == "builtin" else Path(arguments.data).name,
            "instances": len(examples),
            "tokens": tokens,
            "batch size": BATCH,
            "dtype": DTYPE,
            "tokens per second": {
                name: [tokens / s for s in values] for name, values in samples.items()
            },
            "speed to TRL's": {name: ratio(samples, "TRL, LoRA", name) for name in list(runs)[1:]},
        },
    )


if __name__ == "__main__":
    quiet_libraries()
    main(data_options(options(__doc__)).parse_args())
