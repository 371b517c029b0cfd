"""Synthetic runs: every table of an analysis and every file of a run's folder, with the shapes that real ones have."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from badit.analysis.tables import TidyTable, Value
from badit.report.contract import TABLES

TASKS = (
    "task002_quoref_answer_generation",
    "task073_commonsenseqa_answer_generation",
    "task1290_xsum_summarization",
    "task1590_diplomacy_text_generation",
    "task363_sst2_polarity_classification",
)
SUPERNI = (
    *TASKS,
    "task1510_evalution_relation_extraction",
    "task1572_samsum_summary",
    "task1687_sentiment140_classification",
    "task1729_personachat_generate_next",
    "task181_outcome_extraction",
    "task511_reddit_tifu_long_text_summarization",
    "task591_sciq_answer_generation",
    "task639_multi_woz_user_utterance_generation",
    "task748_glucose_reverse_cause_event_detection",
    "task875_emotion_classification",
)


@dataclass(frozen=True)
class Shape:
    """How large the synthetic run is."""

    tasks: Sequence[str] = TASKS
    layers: int = 3
    modules: Sequence[str] = ("mlp.gate_proj", "self_attn.q_proj")
    experts: int = 4
    steps: Sequence[int] = (20, 40, 60)
    seed: int = 0

    @property
    def places(self) -> list[tuple[int, str]]:
        return list(itertools.product(range(self.layers), self.modules))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(itertools.combinations(sorted(self.tasks), 2))


SMALL = Shape()
LARGE = Shape(
    tasks=SUPERNI,
    layers=30,
    modules=(
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ),
    experts=8,
    steps=tuple(range(20, 340, 20)),
)


def tables(shape: Shape = SMALL) -> dict[str, TidyTable]:
    """Every table of the contract."""
    rng = np.random.default_rng(shape.seed)
    makers = {
        "gradient_pairs": _gradient_pairs,
        "gradient_overall": _gradient_overall,
        "gradient_summary": _gradient_summary,
        "gradient_tasks": _gradient_tasks,
        "coactivation": _coactivation,
        "coactivation_tasks": _coactivation_tasks,
        "coactivation_pairs": _coactivation_pairs,
        "expert_angles": _expert_angles,
        "component_flow": _component_flow,
        "gates": _gates,
        "gate_similarity": _gate_similarity,
        "expert_losses": _expert_losses,
        "nearest_prompts": _nearest_prompts,
        "abilities": _abilities,
        "ability_recovery": _ability_recovery,
        "transfer": _transfer,
        "task_gap": _task_gap,
    }
    return {name: table(name, make(shape, rng)) for name, make in makers.items()}


def table(name: str, rows: Iterator[list[Value]] | Sequence[list[Value]]) -> TidyTable:
    return TidyTable(name, f"Synthetic {name}.", {column: f"the {column}" for column in TABLES[name]}, list(rows))


def save_tables(folder: Path, shape: Shape = SMALL, *, leave_out: Sequence[str] = ("task_gap", "transfer")) -> None:
    for name, made in tables(shape).items():
        if name not in leave_out:
            made.save(folder / "analysis")


def write_run(folder: Path, shape: Shape = SMALL, *, method: str = "badit", analysed: bool = True) -> Path:
    """A trained and scored run's folder."""
    rng = np.random.default_rng(shape.seed + 1)
    folder.mkdir(parents=True)
    options = {"name": "badit", "num_experts": shape.experts, "r": 4} if method == "badit" else {"name": method}
    config = {
        "model": {"name": "smollm2-135m", "dtype": "bfloat16"},
        "data": {"source": "$BADIT_SUPERNI", "order": None},
        "method": options,
        "training": {"learning_rate": 5e-4, "seed": shape.seed},
        "output": str(folder),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    training = {"trainable_parameters": 2_165_760, "steps": 376, "tokens": 780_038, "seconds": 2285.3}
    environment = {"python": "3.11.7", "packages": {"badit": "0.1.0"}, "training": training}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [{"step": step, "loss": 1.7 + math.exp(-step / 60) + 0.1 * rng.normal()} for step in range(10, 380, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 376}]))
    level = 35 + 3 * shape.seed
    by_task = {task: float(np.clip(level + 25 * rng.normal(), 3, 97)) for task in shape.tasks}
    write_scores(folder, by_task)
    for task in shape.tasks:
        write_predictions(folder, task, rng)
    if analysed:
        save_tables(folder, shape)
    return folder


def write_scores(folder: Path, by_task: dict[str, float]) -> None:
    tasks = {task: {"rouge_l": score, "exact_match": score * 0.7, "instances": 8} for task, score in by_task.items()}
    means = {metric: float(np.mean([task[metric] for task in tasks.values()])) for metric in ("rouge_l", "exact_match")}
    (folder / "scores.json").write_text(json.dumps({**means, "tasks": tasks}))


