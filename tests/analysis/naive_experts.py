"""Naive reference of the ability atlas: loops over layers, prompts and experts, in float64."""

import itertools
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax

import reference
from analysis.naive_interference import batched, make_examples
from badit.tuner import BaditLinear, hooks_of
from baselines import naive as mixtures
from baselines.naive import TASKS
from tuner import helpers
from tuner.helpers import layers

BADIT = {
    "badit": {},
    "badit softmax": {"gates": "softmax"},
    "badit standardised": {"router_input": "standardised"},
}
BADIT |= {"badit token": {"routing": "token", "top_k": 2}}
METHODS = (*BADIT, *mixtures.MIXTURES, "mtl-lora")
EXAMPLES = make_examples(dict.fromkeys(TASKS, 3))
# Two batches per task, with two prompts and with one; then the prompts one by one, unpadded.
BATCHES, ROWS = batched(EXAMPLES, 2), batched(EXAMPLES)


def adapted(model, method, **options):
    """Returns the model with the method's adapter as after training."""
    if method in BADIT:
        return helpers.adapted(model, **BADIT[method], **options)
    return mixtures.adapted(model, method, **options)


@torch.no_grad()
def gates(model, row):
    """Returns one prompt's gates (modules, experts), from each position's input and router."""
    inputs = {}
    with ExitStack() as hooks:
        for layer in layers(model):
            keep = layer.register_forward_pre_hook(
                lambda layer, args: inputs.update({layer.name: args[0][0]})
            )
            hooks.callback(keep.remove)
        losses(model, row)
    first = row["labels"][0].tolist().count(-100)  # the answer comes last
    prompts = [(layer, inputs[layer.name][:first]) for layer in layers(model)]
    values = np.array(
        [
            np.mean([_gate(layer, x_t, prompt, row) for x_t in prompt], axis=0)
            for layer, prompt in prompts
        ]
    )
    return values / values.mean(axis=1, keepdims=True)


def _gate(layer, x_t, prompt, row):
    config = layer.badit_config["default"]
    if not isinstance(layer, BaditLinear):
        if "default" in getattr(layer, "badit_router", ()):
            return mixtures.gates(layer, x_t)
        logits = reference.float64(layer.badit_task_logits["default"])[
            config.tasks.index(row["tasks"][0])
        ]
        return reference.expert_gates(logits / config.temperature, "softmax")
    read = reference.float64(x_t if config.routing == "token" else prompt.mean(dim=0))
    if config.router_input == "standardised":
        read = reference.standardised(read, *reference.float64(layer.badit_moments["default"]))
    return reference.expert_gates(
        read @ reference.float64(layer.badit_router["default"]).T, config.gates, config.top_k
    )


@torch.no_grad()
def losses(model, row):
    """Returns the cross-entropy of each answer token of a row, from the logits of all positions."""
    with hooks_of(model).rows_of(row["tasks"]):
        out = model(
            input_ids=row["input_ids"], attention_mask=row["attention_mask"], labels=row["labels"]
        )
    log_p, labels = (
        log_softmax(reference.float64(out.logits[0]), axis=-1),
        row["labels"][0].tolist(),
    )
    return [-log_p[t - 1, label] for t, label in enumerate(labels) if t and label != -100]


def change_error(pairs):
    """Returns the standard error of the change per token, from each prompt's two losses."""
    tokens = sum(len(before) for before, _ in pairs)
    change = sum(sum(after) - sum(before) for before, after in pairs) / tokens
    residuals = [sum(after) - sum(before) - change * len(before) for before, after in pairs]
    return np.sqrt(sum(r**2 for r in residuals) / (len(pairs) - 1) * len(pairs)) / tokens


@torch.no_grad()
def delete_expert(model, expert):
    """Sets the expert's columns of B to zero in all layers, but not the frozen initial factors."""
    for layer in layers(model):
        layer.badit_B["default"][:, [of == expert for of in expert_of(layer)]] = 0
    return model


def expert_of(layer):
    config = layer.badit_config["default"]
    if isinstance(layer, BaditLinear):
        return layer.expert_of("default").tolist()
    rank = config.num_components // config.num_experts
    return [k for k in range(config.num_experts) for _ in range(rank)]


def recovery(similarity_, abilities):
    """Returns, by measure: value, mean over all permutations, share with at least this value."""
    tasks = range(len(abilities))
    pairs = list(itertools.combinations(tasks, 2))
    nearest = [
        max((b for b in tasks if b != a), key=lambda b, a=a: similarity_[a, b]) for a in tasks
    ]

    def correlation(sets):
        overlaps = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs]
        return float(np.corrcoef([similarity_[pair] for pair in pairs], overlaps)[0, 1])

    def neighbours(sets):
        return float(np.mean([bool(sets[a] & sets[nearest[a]]) for a in tasks]))

    results = {}
    for name, measure in (("correlation", correlation), ("nearest_neighbour", neighbours)):
        values = [measure(sets) for sets in itertools.permutations(abilities)]
        first = values[0]  # of the given order
        share = np.mean([value >= first - 1e-9 for value in values])
        results[name] = (first, float(np.mean(values)), float(share))
    return results


def gradients(model):
    """Returns each layer's gradients of A and B for the summed loss, computed row by row."""
    for row in itertools.chain(*ROWS.values()):
        out = model(
            input_ids=row["input_ids"], attention_mask=row["attention_mask"], labels=row["labels"]
        )
        F.cross_entropy(out.logits[0, :-1], row["labels"][0, 1:], reduction="sum").backward()
    return [
        (layer.badit_A["default"].grad, layer.badit_B["default"].grad) for layer in layers(model)
    ]
