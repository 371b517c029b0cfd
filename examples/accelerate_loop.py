"""Train a BADIT adapter in a loop with accelerate, with the paper's regrouping (DOG).

python examples/accelerate_loop.py --small                       # four steps, about a minute
python examples/accelerate_loop.py --data my-tasks.jsonl         # a {task, input, output} per line
accelerate launch examples/accelerate_loop.py                    # several processes
"""

import argparse

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader

import badit
from badit.data import AnswerCollator, encode_examples

parser = argparse.ArgumentParser()
parser.add_argument(
    "--data", default="builtin", help="a .jsonl file of tasks (default: the built-in ones)"
)
parser.add_argument("--model", default="smollm2-135m", help="built-in name, local folder or hub id")
parser.add_argument("--output", default="runs/accelerate-loop")
parser.add_argument("--small", action="store_true", help="four steps")
options = parser.parse_args()
epochs, batch_size = (1, 2) if options.small else (3, 8)

accelerator = Accelerator(gradient_accumulation_steps=1 if options.small else 2)
model, tokenizer = badit.load_base_model(options.model, dtype="float32")
# With up to eight tasks, set num_clusters to their number.
model = get_peft_model(model, badit.BaditConfig(num_experts=8, r=4, task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

pairs = [(task, instance) for task in badit.load_tasks(options.data) for instance in task.train]
rows = encode_examples(tokenizer, pairs[: 8 if options.small else None])
collate = AnswerCollator(tokenizer.pad_token_id or 0)
loader = DataLoader(rows, batch_size, shuffle=True, collate_fn=collate)
model.to(accelerator.device)
badit.hooks_of(model).start_task({"all": loader})  # finds the clusters of prompts
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

steps = epochs * -(-len(loader) // accelerator.gradient_accumulation_steps)
regrouper = badit.Regrouper(model, steps, every=2 if options.small else 20, optimizer=optimizer)
accelerator.register_for_checkpointing(
    regrouper
)  # saved by accelerator.save_state(FOLDER), restored by load_state

model.train()
for _ in range(epochs):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(
                model(**batch).loss
            )  # the gates depend on the tokens with label -100, the prompt
            if accelerator.sync_gradients:
                regrouper.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                regrouper.step()
    accelerator.print({name: round(value, 3) for name, value in regrouper.metrics.items()})
regrouper.finish()
accelerator.unwrap_model(model).save_pretrained(
    f"{options.output}/adapter", is_main_process=accelerator.is_main_process
)
