"""Naive reference of the baselines, and shared helpers.

Loops over positions, experts and branches, in float64.
"""

import math

import numpy as np
import torch
from peft import get_peft_model

import reference
from badit.baselines import BASELINES
from badit.tuner import BaditConfig, hooks_of
from tuner.helpers import IDS, MASK, forward, padded, random_rows, randomise

MIXTURES = ("loramoe", "hydralora", "goat")
BRANCHES = ("o-lora", "gainlora", "sapt")
GATED = ("gainlora", "sapt")
METHODS = ("badit", "badit standardised", *MIXTURES, "mtl-lora", *BRANCHES)
FAMILIES = ("llama", "gpt2", "gemma2")
TASKS = ["cities", "rivers", "seas"]
SMALL = {
    **{name: {"num_experts": 3, "r": 2, "lora_alpha": 4} for name in ("loramoe", "hydralora")},
    "badit": {"num_experts": 3, "r": 2, "lora_alpha": 4, "gates": "mean_one"},
    "badit standardised": {
        "num_experts": 3,
        "r": 2,
        "router_input": "standardised",
        "gates": "mean_one",
    },
    "goat": {"num_experts": 4, "r": 8, "lora_alpha": 16, "top_k": 2},
    "mtl-lora": {"num_experts": 3, "r": 2, "lora_alpha": 4, "tasks": TASKS},
    "o-lora": {"r": 2, "lora_alpha": 4},
    **{name: {"r": 2, "lora_alpha": 4, "gate_hidden_size": 10} for name in GATED},
}
# Rank of one expert in all of the above; the scaling is 2, but 16 for "badit standardised".
RANK = 2
ROWS = ["rivers", "cities", "rivers"]
FIRST, SECOND = (padded(random_rows(*[5] * 4, seed=seed)) for seed in (1, 2))  # rows of two tasks


def config(method, **options):
    config_cls = BASELINES[method].config_cls if method in BASELINES else BaditConfig
    return config_cls(**{"lora_dropout": 0.0, "task_type": "CAUSAL_LM", **SMALL[method], **options})


def gate(model):
    return model.base_model.badit_gate["default"]


def adapt(model, method, **options):
    torch.manual_seed(0)
    return get_peft_model(model, config(method, **options)).eval()


def adapted(model, method, tasks=3, **options):
    """Returns a model as after training; for methods with branches, as after ``tasks`` tasks."""
    model = randomise(adapt(model, method, **options))
    for seed in range(1, tasks if method in BRANCHES else 1):
        model.base_model.end_task(batches(*padded(random_rows(5, 4, seed=seed))))
        model.base_model.next_task()
        randomise(model, seed=seed)
    return model


def batches(ids, prompt_mask):
    """Returns the batches of one task as passed to hooks; all attended positions are prompt."""
    return {
        "task": [
            {"input_ids": ids, "attention_mask": prompt_mask, "labels": torch.full_like(ids, -100)}
        ]
    }


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model, ids=IDS, mask=MASK, rows=ROWS):
    """Returns the logits at the attended positions."""
    with hooks_of(model).rows_of(rows):
        return forward(model, ids, mask).logits[mask.bool()]


def loss(model, rows=ROWS, **options):
    """Returns the loss; the answers are the last three tokens."""
    with hooks_of(model).rows_of(rows):
        return forward(
            model, IDS, MASK, labels=IDS.masked_fill(torch.arange(11) < 8, -100), **options
        ).loss


def experts(method, A, B, num_experts):
    """Returns (B_k, A_k) of each expert."""
    parts_of_A = num_experts * [A] if method == "hydralora" else np.split(A, num_experts)
    return list(zip(np.split(B, num_experts, axis=1), parts_of_A, strict=True))


