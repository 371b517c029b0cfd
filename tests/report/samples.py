"""Writes synthetic runs: all tables of an analysis and all files of a run's folder."""

import json
import math
from itertools import combinations, pairwise, product
from typing import NamedTuple

import numpy as np
import yaml

from badit.analysis.tables import TABLES, save_frame
from badit.metrics.answers import METRICS, mean_scores
from data.examples import write_rows
from materials import comparison, results_cell, write_results

NAMES = ("002_quoref", "073_commonsenseqa", "1290_xsum", "1590_diplomacy", "363_sst2")
TASKS = tuple(f"task{name}_answer_generation" for name in NAMES)
PROMPT = "Say what you see.\n\nNow complete the following example -\nInput: picture {}\nOutput: "
TRAINING = {
    "trainable_parameters": 2_165_760,
    "seconds": 2285.3,
    "peak_memory_gib": 1.9,
    "steps": 376,
}


class Shape(NamedTuple):
    """The size of a synthetic run."""

    tasks: tuple = TASKS
    layers: int = 3
    modules: tuple = ("mlp.gate_proj", "self_attn.q_proj")
    experts: int = 4
    steps: tuple = (20, 40, 60)
    seed: int = 0


SMALL = Shape()
OTHER = Shape(seed=5)


def tables(shape=SMALL):
    """Returns all tables of an analysis, by name."""
    rng = np.random.default_rng(shape.seed)
    kinds, tasks, experts = ("neurons", "parameters"), shape.tasks, range(shape.experts)
    count, places = len(tasks), list(product(range(shape.layers), shape.modules))
    pairs = list(combinations(sorted(tasks), 2))
    alike = {(a, b): 0.25 if len(a) % 3 == len(b) % 3 else 0.02 for a, b in pairs}

    def noise(size=1.0):
        return float(size * rng.normal())

    def cosine(pair, scale=1.0):
        return float(np.clip(scale * alike[pair] + noise(0.08), -1, 1))

    def decision(i, plain, corrected):
        """Returns the columns of a pair in gradient_overall from its corrected cosine on."""
        interval = (plain - 0.05, plain + 0.05)
        if i % 5 == 4:
            return None, 0.5, *interval, 0.0, None, None
        if i % 5 == 3:
            return corrected, 0.5, *interval, 0.5, None, 19
        return corrected, 0.5, *interval, 0.8, float(corrected < 0), 5

    moves = [
        (place, expert, int(rng.integers(shape.experts))) for place in places for expert in experts
    ]
    logged = product(shape.steps, places, (("before", 85), ("after", 78)))
    neighbours = [tasks[expert % count] for expert in (*experts, shape.experts)]
    prompt = "Passage: the quick brown fox jumped over the lazy dog, and what did it see? " * 2
    rows = {
        "gradient_pairs": [
            (*pair, layer, f"{module}.adapter", cosine(pair), 0.5)
            for pair, (layer, module) in product(pairs, places)
        ],
        "gradient_overall": [
            (*pair, "adapter", value := cosine(pair), *decision(i, value, 2.2 * value))
            for i, pair in enumerate(pairs)
        ],
        "gradient_summary": [
            (*place, "adapter", abs(noise(0.2)), 0.6, 0.35 + noise(0.05), 19)
            for place in [*places, (-1, "all")]
        ],
        "gradient_tasks": [
            (task, "adapter", rng.uniform(0.2, 9), rng.uniform(0.1, 0.7), 0.5, 8, 19)
            for task in tasks
        ],
        "coactivation": [
            (
                kind,
                layer,
                k,
                0.7 if k == 0 else (0.3 + noise(0.02)) / (k + 1),
                math.comb(count, k) * 0.1**k,
            )
            for kind, layer, k in product(kinds, range(shape.layers), range(count + 1))
        ],
        "coactivation_tasks": [
            (*place, 154, 20, 40) for place in product(kinds, tasks, range(shape.layers))
        ],
        "coactivation_pairs": [
            (kind, *pair, 0.35 + cosine(pair) / 3) for kind, pair in product(kinds, pairs)
        ],
        "expert_angles": [
            *(
                (step, *place, name, angle + noise(), 91.4, 0.21, 0.15)
                for step, place, (name, angle) in logged
            ),
            *(
                (376, *place, "held-out", 80 + noise(), 91 + noise(0.2), 0.2, 0.14)
                for place in places
            ),
        ],
        "component_flow": [
            (step, *place, expert, to, moved)
            for step, (place, expert, away) in product(shape.steps, moves)
            for to, moved in {expert: 3, away: 1 + 3 * (away == expert)}.items()
        ],
        "gates": [
            (task, *place, k, 1 + noise(0.08)) for task, place, k in product(tasks, places, experts)
        ],
        "clusters": [
            (task, *place, cluster, 0.75 if cluster == i % 4 else 0.25 / 3)
            for (i, task), place in product(enumerate(tasks), places)
            for cluster in range(4)
        ],
        "gate_similarity": [(*pair, cosine(pair, 2), 0.2) for pair in pairs],
        "expert_losses": [
            (task, expert, 1.7, 1.74, 0.04 + noise(0.05))
            for task, expert in product(tasks, experts)
        ],
        "nearest_prompts": [
            (expert, rank, neighbours[expert], f"id-{rank}", f"{prompt} {rank}")
            for expert, rank in product(experts, range(1, 4))
        ],
        "abilities": [
            (expert, *pair, 1.0, 0.02, 0.04) for expert, pair in enumerate(pairwise(neighbours))
        ],
        "ability_recovery": [
            ("correlation", 0.41, 0.0, 0.0123),
            ("nearest_neighbour", 0.6, 0.31, 0.04),
        ],
        "transfer": [
            (i + 1, trained, task, 60.0 - 4 * (i - j) if j <= i else None)
            for (i, trained), (j, task) in product(enumerate(tasks), repeat=2)
        ],
        "task_gap": [("lora", task, 40.0 + i, 42.0, i - 2.0) for i, task in enumerate(tasks)],
    }
    return {
        name: TABLES[name].frame([*map(list, rows[name])], f"Synthetic {name}.") for name in TABLES
    }


