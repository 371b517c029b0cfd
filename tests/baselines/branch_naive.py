"""The branch methods' formulas as written down (loops over branches, float64), and steps that their tests share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers.pytorch_utils import Conv1D

import reference
from badit.baselines import BASELINES
from badit.baselines.branches import BranchLinear
from tuner.helpers import forward, padded, random_rows

METHODS = ("o-lora", "gainlora", "sapt")
GATED = ("gainlora", "sapt")
IDS, MASK = padded(random_rows(6, 11, 9))
FIRST, SECOND = (padded(random_rows(*[5] * 4, seed=seed)) for seed in (1, 2))  # prompts of two tasks


def config(method: str, **options: Any) -> Any:
    """r = 2, scaling 2, no dropout."""
    values = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    if method in GATED:
        values["gate_hidden_size"] = 10
    return BASELINES[method].config_cls(**{**values, **options})


def layers(model: Any) -> list[BranchLinear]:
    return [module for module in model.modules() if isinstance(module, BranchLinear)]


def gate(model: Any, adapter: str = "default") -> Any:
    return model.base_model.badit_gate[adapter]


@torch.no_grad()
def randomise(model: Any, seed: int = 0, adapter: str = "default") -> Any:
    """The current branch, and gate, as after training."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for layer in layers(model) for p in (layer.badit_A[adapter], layer.badit_B[adapter])]
    if adapter in model.base_model.badit_gate:
        parameters += gate(model, adapter).parameters()
    for parameter in parameters:
        parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def adapt(model: Any, method: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, config(method, **options)).eval()


def adapted(model: Any, method: str, tasks: int = 3, **options: Any) -> Any:
    """A model as after ``tasks`` tasks."""
    model = randomise(adapt(model, method, **options))
    for seed in range(1, tasks):
        prompts = padded(random_rows(5, 4, seed=seed))
        model.base_model.end_task(batches(*prompts))
        model.base_model.next_task()
        randomise(model, seed=seed)
    return model


def batches(ids: torch.Tensor, prompt_mask: torch.Tensor) -> dict[str, list[dict[str, torch.Tensor]]]:
    """One task's, as hooks get them: all that is attended to is prompt."""
    return {"task": [{"input_ids": ids, "attention_mask": prompt_mask, "labels": torch.full_like(ids, -100)}]}


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> torch.Tensor:
    """At the attended positions."""
    return forward(model, ids, mask).logits[mask.bool()]


def loss(model: Any, **options: Any) -> torch.Tensor:
    """The answers are the last three tokens."""
    labels = IDS.clone()
    labels[:, :-3] = -100
    return forward(model, IDS, MASK, labels=labels, **options).loss


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
    """y = W x + b + s Σ_i a_i B_i A_i x for one position x."""
    options, base = layer.badit_config["default"], layer.get_base_layer()
    x, y = reference.float64(x), reference.float64(base.weight.T if isinstance(base, Conv1D) else base.weight)
    y = y @ x + (0 if base.bias is None else reference.float64(base.bias))
    past_A, past_B = (reference.float64(p["default"]) for p in (layer.badit_A_past, layer.badit_B_past))
    for i, weight in enumerate(a):
        run = slice(i * options.r, (i + 1) * options.r)
        b_i, a_i = past_B[:, run], past_A[run]
        if i == len(a) - 1:
            b_i, a_i = (reference.float64(p["default"]) for p in (layer.badit_B, layer.badit_A))
        y = y + options.lora_alpha / options.r * weight * (b_i @ (a_i @ x))
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
