"""Interference as written down: whole gradients by autograd, an instance at a time, loops over pairs and units."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from badit.data import AnswerCollator
from training.trainers import examples

Examples = Mapping[str, Sequence[Mapping[str, Any]]]
Vector = list[float]

_WEIGHT = re.compile(r"\.(?:layers|h)\.(\d+)\.((?:self_attn|attn|mlp)\.[a-z_]+)(?:\.base_layer)?\.weight$")
_ADAPTER = re.compile(r"\.layers\.(\d+)\.(mlp\.[a-z_]+)\.(?:badit|lora)_")
Place = tuple[str, int, str]


def make_examples(sizes: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Random prompts and answers of several lengths."""
    made = iter(examples(sum(sizes.values())))
    return {task: [{**next(made), "task": task} for _ in range(size)] for task, size in sizes.items()}


def rows(frame: pd.DataFrame) -> list[list[Any]]:
    """A frame's rows, None where a number is not defined."""
    return frame.astype(object).where(frame.notna(), None).to_numpy().tolist()


def batched(of_tasks: Examples, size: int = 3, side: Any = "right") -> dict[str, list[dict[str, Any]]]:
    collate = AnswerCollator(0, side, with_tasks=True)
    return {task: [collate(of[i : i + size]) for i in range(0, len(of), size)] for task, of in of_tasks.items()}


def loss(model: Any, example: Mapping[str, Any]) -> torch.Tensor:
    ids, labels = torch.tensor([example["input_ids"]]), example["labels"]
    logs = F.log_softmax(model(input_ids=ids, labels=torch.tensor([labels])).logits[0].float(), dim=-1)
    answer = [t for t in range(1, len(labels)) if labels[t] != -100]
    return -sum(logs[t - 1, labels[t]] for t in answer) / len(answer)


def places(model: Any) -> dict[Place, list[str]]:
    """The names of the measured parameters, by kind, layer and module."""
    found: dict[Place, list[str]] = {}
    for name, _ in model.named_parameters():
        if match := _ADAPTER.search(name):
            found.setdefault(("adapter", int(match[1]), f"{match[2]}.adapter"), []).append(name)
        elif match := _WEIGHT.search(name):
            found.setdefault(("weights", int(match[1]), match[2]), []).append(name)
    return found


def gradients(model: Any, examples: Examples) -> dict[str, list[dict[str, torch.Tensor]]]:
    """By task, each instance's gradient by parameter, in float64."""
    model = copy.deepcopy(model).requires_grad_(True)
    names = [name for of_place in places(model).values() for name in of_place]
    parameters = [dict(model.named_parameters())[name] for name in names]
    result = {}
    for task, of_task in examples.items():
        found = [torch.autograd.grad(loss(model, example), parameters) for example in of_task]
        result[task] = [{name: g.double() for name, g in zip(names, of, strict=True)} for of in found]
    return result


def flat(instances: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str]) -> torch.Tensor | None:
    """The mean gradient over instances as one vector."""
    if not instances:
        return None
    return torch.cat([sum(g[name] for g in instances).flatten() / len(instances) for name in names])


