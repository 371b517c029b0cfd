"""The baselines' formulas as written down (loops over positions, experts and branches, float64), and shared steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from peft import get_peft_model

import reference
from badit.baselines import BASELINES
from badit.baselines.branches import BranchLinear
from badit.baselines.mixture import MixtureLinear
from badit.tuner import BaditConfig, hooks_of
from tuner.helpers import IDS, MASK, layers, padded, random_rows
from tuner.helpers import forward as model_forward

MIXTURES = ("loramoe", "hydralora", "goat")
BRANCHES, GATED = ("o-lora", "gainlora", "sapt"), ("gainlora", "sapt")
METHODS = ("badit", "badit standardised", *MIXTURES, "mtl-lora", *BRANCHES)
CONFIGS = {"badit": BaditConfig, "badit standardised": BaditConfig} | {
    name: baseline.config_cls for name, baseline in BASELINES.items()
}
FAMILIES = ("llama", "gpt2", "gemma2")
TASKS = ["cities", "rivers", "seas"]
SMALL: dict[str, dict[str, Any]] = {
    "badit": {"num_experts": 3, "r": 2, "lora_alpha": 4},
    "badit standardised": {"num_experts": 3, "r": 2, "router_input": "standardised", "init_weights": "directions"},
    "loramoe": {"num_experts": 3, "r": 2, "lora_alpha": 4},
    "hydralora": {"num_experts": 3, "r": 2, "lora_alpha": 4},
    "goat": {"num_experts": 4, "r": 8, "lora_alpha": 16, "top_k": 2},
    "mtl-lora": {"num_experts": 3, "r": 2, "lora_alpha": 4, "tasks": TASKS},
    "o-lora": {"r": 2, "lora_alpha": 4},
    "gainlora": {"r": 2, "lora_alpha": 4, "gate_hidden_size": 10},
    "sapt": {"r": 2, "lora_alpha": 4, "gate_hidden_size": 10},
}
RANK = 2  # one expert's, in all of the above; the scaling is 2
_NOISE = {"badit_A": 0.1, "badit_B": 0.1, "badit_router": 0.4, "badit_lambda": 0.5}
ROWS = ["rivers", "cities", "rivers"]
FIRST, SECOND = (padded(random_rows(*[5] * 4, seed=seed)) for seed in (1, 2))  # prompts of two tasks


def config(method: str, **options: Any) -> Any:
    return CONFIGS[method](**{"lora_dropout": 0.0, "task_type": "CAUSAL_LM", **SMALL[method], **options})


def gate(model: Any, adapter: str = "default") -> Any:
    return model.base_model.badit_gate[adapter]


@torch.no_grad()
def randomise(model: Any, seed: int = 0, adapter: str = "default") -> Any:
    """An adapter as after training: its tensors off their start, and a router or gate that decides."""
    generator = torch.Generator().manual_seed(seed)
    places = [(getattr(layer, name, {}), size) for layer in layers(model) for name, size in _NOISE.items()]
    found = [(tensors[adapter], size) for tensors, size in places if adapter in tensors]
    gates = getattr(getattr(model, "base_model", None), "badit_gate", {})
    found += [(parameter, 0.1) for parameter in (gates[adapter].parameters() if adapter in gates else ())]
    for parameter, size in found:
        parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    for layer in layers(model):
        if adapter in getattr(layer, "badit_expert_of", ()):
            layer.expert_of(adapter).copy_(layer.expert_of(adapter).flip(0))
        if adapter in getattr(layer, "badit_moments", ()):
            layer.badit_moments[adapter].copy_(torch.rand(2, layer.in_features, generator=generator) + 0.5)
    return model


def adapt(model: Any, method: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, config(method, **options)).eval()


def adapted(model: Any, method: str, tasks: int = 3, **options: Any) -> Any:
    """A model as after training; with branches, as after ``tasks`` tasks."""
    model = randomise(adapt(model, method, **options))
    for seed in range(1, tasks if method in BRANCHES else 1):
        model.base_model.end_task(batches(*padded(random_rows(5, 4, seed=seed))))
        model.base_model.next_task()
        randomise(model, seed=seed)
    return model


def batches(ids: torch.Tensor, prompt_mask: torch.Tensor) -> dict[str, list[dict[str, torch.Tensor]]]:
    """One task's, as hooks get them: all that is attended to is prompt."""
    return {"task": [{"input_ids": ids, "attention_mask": prompt_mask, "labels": torch.full_like(ids, -100)}]}


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(
    model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK, rows: list[str] | None = ROWS
) -> torch.Tensor:
    """At the attended positions."""
    with hooks_of(model).rows_of(rows):
        return model_forward(model, ids, mask).logits[mask.bool()]


