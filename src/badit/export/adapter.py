"""Writes a plain LoRA adapter that PEFT, vLLM and llama.cpp load without badit."""

from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.export.factors import Factors
from badit.support.files import write_json
from badit.tuner.targets import FusedExpert, base_layer, short_module_names


def write_adapter(
    folder: Path, factors: Factors, base: nn.Module, name: str, revision: str | None = None
) -> None:
    """Writes a LoRA with one rank and alpha = rank.

    It has none of PEFT's newer fields, which servers refuse. ``base`` may have adapters; ``name``
    and ``revision`` identify it. All ``factors`` must have the same rank.
    """
    layers: dict[str, Any] = {}
    for module in factors:
        layer = base_layer(base, module)
        layers[module] = getattr(layer, "base_layer", layer)
    modules = [module for module, layer in layers.items() if not isinstance(layer, FusedExpert)]
    # By module; a fused weight has the pairs of several matrices.
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for module, pair in factors.items():
        weight = module if module in modules else module.rpartition(".")[0]
        pairs.setdefault(weight, []).append(pair)
    fused = pairs.keys() - modules

    rank = len(next(iter(factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,  # scaling 1, because B contains the scaling
        "lora_dropout": 0.0,
        "target_modules": short_module_names(base, modules),
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if fused:
        config["target_parameters"] = sorted({".".join(name.split(".")[-2:]) for name in fused})

    tensors: dict[str, torch.Tensor] = {}
    # PEFT wraps a module once per fused weight, the last one outermost.
    for weight, pairs_of_weight in reversed(pairs.items()):
        module = weight.rpartition(".")[0] if weight in fused else weight
        place = f"base_model.model.{module}"
        while f"{place}.lora_A.weight" in tensors:
            place += ".base_layer"
        tensors[f"{place}.lora_A.weight"] = torch.cat([a_PI for a_PI, _ in pairs_of_weight])
        stacked_OPE = torch.stack([b_OP for _, b_OP in pairs_of_weight], dim=-1)
        tensors[f"{place}.lora_B.weight"] = stacked_OPE.flatten(1)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, config)
