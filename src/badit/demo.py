"""``badit demo``: the base model, LoRA and BADIT with the same parameter budget, on the built-in tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badit.data import own_input
from badit.errors import show
from badit.files import read_jsonl, refuse_links
from badit.render import score_table, text_table
from badit.run import Run, train

# Method and training options: equal parameter counts within 1 %, the best rates of docs/experiments/harness-c.md.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({"name": "base"}, {}),
    "LoRA": ({"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05}, {"learning_rate": 1e-3}),
    "BADIT": ({"name": "badit", "num_experts": 8, "r": 4}, {"optimizer": "orthogonal", "router_lr_ratio": 0.3}),
}
SAMPLES = 3


def run_demo(output: Path, epochs: float, seed: int) -> None:
    """Trains and scores the three runs, skips finished ones, and prints the results."""
    refuse_links(output)
    runs: dict[str, Run] = {}
    for name in METHODS:
        show(f"── {name} ──")
        runs[name] = train(demo_recipe(name, str(output / name.lower()), epochs, seed))
    show("\nScores on unseen instances of the 16 built-in tasks (EM: exact match)\n")
    show(score_table({name: run.scores for name, run in runs.items()}))
    budgets = [
        [name, f"{took['trainable_parameters']:,}", str(took["steps"]), f"{took['seconds']:.0f} s"]
        for name, run in runs.items()
        if (took := run.environment.get("training"))
    ]
    show("\n" + text_table(["method", "trainable parameters", "steps", "training"], budgets))
    show("\n" + _samples({name: run.predictions_path for name, run in runs.items()}))
    show(f"\nRuns: {output}")


def demo_recipe(name: str, output: str, epochs: float, seed: int) -> dict[str, Any]:
    """Returns the recipe of one method's run."""
    method, own = METHODS[name]
    training = {"num_train_epochs": epochs, "seed": seed, "learning_rate": 5e-4, "logging_steps": 5, "save_steps": 40}
    return {
        "model": {"name": "smollm2-135m"},
        "data": {"source": "builtin", "train_per_task": 40, "test_per_task": 10},
        "method": method,
        "training": {**training, **own},
        "evaluation": {"batch_size": 32, "max_new_tokens": 16},
        "output": output,
    }


def _samples(folders: Mapping[str, Path]) -> str:
    """Returns one test instance of each of ``SAMPLES`` tasks, with the answers of all methods."""
    files = sorted(next(iter(folders.values())).glob("*.jsonl"))
    lines = []
    for file in (files[i * len(files) // SAMPLES] for i in range(SAMPLES)):
        answers = {name: next(read_jsonl(folder / file.name)) for name, folder in folders.items()}
        reference = next(iter(answers.values()))
        lines += ["", f"[{file.stem}] {' '.join(own_input(reference['prompt']).split())}"]
        lines += [f"  {'reference':10} {reference['references'][0]}"]
        lines += [f"  {name:10} {' '.join(answer['prediction'].split())[:100]}" for name, answer in answers.items()]
    return "\n".join(lines[1:])