def save_tables(folder, shape=SMALL, *, leave_out=("task_gap", "transfer")):
    for name, frame in tables(shape).items():
        if name not in leave_out:
            save_frame(frame, folder / "analysis")


def write_run(folder, shape=SMALL, *, method="badit", analysed=True):
    """Writes the folder of a trained and scored run, and returns it."""
    rng = np.random.default_rng(shape.seed + 1)
    folder.mkdir(parents=True)
    options = {"num_experts": shape.experts, "r": 4} if method == "badit" else {}
    config = {"model": {"name": "smollm2-135m", "dtype": "bfloat16"}}
    config |= {
        "data": {"source": "$BADIT_SUPERNI", "order": None},
        "method": {"name": method, **options},
    }
    config |= {"training": {"learning_rate": 5e-4, "seed": shape.seed}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.7", "training": TRAINING}))
    lines = [
        {"step": step, "loss": 1.7 + math.exp(-step / 60) + 0.1 * rng.normal()}
        for step in range(10, 380, 10)
    ]
    lines += [
        {
            "step": step,
            "eval_loss": 1.9 + math.exp(-step / 90),
            **{f"eval_loss/{task}": 1 + i / 9 for i, task in enumerate(shape.tasks)},
        }
        for step in range(94, 380, 94)
    ]
    write_rows(folder / "metrics.jsonl", *lines, {"step": 376})
    instances = {
        task: {metric: rng.uniform(0, 99, 8).tolist() for metric in METRICS} for task in shape.tasks
    }
    (folder / "scores.json").write_text(json.dumps(mean_scores(instances)))
    texts = ["a small red house", "a small red boat", "something else entirely"]
    for task in shape.tasks:
        answers = [
            {"task": task, "instance_id": f"{task}-{i}", "prompt": PROMPT.format(i)}
            for i in range(8)
        ]
        for i, answer in enumerate(answers):
            answer |= {
                "prediction": texts[int(rng.integers(3))],
                "references": [texts[0], "the house"][: 1 + i % 2],
            }
        write_rows(folder / "predictions" / f"{task}.jsonl", *answers)
    if analysed:
        save_tables(folder, shape)
    return folder


def write_sequence(folder, shape=SMALL):
    """Writes a run of tasks in sequence, with each stage's losses and a matrix of scores."""
    write_run(folder, shape, analysed=False)
    (folder / "metrics.jsonl").unlink()
    for number, task in enumerate(shape.tasks, start=1):
        lines = [{"step": step, "loss": 2.0 + number - step / 20} for step in (10, 20)]
        write_rows(folder / "stages" / f"{number:02d}-{task}" / "metrics.jsonl", *lines)
    scores, count = json.loads((folder / "scores.json").read_text()), len(shape.tasks)
    matrix = [[60.0 - 5 * (i - j) if j <= i else None for j in range(count)] for i in range(count)]
    (folder / "scores.json").write_text(
        json.dumps({**scores, "order": list(shape.tasks), "matrix": matrix})
    )
    return folder


def write_comparison(folder, shape=SMALL, *, methods=("base", "lora", "badit")):
    """Writes a comparison of three seeds, with single-task LoRA models and one failed run."""
    folder.mkdir(parents=True)
    cells = []
    for number, method in enumerate(methods):
        for seed in (None,) if method == "base" else range(3):
            cells.append(comparison_cell(shape, method, seed, 20.0 + 10 * min(number, 2) + number))
            place = folder / method / (f"lr-0.0005/seed-{seed}" if seed is not None else "")
            write_run(
                place, Shape(shape.tasks, seed=number + (seed or 0)), method=method, analysed=False
            )
    cells += [comparison_cell(shape, "lora, one model per task", seed, 34.0) for seed in range(3)]
    failed = {"status": "failed", "error": "out of\nmemory", "scores": None, "instances": None}
    cells.append({**comparison_cell(shape, "goat", 0, 0.0), **failed})
    write_results(
        folder, comparison(*cells, methods=[*methods, "goat", "lora, one model per task"])
    )
    return folder


def comparison_cell(shape, method, seed, level):
    rng = np.random.default_rng([int(level), seed or 0])
    instances = {}
    for i, task in enumerate(shape.tasks):
        scores = np.clip(level + 12 * math.sin(3 * i) + 8 * rng.normal(size=6), 0, 100)
        instances[task] = {
            "rouge_l": scores.round(3).tolist(),
            "exact_match": (0.6 * scores).round(3).tolist(),
        }
    config = {"model": {"name": "smollm2-135m"}, "method": {"name": method}}
    return results_cell(method, seed, instances, config=config, environment={"training": TRAINING})
