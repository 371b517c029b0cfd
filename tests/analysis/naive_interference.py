"""Naive reference of interference: full gradients of single instances, loops over units."""

import copy
import itertools
import math
import re
import statistics

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from badit.data import AnswerCollator
from training.trainers import examples

RELIABLE = 0.7
_WEIGHT = re.compile(
    r"\.(?:layers|h)\.(\d+)\.((?:self_attn|attn|mlp)\.[a-z_]+)(?:\.base_layer)?\.weight$"
)
_ADAPTER = re.compile(r"\.layers\.(\d+)\.(mlp\.[a-z_]+)\.(?:badit|lora)_")


def make_examples(sizes):
    """Returns random prompts and answers of several lengths, by task."""
    made = iter(examples(sum(sizes.values())))
    return {
        task: [{**next(made), "task": task} for _ in range(size)] for task, size in sizes.items()
    }


def rows(frame):
    """Returns a frame's rows, with None for undefined numbers."""
    return frame.astype(object).where(frame.notna(), None).to_numpy().tolist()


def batched(of_tasks, size=1):
    collate = AnswerCollator(0, with_tasks=True)
    return {
        task: [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        for task, rows in of_tasks.items()
    }


def loss(model, example):
    ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
    return F.cross_entropy(
        model(input_ids=ids, labels=labels).logits[0, :-1].float(), labels[0, 1:]
    )


def places(model):
    """Returns the names of the measured parameters, by kind, layer and module."""
    names = {}
    for name, _ in model.named_parameters():
        if match := _ADAPTER.search(name):
            names.setdefault(("adapter", int(match[1]), f"{match[2]}.adapter"), []).append(name)
        elif match := _WEIGHT.search(name):
            names.setdefault(("weights", int(match[1]), match[2]), []).append(name)
    return names


def gradients(model, examples):
    """Returns, by task, each instance's gradients by parameter, in float64."""
    model = copy.deepcopy(model).requires_grad_(True)
    names = [name for of_place in places(model).values() for name in of_place]
    parameters = [dict(model.named_parameters())[name] for name in names]
    result = {}
    for task, of_task in examples.items():
        result[task] = []
        for example in of_task:
            of_example = torch.autograd.grad(loss(model, example), parameters)
            values = (gradient.double() for gradient in of_example)
            result[task].append(dict(zip(names, values, strict=True)))
    return result


def flat(instances, names):
    """Returns the instances' gradients as vectors, one per row."""
    return torch.stack([torch.cat([g[name].flatten() for name in names]) for g in instances])


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def magnitude(a, b):
    return 2 * float(a.norm() * b.norm()) / float(a @ a + b @ b)


def halves(vectors):
    """Returns the means of the even and of the odd rows; NaN if there are none."""
    return [vectors[half::2].mean(dim=0) for half in (0, 1)]


def corrected(a, b):
    of_a, of_b = (float(torch.dot(*halves(vectors))) for vectors in (a, b))
    if not (of_a > 0 and of_b > 0):
        return math.nan
    return max(-1.0, min(1.0, float(a.mean(dim=0) @ b.mean(dim=0)) / math.sqrt(of_a * of_b)))


def longer_reliability(reliability, factor):
    """Returns the share of signal in a mean over ``factor`` times as many instances.

    With a signal of squared norm 1, a reliability of 1 / (1 + noise) means this noise.
    """
    if not reliability > 0:
        return math.nan if math.isnan(reliability) else 0.0
    noise = 1 / reliability - 1
    return 1 / (1 + noise / factor)


def needed(reliability, instances):
    """Counts up to the first number of instances that is predicted to be reliable."""
    if not reliability > 0:
        return math.nan
    count = 2
    while longer_reliability(reliability, count / instances) < RELIABLE - 1e-9:
        count += 1
    return count


def decision(a, b, reliable):
    """Returns signal, conflict and needed instances of two tasks' gradients (one per row)."""
    signals = [longer_reliability(cosine(*halves(rows)), 2) for rows in (a, b)]
    counts = [needed(of, len(rows)) for of, rows in zip(signals, (a, b), strict=True)]
    if any(math.isnan(of) for of in signals):
        return [math.nan] * 3
    conflict = float(corrected(a, b) < 0) if min(signals) >= reliable else math.nan
    return [min(signals), conflict, math.nan if any(map(math.isnan, counts)) else max(counts)]


def cosine_error(a, b):
    """Returns the standard error of the cosine of two means over rows, in loops over rows."""
    of_a, of_b = a.mean(dim=0), b.mean(dim=0)
    variance = 0.0
    for rows, other in ((a, of_b), (b, of_a)):
        products = [float(row @ other) for row in rows]
        if len(products) < 2:
            return math.nan
        variance += statistics.variance(products) / len(products)
    return math.sqrt(variance) / float(of_a.norm() * of_b.norm())


def interval(a, b):
    """Returns the 95 % t interval of the cosine of two means over rows."""
    reach = cosine_error(a, b) * scipy.stats.t.ppf(0.975, max(1, min(len(a), len(b)) - 1))
    middle = cosine(a.mean(dim=0), b.mean(dim=0))
    return [middle - reach, middle + reach]


def tables(model, examples, reliable=RELIABLE):
    """Returns the rows of the four gradient tables."""
    by_task = gradients(model, examples)
    measured = places(model)
    pairs = list(itertools.combinations(sorted(by_task), 2))
    tables_ = {f"gradient_{name}": [] for name in ("pairs", "overall", "summary", "tasks")}
    for (kind, layer, module), names in measured.items():
        vectors = {task: flat(instances, names) for task, instances in by_task.items()}
        means = {task: rows.mean(dim=0) for task, rows in vectors.items()}
        values = [(cosine(means[a], means[b]), magnitude(means[a], means[b])) for a, b in pairs]
        tables_["gradient_pairs"] += [
            [*pair, layer, module, *of] for pair, of in zip(pairs, values, strict=True)
        ]
        reliability = np.nanmean([cosine(*halves(rows)) for rows in vectors.values()])
        decisions = [decision(vectors[a], vectors[b], reliable) for a, b in pairs]
        conflicts = [of for _, of, _ in decisions if not math.isnan(of)]
        rate = np.mean(conflicts) if conflicts else math.nan
        counts = sorted(math.inf if math.isnan(of) else of for _, _, of in decisions)
        half = counts[(len(counts) - 1) // 2]
        half = math.nan if math.isinf(half) else half
        numbers = [rate, len(conflicts) / len(pairs), reliability, half]
        tables_["gradient_summary"].append([layer, module, kind, *map(float, numbers)])
    for kind in {kind for kind, _, _ in measured}:
        of_kind = [names for place, names in measured.items() if place[0] == kind]
        names = list(itertools.chain(*of_kind))
        vectors = {task: flat(instances, names) for task, instances in by_task.items()}
        for a, b in pairs:
            first, second = vectors[a].mean(dim=0), vectors[b].mean(dim=0)
            overall = [
                cosine(first, second),
                corrected(vectors[a], vectors[b]),
                magnitude(first, second),
                *interval(vectors[a], vectors[b]),
                *decision(vectors[a], vectors[b], reliable),
            ]
            tables_["gradient_overall"].append([a, b, kind, *overall])
        for task, rows in vectors.items():
            reliability = cosine(*halves(rows))
            signal = longer_reliability(reliability, 2)
            numbers = [float(rows.mean(dim=0).norm()), reliability, signal, len(rows)]
            numbers.append(needed(signal, len(rows)))
            tables_["gradient_tasks"].append([task, kind, *numbers])
    return tables_


def row_scores(model, examples):
    """Returns, by task and layer, the mean squared gradient of each row of the weights."""
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    scores = {}
    for task, instances in gradients(model, examples).items():
        layers = {}
        for (kind, layer, _), names in places(model).items():
            for name in names if kind == "weights" else []:
                rows = [
                    g[name].T if isinstance(modules[name], Conv1D) else g[name] for g in instances
                ]
                means = [
                    float((torch.cat(of_unit) ** 2).mean()) for of_unit in zip(*rows, strict=True)
                ]
                layers.setdefault(layer, []).extend(means)
        scores[task] = [layers[layer] for layer in sorted(layers)]
    return scores


@torch.no_grad()
def neuron_means(model, examples):
    """Returns, by task and layer, the mean output of the MLP's first projection over positions."""
    means, outputs, model = {}, {}, copy.deepcopy(model)
    projections = [
        module
        for name, module in model.named_modules()
        if name.endswith((".mlp.gate_proj", ".mlp.c_fc"))
    ]
    for module in projections:
        module.register_forward_hook(
            lambda module, args, output: outputs.setdefault(module, []).append(output[0].float())
        )
    for task, instances in examples.items():
        outputs.clear()
        for example in instances:
            loss(model, example)
        means[task] = [torch.cat(outputs[module]).mean(dim=0).tolist() for module in projections]
    return means


def marked(scores, share):
    count = max(1, round(share * len(scores)))
    chosen = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))[:count]
    return [unit in chosen for unit in range(len(scores))]


