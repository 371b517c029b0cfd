"""The rivals' formulas as written down: loops over positions and experts, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers.pytorch_utils import Conv1D

import reference
from badit.baselines import BASELINES
from badit.baselines.mixture import MixtureLinear

MIXTURES = ("loramoe", "hydralora", "goat")
SMALL: dict[str, dict[str, Any]] = {
    "loramoe": {"num_experts": 3, "r": 2, "lora_alpha": 4},
    "hydralora": {"num_experts": 3, "r": 2, "lora_alpha": 4},
    "goat": {"num_experts": 4, "r": 8, "lora_alpha": 16, "top_k": 2},
}
RANK = 2  # one expert's, in all of the above; the scaling is 2


def config(rival: str, **options: Any) -> Any:
    values = {"lora_dropout": 0.0, "task_type": "CAUSAL_LM", **SMALL[rival], **options}
    return BASELINES[rival].config_cls(**values)


def layers(model: torch.nn.Module) -> list[MixtureLinear]:
    return [module for module in model.modules() if isinstance(module, MixtureLinear)]


@torch.no_grad()
def randomise(model: Any, seed: int = 0, adapter: str = "default") -> Any:
    """An adapter as after training: A and B off their start, and a router that decides."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for parameters, size in ((layer.badit_A, 0.1), (layer.badit_B, 0.1), (layer.badit_router, 0.4)):
            parameter = parameters[adapter]
            parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def adapt(model: Any, rival: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, config(rival, **options)).eval()


def adapted(model: Any, rival: str, **options: Any) -> Any:
    return randomise(adapt(model, rival, **options))


def experts(rival: str, A: np.ndarray, B: np.ndarray, num_experts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each expert's (B_k, A_k)."""
    rank = B.shape[1] // num_experts
    runs = [slice(k * rank, (k + 1) * rank) for k in range(num_experts)]
    return [(B[:, run], A if rival == "hydralora" else A[run]) for run in runs]


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


def forward(rival: str, layer: MixtureLinear, x: torch.Tensor) -> torch.Tensor:
    """y = W x + b + s Σ_k g_k B_k A_k x, and GOAT's − (s/K) Σ_k B0_k A0_k x, with B0 and A0 worked out anew."""
    options, base = layer.badit_config["default"], layer.get_base_layer()
    W = reference.float64(base.weight.T if isinstance(base, Conv1D) else base.weight)
    A, B = reference.float64(layer.badit_A["default"]), reference.float64(layer.badit_B["default"])
    x_, num_experts, s = reference.float64(x), options.num_experts, options.lora_alpha / options.r
    weight = W.copy()
    if rival == "goat":
        for b_k, a_k in goat_start(W, num_experts, RANK, s, options.rho):
            weight -= s / num_experts * (b_k @ a_k)
    g, y = gates(layer, x), np.zeros((*x.shape[:-1], len(W)))
    for where in np.ndindex(*x.shape[:-1]):
        y[where] = weight @ x_[where] + (0 if base.bias is None else reference.float64(base.bias))
        for k, (b_k, a_k) in enumerate(experts(rival, A, B, num_experts)):
            y[where] += s * g[(*where, k)] * (b_k @ (a_k @ x_[where]))
    return torch.from_numpy(y)


def imbalance(rival: str, gates_: np.ndarray, probabilities: np.ndarray) -> float:
    """Of one layer, from the gates and the full softmax (positions, experts) at the attended positions."""
    positions, num_experts = gates_.shape
    if rival == "loramoe":
        z = [sum(gates_[i, k] for i in range(positions)) for k in range(num_experts)]
        mean = sum(z) / num_experts
        return sum((value - mean) ** 2 for value in z) / num_experts / mean**2
    choices = [(i, k) for i in range(positions) for k in range(num_experts) if gates_[i, k] > 0]
    total = 0.0
    for k in range(num_experts):
        f = sum(1 for _, chosen in choices if chosen == k) / len(choices)
        total += f * sum(probabilities[i, k] for i in range(positions)) / positions
    return num_experts * total
