"""The LoRA that a trained adapter is, module by module: of experts under fixed gates, and of PEFT's own LoRA family.

Shape suffixes: O/I = out/in features, P = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from badit.analysis.gates import adapted_layers
from badit.errors import BaditError
from badit.serving.mixture import Mixture
from badit.tuner import hooks_of

#: By the module's name in the base model, A (P, I) and B (O, P) with W + B A the adapted weight: float32, on the CPU.
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

# They start from a part of the base weight, W − s·B0 A0, and PEFT takes that off again whenever one is loaded.
_CHANGES_BASE = ("pissa", "olora")


def mixture_factors(model: PeftModel, mixture: Mixture | None, task: str | None = None) -> Factors:
    """Those of the active adapter's experts.

    Args:
        mixture: the fixed gates; None where the gates are fixed by themselves.
        task: for methods that learn something apart for each task, whose.
    """
    factors = {}
    with hooks_of(model).rows_of(None if task is None else [task]):
        for one in adapted_layers(model):
            gates_N = None if mixture is None else mixture.of_components(one)
            a_PI, b_OP = one.layer.frozen_factors(one.adapter, gates_N)
            factors[one.layer.name] = (a_PI.cpu(), b_OP.cpu())
    return factors


def lora_factors(model: PeftModel, initial_model: Callable[[], PeftModel]) -> Factors:
    """Those of an adapter of PEFT's LoRA family.

    Args:
        model: the base model with the trained adapter.
        initial_model: makes the base model with the adapter as it was before training; called for PiSSA and OLoRA.

    Raises:
        BaditError: the adapter is more than a LoRA.
    """
    config: Any = model.peft_config["default"]
    _refuse_more_than_lora(config)
    factors = _scaled(model)
    if config.init_lora_weights in _CHANGES_BASE:
        initial = _scaled(initial_model())
        factors = {
            name: (torch.cat([a_PI, initial[name][0]]), torch.cat([b_OP, -initial[name][1]], dim=1))
            for name, (a_PI, b_OP) in factors.items()
        }
    return _of_one_rank(factors)


def _refuse_more_than_lora(config: LoraConfig) -> None:
    fields = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
    extra = [name for name in fields if getattr(config, name)]
    if config.bias != "none":
        extra.append("bias")
    if extra:
        raise BaditError(f"method.{extra[0]}: makes the adapter more than a plain LoRA; export the model: --merged")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva", *_CHANGES_BASE):
        raise BaditError(
            f"method.init_lora_weights: {config.init_lora_weights} has changed the base weight in a way that cannot be "
            "told from the adapter; export the model: --merged"
        )


@torch.no_grad()
def _scaled(model: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    factors = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A:
            raise BaditError(f"{name} is an embedding, which takes no plain LoRA; export the model: --merged")
        a_PI, b_OP = (_weight(part["default"]) for part in (layer.lora_A, layer.lora_B))
        factors[name] = (a_PI, b_OP * layer.scaling["default"])
    return factors


def _weight(linear: nn.Module) -> torch.Tensor:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().to("cpu", torch.float32)


def _of_one_rank(factors: Factors) -> Factors:
    """Zeros added to those of smaller rank: one rank and one alpha for all modules is what every server reads."""
    rank = max(len(a_PI) for a_PI, _ in factors.values())
    return {
        name: (F.pad(a_PI, (0, 0, 0, rank - len(a_PI))), F.pad(b_OP, (0, rank - len(a_PI))))
        for name, (a_PI, b_OP) in factors.items()
    }