def write_predictions(folder: Path, task: str, rng: np.random.Generator) -> None:
    """Eight answers: right, half right and wrong ones."""
    (folder / "predictions").mkdir(exist_ok=True)
    answers = ["a small red house", "a small red boat", "something else entirely"]
    lines = [
        {
            "task": task,
            "instance_id": f"{task}-{i}",
            "prompt": f"Say what you see.\n\nNow complete the following example -\nInput: picture {i}\nOutput: ",
            "prediction": answers[int(rng.integers(3))],
            "references": ["a small red house", "the house"][: 1 + i % 2],
        }
        for i in range(8)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions" / f"{task}.jsonl").write_text(text)


Rows = Iterator[list[Value]]


def _cosine(a: str, b: str, shape: Shape, rng: np.random.Generator, noise: float = 0.08) -> float:
    """Tasks of the same sort (here: with names of like length) agree; others conflict now and then."""
    alike = 0.25 if len(a) % 3 == len(b) % 3 else 0.02
    return float(np.clip(alike + noise * rng.normal(), -1, 1))


def _gradient_pairs(shape: Shape, rng: np.random.Generator) -> Rows:
    for (a, b), place in itertools.product(shape.pairs, shape.places):
        yield [a, b, *place, _cosine(a, b, shape, rng), float(rng.uniform(0.3, 1))]


def _gradient_overall(shape: Shape, rng: np.random.Generator) -> Rows:
    for i, (a, b) in enumerate(shape.pairs):
        cosine = _cosine(a, b, shape, rng, 0.05)
        yield [a, b, "adapter", cosine, None if i % 5 == 4 else min(1.0, 2.2 * cosine), float(rng.uniform(0.3, 1))]


def _gradient_summary(shape: Shape, rng: np.random.Generator) -> Rows:
    for layer, module in [*shape.places, (-1, "all")]:
        rate = float(np.clip(0.2 + 0.1 * math.sin(layer / 4) + 0.03 * rng.normal(), 0, 1))
        yield [layer, module, "adapter", rate, 0.1, 0.7, float(0.35 + 0.05 * rng.normal())]


def _gradient_tasks(shape: Shape, rng: np.random.Generator) -> Rows:
    for task in shape.tasks:
        yield [task, "adapter", float(rng.uniform(0.2, 9)), float(rng.uniform(0.1, 0.7)), 8]


def _coactivation(shape: Shape, rng: np.random.Generator) -> Rows:
    total = len(shape.tasks)
    for kind, layer in itertools.product(("neurons", "parameters"), range(shape.layers)):
        chances = [math.comb(total, k) * 0.1**k * 0.9 ** (total - k) for k in range(total + 1)]
        weights = np.array([0.7, *(1 / (k + 1) + 0.4 * (k == total) for k in range(total))]) + 0.02 * rng.random(
            total + 1
        )
        weights[1:] *= 0.3 / weights[1:].sum()
        yield from ([kind, layer, k, float(weights[k]), chances[k]] for k in range(total + 1))


def _coactivation_tasks(shape: Shape, rng: np.random.Generator) -> Rows:
    for kind, task, layer in itertools.product(("neurons", "parameters"), shape.tasks, range(shape.layers)):
        yield [kind, task, layer, 154, int(rng.integers(5, 30)), int(rng.integers(20, 60))]


def _coactivation_pairs(shape: Shape, rng: np.random.Generator) -> Rows:
    for kind, (a, b) in itertools.product(("neurons", "parameters"), shape.pairs):
        yield [kind, a, b, float(np.clip(0.35 + _cosine(a, b, shape, rng), 0, 1)), 0.0526]


def _expert_angles(shape: Shape, rng: np.random.Generator) -> Rows:
    for i, step in enumerate(shape.steps):
        for place in shape.places:
            for measured, within in (("before", 90 - 11 * (i > 0)), ("after", 78)):
                noise = rng.normal(size=2)
                yield [step, *place, measured, within + noise[0], 91.4 + 0.2 * noise[1], 0.21, 0.15]
    for place in shape.places:
        yield [376, *place, "held-out", 80 + float(rng.normal()), 91.0, 0.2, 0.14]


def _component_flow(shape: Shape, rng: np.random.Generator) -> Rows:
    for step, place in itertools.product(shape.steps, shape.places):
        for expert in range(shape.experts):
            away = int(rng.integers(shape.experts))
            yield from ([step, *place, expert, to, n] for to, n in {expert: 3, away: 1 + 3 * (away == expert)}.items())


def _gates(shape: Shape, rng: np.random.Generator) -> Rows:
    taste = 0.03 * rng.normal(size=(len(shape.tasks), shape.experts))
    for (t, task), place, expert in itertools.product(enumerate(shape.tasks), shape.places, range(shape.experts)):
        yield [task, *place, expert, float(1 + taste[t, expert] + 0.08 * rng.normal()), 0.01]


def _gate_similarity(shape: Shape, rng: np.random.Generator) -> Rows:
    for a, b in shape.pairs:
        yield [a, b, float(np.clip(2 * _cosine(a, b, shape, rng) - 0.3 + 0.2 * rng.normal(), -1, 1))]


def _expert_losses(shape: Shape, rng: np.random.Generator) -> Rows:
    for task, expert in itertools.product(shape.tasks, range(shape.experts)):
        change = float(0.04 + 0.05 * rng.normal())
        yield [task, expert, 1.7, 1.7 + change, change]


def _nearest_prompts(shape: Shape, rng: np.random.Generator) -> Rows:
    for expert, rank in itertools.product(range(shape.experts), range(1, 4)):
        task = shape.tasks[(expert + rank) % len(shape.tasks)]
        prompt = f"Passage {rank}: the quick brown fox jumped over the lazy dog, and what did expert {expert} see? " * 2
        yield [expert, rank, task, f"{task}-{rank}", 2.5 - rank / 3, prompt]


def _abilities(shape: Shape, rng: np.random.Generator) -> Rows:
    for expert in range(shape.experts):
        first, second = (shape.tasks[(expert + i) % len(shape.tasks)] for i in range(2))
        summary = f"Drawn on most by {first} (gate 1.04 against 1.00 on average). Without it {second} loses most."
        yield [expert, first, second, 1.0, 0.02, 0.04, summary]


def _ability_recovery(shape: Shape, rng: np.random.Generator) -> Rows:
    yield ["correlation", 0.41, 0.0, 0.0123]
    yield ["nearest_neighbour", 0.6, 0.31, 0.04]


def _transfer(shape: Shape, rng: np.random.Generator) -> Rows:
    for i, trained in enumerate(shape.tasks):
        for j, task in enumerate(shape.tasks):
            yield [
                i + 1,
                trained,
                task,
                float(np.clip(60 - 4 * (i - j) + 5 * rng.normal(), 0, 100)) if j <= i else None,
            ]


def _task_gap(shape: Shape, rng: np.random.Generator) -> Rows:
    for task in shape.tasks:
        single, multi = (float(value) for value in rng.uniform(20, 70, size=2))
        yield ["lora", task, single, multi, single - multi]


def write_sequence(folder: Path, shape: Shape = SMALL) -> Path:
    """A run that learns its tasks one after another: stages with losses of their own, and a matrix of scores."""
    write_run(folder, shape, analysed=False)
    (folder / "metrics.jsonl").unlink()
    for number, task in enumerate(shape.tasks, start=1):
        stage = folder / "stages" / f"{number:02d}-{task}"
        stage.mkdir(parents=True)
        lines = [{"step": step, "loss": 2.0 + number - step / 20} for step in (10, 20)]
        (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = json.loads((folder / "scores.json").read_text())
    matrix = [
        [60.0 - 5 * (i - j) if j <= i else None for j in range(len(shape.tasks))] for i in range(len(shape.tasks))
    ]
    (folder / "scores.json").write_text(json.dumps({**scores, "order": list(shape.tasks), "matrix": matrix}))
    return folder


def write_comparison(folder: Path, shape: Shape = SMALL, *, methods: Sequence[str] = ("base", "lora", "badit")) -> Path:
    """A comparison of three seeds with single-task models of LoRA, one failed run, and the runs' own folders."""
    folder.mkdir(parents=True)
    cells = []
    for number, method in enumerate(methods):
        for seed in (None,) if method == "base" else range(3):
            cells.append(comparison_cell(shape, method, seed, 20.0 + 10 * min(number, 2) + number))
            place = folder / method / (f"lr-0.0005/seed-{seed}" if seed is not None else "")
            write_run(place, Shape(shape.tasks, seed=number + (seed or 0)), method=method, analysed=False)
    cells += [comparison_cell(shape, "lora, one model a task", seed, 34.0) for seed in range(3)]
    failed = {"status": "failed", "error": "out of\nmemory", "scores": None, "instances": None}
    cells.append({**comparison_cell(shape, "goat", 0, 0.0), **failed})
    names = [*methods, "goat", "lora, one model a task"]
    content = {"format": 1, "protocol": "mixed", "reference": "lora", "methods": names, "cells": cells}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def comparison_cell(shape: Shape, method: str, seed: int | None, level: float) -> dict[str, Any]:
    rng = np.random.default_rng([int(level), seed or 0])
    shifts = {task: 12 * math.sin(3 * i) for i, task in enumerate(shape.tasks)}
    instances = {
        task: {
            metric: np.clip(share * (level + shift + 8 * rng.normal(size=6)), 0, 100).round(3).tolist()
            for metric, share in (("rouge_l", 1.0), ("exact_match", 0.6))
        }
        for task, shift in shifts.items()
    }
    tasks = {
        task: {**{metric: float(np.mean(values)) for metric, values in each.items()}, "instances": 6}
        for task, each in instances.items()
    }
    means = {metric: float(np.mean([task[metric] for task in tasks.values()])) for metric in ("rouge_l", "exact_match")}
    training = {"trainable_parameters": 2_165_760, "seconds": 540.0, "peak_memory_gib": 1.9, "steps": 100}
    return {
        "method": method,
        "seed": seed,
        "order": None,
        "learning_rate": None if seed is None else 5e-4,
        "status": "done",
        "error": None,
        "selected": True,
        "config": {"model": {"name": "smollm2-135m"}, "method": {"name": method}},
        "environment": {"training": training},
        "scores": {**means, "tasks": tasks},
        "instances": instances,
    }
