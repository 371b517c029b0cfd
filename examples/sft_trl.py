"""Train a BADIT adapter on chats with TRL's SFTTrainer, with the loss on the answers only.

    python examples/sft_trl.py chats.jsonl    # {"messages": [{"role": …, "content": …}]}
    python examples/sft_trl.py --small        # a few built-in questions, about a minute

Needs badit's extra trl: pip install '.[trl]' in badit's folder
"""

import argparse
import json

from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

import badit
from badit.data import answer_rows, prompt_text

parser = argparse.ArgumentParser()
parser.add_argument("chats", nargs="?", help="a .jsonl file of chats (default: the built-in tasks)")
parser.add_argument("--model", default="smollm2-135m", help="built-in name, local folder or hub id")
parser.add_argument("--output", default="runs/sft-trl")
parser.add_argument("--small", action="store_true", help="four steps on a few rows")
options = parser.parse_args()

if options.chats:
    with open(options.chats, encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
else:
    chats = [
        [
            {"role": "user", "content": prompt_text(task, instance)},
            {"role": "assistant", "content": instance.outputs[0]},
        ]
        for task in badit.load_tasks("builtin")
        for instance in task.train[:2]
    ]
# One row per answer, so that the gates of each answer depend on all preceding messages.
rows = [row for messages in chats for row in answer_rows(messages)]

model, tokenizer = badit.load_base_model(options.model)
model = get_peft_model(model, badit.BaditConfig(num_experts=8, r=4, task_type="CAUSAL_LM"))
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=options.output,
        per_device_train_batch_size=2 if options.small else 8,
        max_steps=4 if options.small else -1,
        num_train_epochs=3,
        report_to=[],  # or ["tensorboard"], …
        bf16=False,
        learning_rate=2e-3,
    ),
    train_dataset=Dataset.from_list(rows[:8] if options.small else rows),
)
badit.prepare(trainer)  # finds the clusters of prompts
trainer.train()
trainer.save_model(f"{options.output}/adapter")