def goat_start(W, num_experts, rank, scaling, rho):
    """Returns (B0_k, A0_k) of each expert.

    They are the first ``rank`` directions of the k-th chunk of the spectrum.
    """
    u, s, vh = np.linalg.svd(W, full_matrices=False)
    runs = [slice(start, start + rank) for start in range(0, len(s), len(s) // num_experts)][
        :num_experts
    ]
    roots = [np.diag(np.sqrt(s[run] / (scaling * rho))) for run in runs]
    return [(u[:, run] @ root, root @ vh[run]) for run, root in zip(runs, roots, strict=True)]


def gates(layer, x):
    logits = reference.float64(x) @ reference.float64(layer.badit_router["default"]).T
    return reference.expert_gates(
        logits, "softmax", getattr(layer.badit_config["default"], "top_k", None)
    )


def forward_by_position(layer, x, parts_at):
    """Returns y = W x + b + s Σ_k w_k B_k A_k x by position.

    ``parts_at`` returns all (w_k, B_k, A_k) of a position.
    """
    options = layer.badit_config["default"]
    x_ = reference.float64(x)
    y = reference.float64(layer.get_base_layer()(x))
    for where in np.ndindex(*x.shape[:-1]):
        for weight, b_k, a_k in parts_at(where):
            y[where] += options.lora_alpha / options.r * weight * (b_k @ (a_k @ x_[where]))
    return torch.from_numpy(y)


def mixture_forward(method, layer, x):
    """Returns y = W x + b + s Σ_k g_k B_k A_k x.

    For GOAT minus (s/K) Σ_k B0_k A0_k x, with B0 and A0 recomputed.
    """
    options = layer.badit_config["default"]
    g = gates(layer, x)
    start = []
    if method == "goat":
        W = reference.float64(layer.weight_OI)
        s = options.lora_alpha / options.r
        start = [
            (-1 / options.num_experts, *pair)
            for pair in goat_start(W, options.num_experts, RANK, s, options.rho)
        ]
    A, B = (reference.float64(factors["default"]) for factors in (layer.badit_A, layer.badit_B))
    expert_pairs = experts(method, A, B, options.num_experts)
    return forward_by_position(
        layer,
        x,
        lambda where: start + [(g[(*where, k)], *pair) for k, pair in enumerate(expert_pairs)],
    )


def imbalance(method, gates_, probabilities):
    """Returns the balance loss of one layer.

    From gates and full softmax (positions, experts) at attended positions.
    """
    positions, num_experts = gates_.shape
    if method == "loramoe":
        z = [sum(gates_[i, k] for i in range(positions)) for k in range(num_experts)]
        mean = sum(z) / num_experts
        return sum((value - mean) ** 2 for value in z) / num_experts / mean**2
    shares = [
        sum(gates_[i, k] > 0 for i in range(positions)) / positions for k in range(num_experts)
    ]
    return num_experts * sum(f * probabilities[:, k].mean() for k, f in enumerate(shares))


def _silu(x):
    return x / (1 + np.exp(-x))


def weights(method, model, prompt):
    """Returns the branch weights a (branches) for one p0."""
    count = model.peft_config["default"].past_branches + 1
    if method == "o-lora":
        return np.ones(count)
    tensors = {name: reference.float64(tensor) for name, tensor in gate(model).state_dict().items()}
    prompt = reference.float64(prompt)
    keys = [*tensors["past_keys"], tensors["key"]]
    if method == "gainlora":
        downs = [*tensors["past_down"], tensors["down"]]
        ups = [*tensors["past_up"], tensors["up"]]
        weights_of_branches = []
        for down, up, key in zip(downs, ups, keys, strict=True):
            z = _silu(up @ _silu(down @ prompt))
            cosine = float(z @ key) / math.sqrt(float(z @ z) * float(key @ key))
            weights_of_branches.append(abs(2 / (1 + math.exp(-4 * cosine)) - 1))
        return np.array(weights_of_branches)
    x = _silu(tensors["up"] @ (tensors["down"] @ prompt))
    query = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    query = query * tensors["norm_weight"] + tensors["norm_bias"]
    exponentials = [math.exp(float(query @ key) / math.sqrt(len(key))) for key in keys]
    return np.array(exponentials) / sum(exponentials)


def branch_forward(layer, x, a):
    """Returns y = W x + b + s Σ_i a_i B_i A_i x for the positions x (T, I) of one row."""
    A = np.concatenate(
        [reference.float64(p["default"]) for p in (layer.badit_A_past, layer.badit_A)]
    )
    B = np.concatenate(
        [reference.float64(p["default"]) for p in (layer.badit_B_past, layer.badit_B)], axis=1
    )
    branch_parts = [
        (weight, *pair) for weight, pair in zip(a, experts("o-lora", A, B, len(a)), strict=True)
    ]
    return forward_by_position(layer, x, lambda where: branch_parts)


def projector(projector_before, inputs, share, stop_below=False):
    """Adds one direction at a time to a projector until it holds the share of the energy.

    ``stop_below``: without the last direction, unless it is the only one.
    """
    P = projector_before.copy()
    total = float((inputs**2).sum())
    added = []
    while total - float(((inputs - inputs @ P) ** 2).sum()) < share * total:
        remainder = inputs - inputs @ P
        added.append(np.linalg.eigh(remainder.T @ remainder)[1][:, -1])
        P = P + np.outer(added[-1], added[-1])
    if stop_below and len(added) > 1:
        P = P - np.outer(added[-1], added[-1])
    return P


def mtl_forward(layer, x, rows):
    """Returns y = W x + b + s Σ_k softmax(w_t / τ)_k B_k Λ_t A x, by position."""
    options = layer.badit_config["default"]
    names = ("A", "B", "lambda", "task_logits")
    A, B, Lambda, w = (
        reference.float64(getattr(layer, f"badit_{name}")["default"]) for name in names
    )

    def parts_at(where):
        task = TASKS.index(rows[where[0]])
        powers = [math.exp(logit / options.temperature) for logit in w[task]]
        pairs = experts("hydralora", Lambda[task] @ A, B, options.num_experts)
        return [(power / sum(powers), *pair) for power, pair in zip(powers, pairs, strict=True)]

    return forward_by_position(layer, x, parts_at)
