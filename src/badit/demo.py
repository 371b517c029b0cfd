"""``badit demo``: the base model, LoRA and BADIT with the same budget, on the built-in tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from badit.data import own_input
from badit.files import read_jsonl
from badit.render import score_table, text_table
from badit.run import Run, train

# LoRA gets the rank whose parameters equal those of BADIT's 8 experts of rank 4 and their routers, to 1 %.
METHODS: dict[str, dict[str, Any]] = {
    "base": {"name": "base"},
    "LoRA": {"name": "lora", "r": 34, "lora_alpha": 272, "lora_dropout": 0.05},
    "BADIT": {"name": "badit", "num_experts": 8, "r": 4, "regroup": {"every": 10}},
}
SAMPLES = 3


def run_demo(output: Path, epochs: float, seed: int) -> None:
    """Trains and scores the three runs, or those that are left, and prints what came of them."""
    runs: dict[str, Run] = {}
    for name, method in METHODS.items():
        print(f"── {name} ──", flush=True)
        runs[name] = train(demo_recipe(method, str(output / name.lower()), epochs, seed))
    print("\nScores on unseen instances of the 16 built-in tasks (EM: exact match)\n")
    print(score_table({name: run.scores for name, run in runs.items()}))
    print("\n" + _budget(runs))
    print("\n" + _angles(runs["BADIT"].regroupings_path))
    print("\n" + _samples({name: run.predictions_path for name, run in runs.items()}))
    print(f"\nRuns: {output}")


def demo_recipe(method: Mapping[str, Any], output: str, epochs: float, seed: int) -> dict[str, Any]:
    """One method's run of the demo."""
    return {
        "model": {"name": "smollm2-135m"},
        "data": {"source": "builtin", "train_per_task": 40, "test_per_task": 10},
        "method": dict(method),
        "training": {
            "num_train_epochs": epochs,
            "seed": seed,
            "learning_rate": 5e-4,
            "logging_steps": 5,
            "save_steps": 40,
        },
        "evaluation": {"batch_size": 32, "max_new_tokens": 16},
        "output": output,
    }


def _budget(runs: Mapping[str, Any]) -> str:
    rows = []
    for name, run in runs.items():
        if summary := run.environment.get("training"):
            numbers = f"{summary['trainable_parameters']:,}", str(summary["steps"]), f"{summary['seconds']:.0f} s"
            rows.append([name, *numbers])
    return text_table(["method", "trainable parameters", "steps", "training"], rows, right={1, 2, 3})


def _angles(log: Path) -> str:
    """The first grouping against the last, each on gradients of steps that it was not fitted to."""
    lines = [line for line in read_jsonl(log) if line.get("intra_degrees") is not None]
    if not lines:
        return "The run was too short to measure angles between experts."
    first, last = lines[0]["step"], lines[-1]["step"]
    start = [line for line in lines if line["step"] == first]
    end = [line for line in lines if line["step"] == last]
    fields = ("intra_degrees", "inter_degrees", "intra_abs_cos", "inter_abs_cos")
    rows = [
        [f"as decomposed (steps after {first})", *_means(start, [f"previous_{field}" for field in fields])],
        [f"regrouped (steps after {last})", *_means(end, fields)],
    ]
    header = ["gradients of the components", "within", "between", "|cos| within", "|cos| between"]
    return "Angles within and between experts, mean over layers\n\n" + text_table(header, rows, right={1, 2, 3, 4})


def _means(lines: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
    means = [sum(line[field] for line in lines) / len(lines) for field in fields]
    return [f"{mean:.1f}°" if "degrees" in field else f"{mean:.3f}" for field, mean in zip(fields, means, strict=True)]


def _samples(folders: Mapping[str, Path]) -> str:
    """One instance of each of a few tasks, spread over the list, with every method's answer."""
    files = sorted(next(iter(folders.values())).glob("*.jsonl"))
    chosen = [files[i * len(files) // SAMPLES] for i in range(SAMPLES)]
    blocks = []
    for file in chosen:
        answers = {name: next(read_jsonl(folder / file.name)) for name, folder in folders.items()}
        reference = next(iter(answers.values()))
        question = " ".join(own_input(reference["prompt"]).split())
        lines = [f"[{file.stem}] {question}", f"  {'reference':10} {reference['references'][0]}"]
        lines += [f"  {name:10} {' '.join(answer['prediction'].split())[:100]}" for name, answer in answers.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