def loss(model: Any, rows: list[str] = ROWS, **options: Any) -> torch.Tensor:
    """The answers are the last three tokens."""
    labels = IDS.clone()
    labels[:, :-3] = -100
    with hooks_of(model).rows_of(rows):
        return model_forward(model, IDS, MASK, labels=labels, **options).loss


def experts(method: str, A: np.ndarray, B: np.ndarray, num_experts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each expert's (B_k, A_k)."""
    rank = B.shape[1] // num_experts
    runs = [slice(k * rank, (k + 1) * rank) for k in range(num_experts)]
    return [(B[:, run], A if method == "hydralora" else A[run]) for run in runs]


def goat_start(W: np.ndarray, num_experts: int, rank: int, scaling: float, rho: float) -> list[Any]:
    """Expert k from the first ``rank`` directions of the k-th chunk of the spectrum."""
    u, s, vh = np.linalg.svd(W, full_matrices=False)
    chunk, start = len(s) // num_experts, []
    for k in range(num_experts):
        run = slice(k * chunk, k * chunk + rank)
        root = np.diag(np.sqrt(s[run] / (scaling * rho)))
        start.append((u[:, run] @ root, root @ vh[run]))
    return start


def gates(layer: MixtureLinear, x: Any) -> np.ndarray:
    logits = reference.float64(x) @ reference.float64(layer.badit_router["default"]).T
    return reference.expert_gates(logits, "softmax", getattr(layer.badit_config["default"], "top_k", None))


def forward(method: str, layer: MixtureLinear, x: torch.Tensor) -> torch.Tensor:
    """y = W x + b + s Σ_k g_k B_k A_k x, and GOAT's − (s/K) Σ_k B0_k A0_k x, with B0 and A0 worked out again."""
    options, start = layer.badit_config["default"], []
    A, B, x_ = (reference.float64(each) for each in (layer.badit_A["default"], layer.badit_B["default"], x))
    num_experts, s = options.num_experts, options.lora_alpha / options.r
    if method == "goat":
        start = goat_start(reference.float64(layer.weight_OI), num_experts, RANK, s, options.rho)
    g, y = gates(layer, x), reference.float64(layer.get_base_layer()(x))
    for where in np.ndindex(*x.shape[:-1]):
        for b_k, a_k in start:
            y[where] -= s / num_experts * (b_k @ (a_k @ x_[where]))
        for k, (b_k, a_k) in enumerate(experts(method, A, B, num_experts)):
            y[where] += s * g[(*where, k)] * (b_k @ (a_k @ x_[where]))
    return torch.from_numpy(y)


def imbalance(method: str, gates_: np.ndarray, probabilities: np.ndarray) -> float:
    """Of one layer, from the gates and the full softmax (positions, experts) at the attended positions."""
    positions, num_experts = gates_.shape
    if method == "loramoe":
        z = [sum(gates_[i, k] for i in range(positions)) for k in range(num_experts)]
        mean = sum(z) / num_experts
        return sum((value - mean) ** 2 for value in z) / num_experts / mean**2
    shares = [sum(gates_[i, k] > 0 for i in range(positions)) / positions for k in range(num_experts)]
    return num_experts * sum(f * probabilities[:, k].mean() for k, f in enumerate(shares))


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def weights(method: str, model: Any, prompt: Any) -> np.ndarray:
    """a (branches) for one p0."""
    count = model.peft_config["default"].past_branches + 1
    if method == "o-lora":
        return np.ones(count)
    tensors = {name: reference.float64(tensor) for name, tensor in gate(model).state_dict().items()}
    prompt = reference.float64(prompt)
    keys = [*tensors["past_keys"], tensors["key"]]
    if method == "gainlora":
        downs, ups, found = [*tensors["past_down"], tensors["down"]], [*tensors["past_up"], tensors["up"]], []
        for down, up, key in zip(downs, ups, keys, strict=True):
            z = _silu(up @ _silu(down @ prompt))
            cosine = float(z @ key) / math.sqrt(float(z @ z) * float(key @ key))
            found.append(abs(2 / (1 + math.exp(-4 * cosine)) - 1))
        return np.array(found)
    x = _silu(tensors["up"] @ (tensors["down"] @ prompt))
    query = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    query = query * tensors["norm_weight"] + tensors["norm_bias"]
    exponentials = [math.exp(float(query @ key) / math.sqrt(len(key))) for key in keys]
    return np.array(exponentials) / sum(exponentials)


def branch_forward(layer: BranchLinear, x: Any, a: np.ndarray) -> np.ndarray:
    """y = W x + b + s Σ_i a_i B_i A_i x for the positions x (T, I) of one row."""
    options, x, y = layer.badit_config["default"], reference.float64(x), reference.float64(layer.get_base_layer()(x))
    past_A, past_B = (reference.float64(p["default"]) for p in (layer.badit_A_past, layer.badit_B_past))
    for i, weight in enumerate(a):
        run = slice(i * options.r, (i + 1) * options.r)
        b_i, a_i = past_B[:, run], past_A[run]
        if i == len(a) - 1:
            b_i, a_i = (reference.float64(p["default"]) for p in (layer.badit_B, layer.badit_A))
        y = y + options.lora_alpha / options.r * weight * (x @ a_i.T @ b_i.T)
    return y


def penalty(layer: BranchLinear) -> float:
    """Σ_{i<t} Σ |A_i A_tᵀ| of one layer."""
    current = reference.float64(layer.badit_A["default"])
    past = reference.float64(layer.badit_A_past["default"])
    return sum(abs(float(row @ other)) for row in past for other in current)


def projector(old: np.ndarray, inputs: np.ndarray, share: float) -> np.ndarray:
    """Directions added one at a time until M holds the share of the energy."""
    P, total = old.copy(), float((inputs**2).sum())
    while total - float(((inputs - inputs @ P) ** 2).sum()) < share * total:
        rest = inputs - inputs @ P
        direction = np.linalg.eigh(rest.T @ rest)[1][:, -1]
        P = P + np.outer(direction, direction)
    return P


def mtl_forward(layer: Any, x: torch.Tensor, rows: list[str]) -> torch.Tensor:
    """y = W x + b + s Σ_k softmax(w_t / τ)_k B_k Λ_t A x, one position after another."""
    options, parts = layer.badit_config["default"], ("A", "B", "lambda", "task_logits")
    A, B, Lambda, w = (reference.float64(getattr(layer, f"badit_{part}")["default"]) for part in parts)
    r, x_, y = options.r, reference.float64(x), reference.float64(layer.get_base_layer()(x))
    for where in np.ndindex(*x.shape[:-1]):
        task = TASKS.index(rows[where[0]])
        powers = [math.exp(w[task, k] / options.temperature) for k in range(options.num_experts)]
        for k, power in enumerate(powers):
            B_k = B[:, k * r : (k + 1) * r]
            y[where] += options.lora_alpha / r * power / sum(powers) * (B_k @ (Lambda[task] @ (A @ x_[where])))
    return torch.from_numpy(y)
