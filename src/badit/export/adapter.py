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
    folder: Path, factors: Factors, base: nn.Module, base_name: str, revision: str | None = None
) -> None:
    """Writes a LoRA with one rank and alpha = rank.

    It has none of PEFT's newer fields, which servers refuse. ``base`` may have adapters;
    ``base_name`` and ``revision`` identify it. All ``factors`` must have the same rank.
    """
    base_layers: list[Any] = []
    fused_weights: set[str] = set()
    # By module; a fused weight has the pairs of several matrices.
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for module, pair in factors.items():
        layer = base_layer(base, module)
        # Of an adapted layer, its base layer decides how PEFT names and stores the factors.
        layer = getattr(layer, "base_layer", layer)
        base_layers.append(layer)
        weight = module
        if isinstance(layer, FusedExpert):
            weight = module.rpartition(".")[0]
            fused_weights.add(weight)
        pairs.setdefault(weight, []).append(pair)
    modules = [weight for weight in pairs if weight not in fused_weights]

    rank = len(next(iter(factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,  # scaling 1, because B contains the scaling
        "lora_dropout": 0.0,
        "target_modules": short_module_names(base, modules),
        "bias": "none",
        "modules_to_save": None,
        # Conv1D stores its weight as (in, out), so PEFT must transpose the update.
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in base_layers),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if fused_weights:
        # PEFT compares these names with the ends of the parameters' names.
        endings = {".".join(weight.split(".")[-2:]) for weight in fused_weights}
        config["target_parameters"] = sorted(endings)

    tensors: dict[str, torch.Tensor] = {}
    # PEFT wraps a module once per fused weight, the last one outermost.
    for weight, pairs_of_weight in reversed(pairs.items()):
        module = weight.rpartition(".")[0] if weight in fused_weights else weight
        place = f"base_model.model.{module}"
        while f"{place}.lora_A.weight" in tensors:
            place += ".base_layer"
        tensors[f"{place}.lora_A.weight"] = torch.cat([a_PI for a_PI, _ in pairs_of_weight])
        # PEFT's order for a fused weight: A's rows by expert, B's columns by rank and then expert.
        stacked_OPE = torch.stack([b_OP for _, b_OP in pairs_of_weight], dim=-1)
        tensors[f"{place}.lora_B.weight"] = stacked_OPE.flatten(1)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, config)