def cosine(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    if a is None or b is None or not a.any() or not b.any():
        return None
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def magnitude(a: torch.Tensor, b: torch.Tensor) -> float:
    return 2 * float(a.norm() * b.norm()) / float(a @ a + b @ b)


def halves(instances: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return list(instances[0::2]), list(instances[1::2])


def corrected(a: Sequence[Any], b: Sequence[Any], names: Sequence[str]) -> float | None:
    between = []
    for instances in (a, b):
        first, second = (flat(half, names) for half in halves(instances))
        if first is None or second is None or float(first @ second) <= 0:
            return None
        between.append(float(first @ second))
    value = float(flat(a, names) @ flat(b, names)) / math.sqrt(between[0] * between[1])
    return max(-1.0, min(1.0, value))


def mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def tables(model: Any, examples: Examples) -> dict[str, list[list[Any]]]:
    """The rows of the four gradient tables."""
    by_task = gradients(model, examples)
    found = places(model)
    pairs = list(itertools.combinations(sorted(by_task), 2))
    rows: dict[str, list[list[Any]]] = {"gradient_pairs": [], "gradient_overall": [], "gradient_summary": []}
    for (kind, layer, module), names in found.items():
        vectors = {task: flat(instances, names) for task, instances in by_task.items()}
        cosines = [cosine(vectors[a], vectors[b]) for a, b in pairs]
        magnitudes = [magnitude(vectors[a], vectors[b]) for a, b in pairs]
        rows["gradient_pairs"] += [
            [a, b, layer, module, c, m] for (a, b), c, m in zip(pairs, cosines, magnitudes, strict=True)
        ]
        conflicts = mean([None if c is None else float(c < 0) for c in cosines])
        reliability = mean([cosine(*(flat(half, names) for half in halves(of))) for of in by_task.values()])
        rows["gradient_summary"].append(
            [layer, module, kind, conflicts, mean(cosines), mean(magnitudes), reliability],
        )
    rows["gradient_tasks"] = []
    for kind in sorted({kind for kind, _, _ in found}, reverse=True):
        names = [name for place, of_place in found.items() if place[0] == kind for name in of_place]
        for a, b in pairs:
            first, second = flat(by_task[a], names), flat(by_task[b], names)
            overall = [cosine(first, second), corrected(by_task[a], by_task[b], names), magnitude(first, second)]
            rows["gradient_overall"].append([a, b, kind, *overall])
        for task, instances in by_task.items():
            reliability = cosine(*(flat(half, names) for half in halves(instances)))
            norm = float(flat(instances, names).norm())
            rows["gradient_tasks"].append([task, kind, norm, reliability, len(instances)])
    return rows


def row_scores(model: Any, examples: Examples) -> dict[str, list[Vector]]:
    """By task and layer, the mean squared gradient of every row of the weights."""
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    scores: dict[str, list[Vector]] = {}
    for task, instances in gradients(model, examples).items():
        layers: dict[int, Vector] = {}
        for (kind, layer, _), names in places(model).items():
            for name in names if kind == "weights" else []:
                rows = [g[name].T if isinstance(modules[name], Conv1D) else g[name] for g in instances]
                for unit in range(len(rows[0])):
                    squares = torch.cat([row[unit] for row in rows]) ** 2
                    layers.setdefault(layer, []).append(float(squares.mean()))
        scores[task] = [layers[layer] for layer in sorted(layers)]
    return scores


@torch.no_grad()
def neuron_means(model: Any, examples: Examples, projections: Callable[[Any], list[Any]]) -> dict[str, list[Vector]]:
    """By task and layer, the projections' outputs averaged over all positions of all instances."""
    means: dict[str, list[Vector]] = {}
    kept: dict[Any, list[torch.Tensor]] = {}
    model = copy.deepcopy(model)
    for module in projections(model):
        module.register_forward_hook(lambda module, args, output: kept.setdefault(module, []).append(output[0].float()))
    for task, instances in examples.items():
        kept.clear()
        for example in instances:
            loss(model, example)
        means[task] = [torch.cat(kept[module]).mean(dim=0).tolist() for module in projections(model)]
    return means


def marked(scores: Sequence[float], share: float) -> list[bool]:
    count = max(1, round(share * len(scores)))
    chosen = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))[:count]
    return [unit in chosen for unit in range(len(scores))]


def coactivation(kind: str, marks: Mapping[str, Sequence[Sequence[bool]]]) -> dict[str, list[list[Any]]]:
    """The rows of the three tables; chances by going through all outcomes of T tosses and both sets' sizes."""
    names, rows = list(marks), {"coactivation": [], "coactivation_tasks": [], "coactivation_pairs": []}
    for layer in range(len(marks[names[0]])):
        units = range(len(marks[names[0]][layer]))
        shares = [sum(marks[name][layer]) / len(units) for name in names]
        counts = [sum(marks[name][layer][unit] for name in names) for unit in units]
        chances = [0.0] * (len(names) + 1)
        for outcome in itertools.product([False, True], repeat=len(names)):
            chances[sum(outcome)] += math.prod(p if hit else 1 - p for p, hit in zip(shares, outcome, strict=True))
        for tasks, chance in enumerate(chances):
            rows["coactivation"].append([kind, layer, tasks, counts.count(tasks) / len(units), chance])
        for name in names:
            own = [counts[unit] for unit in units if marks[name][layer][unit]]
            universal = sum(count == len(names) for count in counts)
            rows["coactivation_tasks"].append([kind, name, layer, len(own), own.count(1), universal])
    for a, b in itertools.combinations(sorted(names), 2):
        both = either = expected_both = expected_either = 0
        for of_a, of_b in zip(marks[a], marks[b], strict=True):
            both += sum(x and y for x, y in zip(of_a, of_b, strict=True))
            either += sum(x or y for x, y in zip(of_a, of_b, strict=True))
            p, q = sum(of_a) / len(of_a), sum(of_b) / len(of_b)
            expected_both += len(of_a) * p * q
            expected_either += len(of_a) * (p + q - p * q)
        overlaps = [both / either, expected_both / expected_either] if either else [None, None]
        rows["coactivation_pairs"].append([kind, a, b, *overlaps])
    return rows
