"""Train a BADIT adapter on your own tasks, score it per task, and export it as a plain LoRA.

    python examples/own_tasks.py my-tasks.jsonl    # {task, instruction, input, output} per line
    python examples/own_tasks.py --small           # two of the built-in tasks, about a minute

Run it again to resume after an interruption. Completed steps are not repeated.
"""

import argparse
import json
from pathlib import Path

import badit
from badit.recipe.loading import build_recipe

parser = argparse.ArgumentParser()
parser.add_argument(
    "tasks",
    nargs="?",
    default="builtin",
    help="a .jsonl file of tasks (default: the built-in ones)",
)
parser.add_argument("--model", default="smollm2-135m", help="built-in name, local folder or hub id")
parser.add_argument("--output", default="runs/own-tasks")
parser.add_argument("--small", action="store_true", help="two tasks, four steps")
options = parser.parse_args()

known = badit.load_tasks(options.tasks)
for task in known:
    print(f"{task.name}: {len(task.train)} training and {len(task.test)} test instances")
# Without "split": "test" lines, the score is computed on held-out training instances.
scored = "test" if all(task.test for task in known) else "validation"
recipe = build_recipe(
    {
        "model": {"name": options.model},
        "data": {
            "source": options.tasks,
            "tasks": [task.name for task in known[:2]] if options.small else None,
            "test_per_task": 2 if options.small else None,
            "validation_per_task": 0 if scored == "test" else 2 if options.small else 10,
        },
        "method": {"name": "badit", "num_experts": 8, "r": 4},
        "training": {
            "num_train_epochs": 3,
            "max_steps": 4 if options.small else -1,
            "per_device_train_batch_size": 2 if options.small else 8,
            "learning_rate": 2e-3,
        },
        "evaluation": {"split": scored, "max_new_tokens": 8 if options.small else 50},
        "output": options.output,
    }
)
badit.train(recipe)  # also scores the run: writes scores.json and predictions/ to its folder
badit.Run(recipe.output).evaluate()  # scores it again
scores = json.loads((Path(recipe.output) / "scores.json").read_text(encoding="utf-8"))
for name, score in scores["tasks"].items():
    print(f"{name}: Rouge-L {score['rouge_l']:.1f}, exact match {score['exact_match']:.1f}")
exported = badit.Run(recipe.output).export(
    f"{options.output}-lora", all_tasks=True
)  # for use without badit
print(f"{exported.folder}: LoRAs of rank {exported.rank}, with {exported.record['mixture']}")