def coactivation(kind, marks):
    """Returns the rows of the three tables; chances from all outcomes of T coin tosses."""
    names = list(marks)
    rows = {"coactivation": [], "coactivation_tasks": [], "coactivation_pairs": []}
    for layer in range(len(marks[names[0]])):
        units = range(len(marks[names[0]][layer]))
        shares = [sum(marks[name][layer]) / len(units) for name in names]
        counts = [sum(marks[name][layer][unit] for name in names) for unit in units]
        chances = [0.0] * (len(names) + 1)
        for outcome in itertools.product([False, True], repeat=len(names)):
            chances[sum(outcome)] += math.prod(
                p if hit else 1 - p for p, hit in zip(shares, outcome, strict=True)
            )
        for tasks, chance in enumerate(chances):
            rows["coactivation"].append(
                [kind, layer, tasks, counts.count(tasks) / len(units), chance]
            )
        for name in names:
            marked_by = [counts[unit] for unit in units if marks[name][layer][unit]]
            universal = sum(count == len(names) for count in counts)
            rows["coactivation_tasks"].append(
                [kind, name, layer, len(marked_by), marked_by.count(1), universal]
            )
    for a, b in itertools.combinations(sorted(names), 2):
        shared = either = 0
        for of_a, of_b in zip(marks[a], marks[b], strict=True):
            shared += sum(x and y for x, y in zip(of_a, of_b, strict=True))
            either += sum(x or y for x, y in zip(of_a, of_b, strict=True))
        rows["coactivation_pairs"].append([kind, a, b, shared / either if either else None])
    return rows
