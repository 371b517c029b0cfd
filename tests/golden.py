"""Golden values of tiny runs: losses, adapters, scores, a comparison and an analysis.

    python tests/golden.py record    # writes tests/golden.json
    python tests/golden.py check     # compares bit for bit; needs the processor that recorded them

tests/test_golden.py compares losses with a tolerance, because rounding differs between processors.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import badit
from materials import make_material, make_recipe

FILE = Path(__file__).with_name("golden.json")
_STEPS = 20
_SMALL: dict[str, Any] = {"num_experts": 4, "r": 2}
_BAD = {
    "name": "badit",
    **_SMALL,
    "init_weights": "bad",
    "gated": "factors",
    "router_input": "mean",
    "regroup": {"every": 5},
}
_DIRECTIONS = {**_BAD, "init_weights": "directions"}
METHODS: dict[str, dict[str, Any]] = {
    "bad": _BAD,
    "directions": _DIRECTIONS,
    "standardised": {**_DIRECTIONS, "router_input": "standardised", "gates": "mean_one"},
    "clusters": {
        **_DIRECTIONS,
        "router_input": "standardised",
        "gates": "clusters",
        "key": "layer",
        "codes": "random",
        "num_clusters": 16,
    },
    "system": {"name": "badit", **_SMALL},
    "token": {**_BAD, "routing": "token"},
    "top_k": {**_BAD, "top_k": 2, "regroup": None},
    "loramoe": {"name": "loramoe", **_SMALL, "balance_weight": 0.01},
    "hydralora": {"name": "hydralora"},
    "goat": {"name": "goat", "num_experts": 4, "r": 8},
    "mtl-lora": {"name": "mtl-lora"},
    "gainlora": {"name": "gainlora", "r": 2},
    "o-lora": {"name": "o-lora", "r": 2},
    "task-neurons": {"name": "task-neurons"},
}
SEQUENTIAL = ("gainlora", "o-lora")
COMPARED = {"lora": {"name": "lora", "r": 8}, "badit": {**_BAD, "regroup": {}}}


def recipe(material: Path, output: Path, method: dict[str, Any], **data: Any) -> dict[str, Any]:
    values = make_recipe(material / "model", material / "tasks.jsonl", output) | {"method": method}
    training = {
        "max_steps": _STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
    }
    values |= {"training": training, "evaluation": {"batch_size": 8, "max_new_tokens": 4}}
    return {**values, "data": {**values["data"], **data}}


def train_method(name: str, material: Path, output: Path) -> dict[str, Any]:
    """Trains a run; returns each step's loss, the adapter's hash, and each task's test NLL."""
    order = {"order": ["cities", "rivers"]} if name in SEQUENTIAL else {}
    run = badit.train(recipe(material, output, METHODS[name], **order), progress=False)
    logs = sorted(output.rglob("metrics.jsonl"))
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    weights = next((output / "adapter").glob("*.safetensors"))
    scores = run.scores.query("metric == 'nll'").set_index("task")["score"].to_dict()
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "adapter": _hash(weights),
        "scores": scores,
    }


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        if "badit_extensions." in name:  # clusters for later tasks, which this run does not use
            continue
        digest.update(
            name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def analysis_tables(run: Path, output: Path) -> dict[str, str]:
    """Analyzes a run; returns the hash of every table."""
    badit.analyze(run, instances=4, output=output, progress=False)
    contents = {
        path.stem: json.loads(path.read_text())
        for path in sorted((output / "analysis").glob("*.json"))
    }
    return {
        name: _digest(json.dumps([list(each["columns"]), each["rows"]]))
        for name, each in contents.items()
    }


def comparison(material: Path, output: Path) -> dict[str, Any]:
    """Runs a comparison; returns the scores of every cell, and the table."""
    values = recipe(material, output, {"name": "badit"}, validation_per_task=2)
    values["training"]["max_steps"] = 4
    badit.compare({**values, "compare": {"methods": COMPARED, "seeds": [0, 1]}}, progress=False)
    cells = json.loads((output / "results.json").read_text())["cells"]
    scores = [
        [
            cell["method"],
            cell["seed"],
            {task: s["rouge_l"] for task, s in cell["scores"]["tasks"].items()},
        ]
        for cell in cells
    ]
    lines = [line.split(",") for line in badit.table(output, format="csv").splitlines()]
    kept = [i for i, name in enumerate(lines[0]) if name not in ("seconds", "peak_memory_gib")]
    return {"cells": scores, "table": [[line[i] for i in kept if i < len(line)] for line in lines]}


def main() -> int:
    torch.set_num_threads(1)  # with several, sums have another order
    with tempfile.TemporaryDirectory() as name:
        folder, material = Path(name), Path(name) / "material"
        make_material(material)
        found: dict[str, Any] = {
            "runs": {name: train_method(name, material, folder / name) for name in METHODS},
            "analysis": analysis_tables(folder / "bad", folder / "analysed"),
            "comparison": comparison(material, folder / "compared"),
        }
    if sys.argv[1:] == ["record"]:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads(FILE.read_text())
    pairs = [
        (f"{part}.{name}", recorded[part][name], found[part].get(name))
        for part in recorded
        for name in recorded[part]
    ]
    different = [pair for pair in pairs if pair[1] != pair[2]]
    for name, was, new in different:
        print(f"differs: {name}\n  was {str(was)[:600]}\n  is  {str(new)[:600]}")
    print(f"{len(pairs) - len(different)} same, {len(different)} different")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
